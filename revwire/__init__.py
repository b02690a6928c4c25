"""revwire: rewire pretrained residual networks into reversible ones and train them with a memory-free backward.

Names are imported when they are first used, so that the command answers `--help` without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revwire.checkpoint import convert, load, save, to_original
    from revwire.coupling import BDIA, Coupling, Dr2Net, Momentum, Re2TAL
    from revwire.errors import CheckpointError, ReplayError, RevwireError, RewireError
    from revwire.fixed import Grid
    from revwire.memory.budget import Budget
    from revwire.memory.estimate import Estimate, Estimates, estimate
    from revwire.plans import Chain, Joined, Plan, Skipped, Step
    from revwire.report import Check, Report
    from revwire.rewiring import plan, rewire
    from revwire.schedule import Dr2NetSchedule
    from revwire.streams import Streams
    from revwire.surgery import plan_of, unwire, unwired
    from revwire.verification import verify

__version__ = "0.1.0"

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
    "revwire.checkpoint": ("convert", "load", "save", "to_original"),
    "revwire.coupling": ("BDIA", "Coupling", "Dr2Net", "Momentum", "Re2TAL"),
    "revwire.errors": ("CheckpointError", "ReplayError", "RevwireError", "RewireError"),
    "revwire.fixed": ("Grid",),
    "revwire.memory.budget": ("Budget",),
    "revwire.memory.estimate": ("Estimate", "Estimates", "estimate"),
    "revwire.plans": ("Chain", "Joined", "Plan", "Skipped", "Step"),
    "revwire.report": ("Check", "Report"),
    "revwire.rewiring": ("plan", "rewire"),
    "revwire.schedule": ("Dr2NetSchedule",),
    "revwire.streams": ("Streams",),
    "revwire.surgery": ("plan_of", "unwire", "unwired"),
    "revwire.verification": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
