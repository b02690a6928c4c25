"""A chain drawn twice as SVG: each skip connection around its own block, and one block earlier."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revwire.planning.plan import Chain, Step

_PITCH, _BOX, _HIGH = 92, 56, 34
_LEFT = 40
_BASE = 104  # the trunk's height on the picture
_LOW, _FAR = 40, 74  # how high the skips rise above it


def wiring(chain: Chain) -> str:
    """Both pictures of one chain, with its name."""
    steps = len(chain.steps)
    trunks = dict.fromkeys(" x ".join(map(str, step.trunk[1:])) for step in chain.steps)
    return (
        f"<figure><figcaption><code>{escape(chain.name)}</code>: {steps} steps, trunk {escape(' / '.join(trunks))} "
        f"</figcaption><div class='wide'>{_picture(chain, rewired=False)}{_picture(chain, rewired=True)}</div></figure>"
    )


def _picture(chain: Chain, *, rewired: bool) -> str:
    width = _LEFT * 2 + _PITCH * len(chain.steps)
    title = "after: two streams, each skip one block earlier" if rewired else "before: one trunk"
    parts = [
        f"<text x='4' y='16' class='title'>{title}</text>",
        f"<path class='trunk' d='M4 {_BASE} H{width - 8}'/>",
        *(_skip(i, rewired=rewired) for i in range(len(chain.steps))),
        *_steps(chain),
    ]
    return (
        f"<svg viewBox='0 0 {width} {_BASE + 44}' width='{width}' height='{_BASE + 44}' role='img' "
        f"aria-label='{escape(chain.name)}, {title}'>{''.join(parts)}</svg>"
    )


def _at(position: int) -> int:
    """Where the trunk is before step `position`."""
    return _LEFT - 12 + _PITCH * position


def _skip(index: int, *, rewired: bool) -> str:
    begin = _at(max(index - 1, 0) if rewired else index)
    end = _at(index + 1)
    high = _FAR if rewired and index else _LOW
    stream = f" stream{index % 2}" if rewired else ""
    top = _BASE - high
    return f"<path class='skip{stream}' d='M{begin} {_BASE} C{begin} {top} {end} {top} {end} {_BASE}'/>"


def _steps(chain: Chain) -> Iterator[str]:
    for index, step in enumerate(chain.steps):
        x = _at(index) + (_PITCH - _BOX) // 2 - 4
        yield (
            f"<g class='step' tabindex='0' role='button' data-step='{escape(step.name)}'>"
            f"<title>{escape(step.name)}</title>"
            f"<rect x='{x}' y='{_BASE - _HIGH // 2}' width='{_BOX}' height='{_HIGH}' rx='6'/>"
            f"<text x='{x + _BOX // 2}' y='{_BASE + 4}'>{escape(_short(step))}</text></g>"
            f"<circle class='sum' cx='{_at(index + 1)}' cy='{_BASE}' r='7'/>"
            f"<text class='plus' x='{_at(index + 1)}' y='{_BASE + 4}'>+</text>"
        )
        if index % 2 == 0 or chain.steps[index - 1].module != step.module:
            yield f"<text class='module' x='{x}' y='{_BASE + 36}'>{escape(step.module or '(model)')}</text>"


def _short(step: Step) -> str:
    """The child that says most of a branch: what is neither a norm, a scale nor a drop."""
    telling = [
        b for b in step.branch if not b.startswith(("norm", "ln", "ls", "gamma", "drop", "layer_norm"))
    ]
    name = (telling or list(step.branch) or ["F"])[0].rsplit(".", 1)[-1]
    return name if len(name) <= 8 else f"{name[:7]}…"
