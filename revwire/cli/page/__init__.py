"""A plan as one self-contained HTML page: the wiring before and after, where a step's memory goes, what is left alone.

`template.html`, `style.css` and `script.js` lie beside this file and are put together with the parts written here; the
page loads nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from revwire.cli.page.wiring import wiring
from revwire.printing import in_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revwire.measure.estimates import Estimate, Estimates
    from revwire.planning.plan import Plan

_PARTS = {
    "model": "parameters and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations and temporaries",
}
_TOLD = 8


def page(name: str, plan: Plan, estimates: Estimates | None = None) -> str:
    """The page of one model.

    Args:
        name: What the reader calls the model.
        plan: What is rewired.
        estimates: What a training step of it needs, in several ways; left out of the page where there are none.
    """
    beside = files(__package__)
    template = Template(beside.joinpath("template.html").read_text("utf-8"))
    steps = {step.name: _facts(asdict(step)) for step in plan.steps}
    return template.substitute(
        title=escape(name),
        style=beside.joinpath("style.css").read_text("utf-8"),
        script=beside.joinpath("script.js").read_text("utf-8"),
        # in a script element "</script" ends the text, and "<!--<script" changes what does
        steps=json.dumps(steps).replace("<", "\\u003c"),
        summary=_summary(plan, estimates),
        memory="" if estimates is None else _memory(estimates),
        wiring="".join(wiring(chain) for chain in plan.chains) or "<p>Nothing of it is rewired.</p>",
        left=_left(plan),
    )


def _facts(step: dict[str, Any]) -> dict[str, str]:
    """What the page tells of a step when it is chosen."""
    modes = {
        "reverse": "nothing",
        "anchor": "the input of the step before",
        "keep": "the graph of its branch",
    }
    held = modes[step["mode"]]
    told = {
        "module": step["module"] or "(model)",
        "branch": " ".join(step["branch"]) or "functions of its forward",
        "trunk": " x ".join(map(str, step["trunk"][1:])) + " per sample",
        "held for backward": held,
        "in the source": step["line"],
        "also reads": " ".join(step["sides"]),
        "moves in after the sum": step["post"] or "",
        "slices": str(step["slices"]) if step["slices"] > 1 else "",
    }
    return {key: value for key, value in told.items() if value}


def _summary(plan: Plan, estimates: Estimates | None) -> str:
    steps = sum(len(chain.steps) for chain in plan.chains)
    figures = {
        "residual blocks rewired": str(steps),
        "in chains": str(len(plan.chains)),
        "coupling": plan.coupling + (", exact" if plan.exact is not False else ""),
    }
    rows = {row.strategy: row for row in estimates.rows if not row.failure} if estimates else {}
    if "plain" in rows:
        best = min(rows.values(), key=lambda row: row.activations)
        share = best.activations / rows["plain"].activations
        figures["activations of a step"] = (
            f"{in_words(rows['plain'].activations)} → {in_words(best.activations)} ({share:.1%}, {best.strategy})"
        )
    cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures.items())
    warned = "".join(f'<p class="warning">{escape(text)}</p>' for text in plan.warnings)
    return f"<dl>{''.join(cells)}</dl>{warned}"


def _memory(estimates: Estimates) -> str:
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in estimates.inputs)
    most = max((_total(row) for row in estimates.rows), default=1) or 1
    legend = "".join(f'<span class="key {part}">{text}</span>' for part, text in _PARTS.items())
    amp = f", autocast {estimates.autocast}" if estimates.autocast else ""
    return (
        f"<section id='memory'><h2>Where the memory of a step goes</h2><p>Input {escape(shapes)}, "
        f"{escape(estimates.optimizer)}{escape(amp)}; each part at its own most, the peak is what is alive at once.</p>"
        f"<p class='legend'>{legend}</p>{''.join(_bar(row, most) for row in estimates.rows)}</section>"
    )


def _total(row: Estimate) -> int:
    return row.model + row.gradients + row.optimizer + row.activations


def _bar(row: Estimate, most: int) -> str:
    name = escape(row.strategy)
    if row.failure:
        return f"<div class='way'><h3>{name}</h3><p>{escape(row.failure)}</p></div>"
    parts = "".join(
        f'<span class="{part}" style="width:{100 * getattr(row, part) / most:.3f}%" '
        f'title="{text}: {in_words(getattr(row, part))}"></span>'
        for part, text in _PARTS.items()
    )
    alive = "".join(f"<li>{escape(what)}: {in_words(size)}</li>" for what, size in row.alive[:_TOLD])
    return (
        f"<div class='way'><h3>{name} <small>peak {in_words(row.peak)}, of it activations "
        f"{in_words(row.activations)}</small></h3><div class='bar'>{parts}</div>"
        f"<details><summary>alive at the peak, in {escape(row.where)}</summary><ul>{alive}</ul></details></div>"
    )


def _left(plan: Plan) -> str:
    tables = (("Left as it is", plan.skipped), ("Run on the whole batch", plan.unsliced))
    return "".join(_table(title, places) for title, places in tables if places)


def _table(title: str, places: Any) -> str:
    def rows() -> Iterator[str]:
        for place in places:
            yield (
                f"<tr><td><code>{escape(place.module or '(model)')}</code></td><td>{escape(place.reason)}</td></tr>"
            )

    return (
        f"<section><h2>{title}</h2><div class='wide'><table><thead><tr><th>module</th><th>why</th></tr></thead>"
        f"<tbody>{''.join(rows())}</tbody></table></div></section>"
    )
