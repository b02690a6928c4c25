"""Memory of a training step: measured here; the names a user needs, handed on."""

from revwire.memory.measure import (
    LiveBytes,
    StepMemory,
    Timing,
    measure_step,
    time_alternating,
    training_step,
)

__all__ = ["LiveBytes", "StepMemory", "Timing", "measure_step", "time_alternating", "training_step"]
