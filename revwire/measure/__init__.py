"""Memory of a training step: measured, estimated, and fitted into a budget."""

from revwire.measure.live_bytes import LiveBytes
from revwire.measure.step import StepMemory, measure_step, training_step
from revwire.measure.timing import Timing, time_alternating

__all__ = ["LiveBytes", "StepMemory", "Timing", "measure_step", "time_alternating", "training_step"]
