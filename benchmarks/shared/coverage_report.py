"""What the coverage sweep found, as a summary to print, as JSON, and as docs/coverage.md.

The classes of the rows are defined here and not in `benchmarks.coverage`: run as a program, that file is the module
`__main__`, and importing it by its name would load it a second time, with classes of which no row is an instance.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.shared import coverage_models, result_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from revwire.planning.plan import Plan

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
_MIB = 2**20


@dataclass(frozen=True)
class Planned:
    """What planning one architecture showed.

    Attributes:
        source: The library.
        family: The library's module.
        name: The architecture.
        verdict: `"rewired"`, `"cannot"`, or `"failed"` where it did not even run.
        chains: Steps of each chain.
        residuals: Residuals in the longest run on one trunk, counted from the operators where none was rewired.
        seconds: Time to plan.
        parameters: Number of parameters.
        held: Bytes between forward and backward of a training step at `coverage_models.BATCH`, None where they were
            not counted.
        held_rewired: The same, rewired.
        reason: Why not, where it cannot be rewired.
    """

    source: str
    family: str
    name: str
    verdict: str
    chains: tuple[int, ...] = ()
    residuals: int = 0
    seconds: float = 0.0
    parameters: int = 0
    held: int | None = None
    held_rewired: int | None = None
    reason: str = ""

    @property
    def key(self) -> str:
        """`timm/resnet50`."""
        return f"{self.source}/{self.name}"

    @property
    def missed(self) -> bool:
        """Whether there are residuals in a row, and none was rewired."""
        return self.verdict != "rewired" and self.residuals > 1


@dataclass(frozen=True)
class Verified:
    """What verifying the representative of a family showed: the failed checks and the worst gradient errors."""

    source: str
    family: str
    name: str
    ok: bool
    input: tuple[int, ...] = ()
    float64: float | None = None
    float32: float | None = None
    seconds: float = 0.0
    failed: str = ""

    @property
    def key(self) -> str:
        """`timm/resnet`: the family."""
        return f"{self.source}/{self.family}"


def reason_of(plan: Plan) -> str:
    """Why a plan has no chains, in a sentence or two: its most frequent reasons, each with one place."""
    if not plan.skipped:
        return "no residual additions"
    kinds = Counter(_kind(s.reason) for s in plan.skipped)
    told: list[str] = []
    for kind, count in kinds.most_common(2):
        first = next(s for s in plan.skipped if _kind(s.reason) == kind)
        more = f" (and {count - 1} like it)" if count > 1 else ""
        told.append(f"{first.module or '(model)'}: {first.reason}{more}")
    return "; ".join(told)


def _kind(reason: str) -> str:
    return re.sub(r"\([^)]*\)|\S*\d\S*", "#", reason)


def row(data: dict[str, Any]) -> Planned | Verified:
    """A row from its JSON form."""
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    return Planned(**values) if "verdict" in values else Verified(**values)


def summary(rows: Sequence[Planned], reports: Sequence[Verified]) -> Table:
    """What to print at the end: a line for each library, and every family that is not as it should be."""
    table = Table(title="coverage", title_justify="left")
    for heading in (
        "library",
        "architectures",
        "rewired",
        "residuals in a row, not rewired",
        "did not run",
        "verified",
    ):
        table.add_column(heading, justify="left" if heading == "library" else "right", overflow="fold")
    for source in dict.fromkeys(r.source for r in rows):
        mine = [r for r in rows if r.source == source]
        checked = [v for v in reports if v.source == source]
        table.add_row(
            source,
            str(len(mine)),
            str(sum(r.verdict == "rewired" for r in mine)),
            " ".join(r.name for r in mine if r.missed) or "0",
            " ".join(r.name for r in mine if r.verdict == "failed") or "0",
            f"{sum(v.ok for v in checked)} of {len(checked)}",
        )
    for report in reports:
        if not report.ok:
            table.add_row(report.key, report.name, "", "", "", f"[red]{report.failed}[/]")
    return table


def worse(path: Path, rows: Sequence[Planned], reports: Sequence[Verified]) -> list[str]:
    """What the committed results have and these have not."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    then = {(r["source"], r["name"]): r for r in before["architectures"]}
    found: list[str] = []
    for now in rows:
        was = then.get((now.source, now.name))
        if was is None:
            continue
        if was["verdict"] == "rewired" and now.verdict != "rewired":
            found.append(f"{now.key} was rewired, now: {now.reason}")
        elif sum(now.chains) < sum(was["chains"]):
            found.append(f"{now.key} had {sum(was['chains'])} steps, now {sum(now.chains)}")
    passed = {(v["source"], v["family"]) for v in before["verified"] if v["ok"]}
    found += [
        f"{v.key} was verified, now: {v.failed}"
        for v in reports
        if (v.source, v.family) in passed and not v.ok
    ]
    return found


