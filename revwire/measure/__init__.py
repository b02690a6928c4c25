"""Memory of a training step: measured, estimated, and fitted into a budget."""

from revwire.measure.step import (
    LiveBytes,
    StepMemory,
    Timing,
    measure_step,
    time_alternating,
    training_step,
)

__all__ = ["LiveBytes", "StepMemory", "Timing", "measure_step", "time_alternating", "training_step"]
