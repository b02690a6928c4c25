"""revwire: rewire pretrained residual networks into reversible ones and train them with a memory-free backward.

Names are imported when they are first used, so that the command answers `--help` without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revwire.version import __version__

if TYPE_CHECKING:
    from revwire.api import plan, rewire
    from revwire.checkpoint import convert, load, save, to_original
    from revwire.errors import CheckpointError, ReplayError, RevwireError, RewireError
    from revwire.measure.budget import Budget
    from revwire.measure.estimate import estimate
    from revwire.measure.estimates import Estimate, Estimates
    from revwire.measure.report import Check, Report
    from revwire.measure.verify import verify
    from revwire.planning.plan import Chain, Joined, Plan, Skipped, Step
    from revwire.rewrite.schedule import Dr2NetSchedule
    from revwire.rewrite.unwiring import unwire, unwired
    from revwire.rewrite.wired import plan_of
    from revwire.run.coupling import BDIA, Coupling, Dr2Net, Momentum, Re2TAL
    from revwire.run.exact import Grid
    from revwire.run.streams import Streams

__all__ = [
    "BDIA",
    "Budget",
    "Chain",
    "Check",
    "CheckpointError",
    "Coupling",
    "Dr2Net",
    "Dr2NetSchedule",
    "Estimate",
    "Estimates",
    "Grid",
    "Joined",
    "Momentum",
    "Plan",
    "Re2TAL",
    "ReplayError",
    "Report",
    "RevwireError",
    "RewireError",
    "Skipped",
    "Step",
    "Streams",
    "__version__",
    "convert",
    "estimate",
    "load",
    "plan",
    "plan_of",
    "rewire",
    "save",
    "to_original",
    "unwire",
    "unwired",
    "verify",
]

_HOMES = {
    "revwire.api": ("plan", "rewire"),
    "revwire.checkpoint": ("convert", "load", "save", "to_original"),
    "revwire.errors": ("CheckpointError", "ReplayError", "RevwireError", "RewireError"),
    "revwire.measure.budget": ("Budget",),
    "revwire.measure.estimate": ("estimate",),
    "revwire.measure.estimates": ("Estimate", "Estimates"),
    "revwire.measure.report": ("Check", "Report"),
    "revwire.measure.verify": ("verify",),
    "revwire.planning.plan": ("Chain", "Joined", "Plan", "Skipped", "Step"),
    "revwire.rewrite.schedule": ("Dr2NetSchedule",),
    "revwire.rewrite.unwiring": ("unwire", "unwired"),
    "revwire.rewrite.wired": ("plan_of",),
    "revwire.run.coupling": ("BDIA", "Coupling", "Dr2Net", "Momentum", "Re2TAL"),
    "revwire.run.exact": ("Grid",),
    "revwire.run.streams": ("Streams",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