def save(rows: Sequence[Planned], reports: Sequence[Verified], median_seconds: float) -> None:
    """Write benchmarks/results/coverage.json and docs/coverage.md."""
    document = {
        **result_files.origin("benchmarks.coverage"),
        "batch": coverage_models.BATCH,
        "median_seconds_to_plan": round(median_seconds, 2),
        "architectures": [asdict(r) for r in rows],
        "verified": [asdict(v) for v in sorted(reports, key=lambda v: v.key)],
    }
    text = json.dumps(document, indent=1)
    # one architecture a line: a diff of two sweeps shows what changed
    text = re.sub(r"\n {3,}", " ", text)
    (result_files.RESULTS / "coverage.json").write_text(
        re.sub(r"\n  \}", " }", text) + "\n", encoding="utf-8"
    )
    PAGE.write_text(page(document), encoding="utf-8")


def page(document: dict[str, Any]) -> str:
    """docs/coverage.md from the JSON document."""
    rows: list[dict[str, Any]] = document["architectures"]
    checked = {(v["source"], v["family"]): v for v in document["verified"]}
    parts = [_HEAD.format(line=result_files.caption(document), **document)]
    for source in dict.fromkeys(r["source"] for r in rows):
        mine = [r for r in rows if r["source"] == source]
        done = sum(r["verdict"] == "rewired" for r in mine)
        parts += [f"## {source}", "", f"{done} of {len(mine)} architectures are rewired.", ""]
        parts += ["| family | rewired | verified model | steps | MiB held, plain | rewired | remains |"]
        parts += ["|---|---|---|---|---|---|---|"]
        families = sorted({r["family"] for r in mine}, key=str.lower)
        cannot: list[str] = []
        for family in families:
            members = [r for r in mine if r["family"] == family]
            shown = checked.get((source, family))
            if shown is not None:
                parts.append(_line(family, members, shown))
            cannot += _cannot(family, members)
        parts += ["", f"### {source}: not rewired, and why", "", *_alike(cannot), ""]
    return "\n".join(parts)


def _line(family: str, members: list[dict[str, Any]], shown: dict[str, Any]) -> str:
    done = sum(r["verdict"] == "rewired" for r in members)
    # a large model is verified with fewer blocks, which its name says
    model = next(r for r in members if r["name"] == shown["name"].partition(",")[0])
    steps = f"{sum(model['chains'])} in {len(model['chains'])}"
    verdict = f"{shown['name']}" + ("" if shown["ok"] else " **FAILED**")
    figures = "? | ? | ?"
    if model["held"]:
        before, after = model["held"] / _MIB, model["held_rewired"] / _MIB
        figures = f"{before:.0f} | {after:.0f} | {after / before:.0%}"
    return f"| {family} | {done} of {len(members)} | {verdict} | {steps} | {figures} |"


def _cannot(family: str, members: list[dict[str, Any]]) -> list[str]:
    return [f"{family}|{r['name']}|{r['reason']}" for r in members if r["verdict"] != "rewired"]


def _alike(lines: list[str]) -> list[str]:
    """One entry for all architectures of a family that cannot be rewired for the same reason."""
    if not lines:
        return ["None."]
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for line in lines:
        family, name, reason = line.split("|", 2)
        groups.setdefault((family, _kind(reason)), []).append((name, reason))
    told: list[str] = []
    for (family, _), members in groups.items():
        names = ", ".join(name for name, _ in members)
        told.append(f"- **{family}** ({names}): {members[0][1]}")
    return told


_HEAD = """\
# What can be rewired

Made by `make coverage` ({line}); every architecture is in [coverage.json](../benchmarks/results/coverage.json).

Each architecture was planned on the meta device at its own input size (median {median_seconds_to_plan} s). *Held* is what a training
step keeps between forward and backward at batch {batch}, of the model named. That model, the smallest of its family, went through
the whole `revwire.verify` with real tensors: decomposition bit-equal to the original network, gradients against plain autograd
in float64 and float32, in train mode (drop path and dropout on) and in eval mode, bytes per step, and the way back. What the step holds after rewiring is
what lies outside of the chains (stem, downsampling, head) and two tensors for each chain.
"""
