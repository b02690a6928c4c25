"""revwire: rewire pretrained residual networks into reversible ones and train them with a memory-free backward."""

from __future__ import annotations

from revwire.checkpoint import convert, load, save
from revwire.coupling import BDIA, Coupling, Dr2Net, Momentum, Re2TAL
from revwire.errors import CheckpointError, ReplayError, RevwireError, RewireError
from revwire.fixed import Grid
from revwire.memory.budget import Budget
from revwire.memory.estimate import Estimate, Estimates, estimate
from revwire.plan import Chain, Plan, Skipped, Step
from revwire.report import Check, Report
from revwire.rewiring import plan, rewire
from revwire.schedule import Dr2NetSchedule
from revwire.streams import Streams
from revwire.surgery import plan_of, unwire
from revwire.verify import verify

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
    "unwire",
    "verify",
]
