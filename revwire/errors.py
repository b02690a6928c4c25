"""The errors revwire raises: one root, and the few kinds a caller would want to catch."""

from __future__ import annotations


class RevwireError(Exception):
    """Root of every error revwire raises on purpose. The message says what was found, where, and what to do."""


class RewireError(RevwireError):
    """A model cannot be planned, rewired or unwired as asked; the model is left as it was."""


class ReplayError(RevwireError, RuntimeError):
    """A branch cannot be run again in backward as it ran in forward, so its gradients would be wrong."""


class CheckpointError(RevwireError):
    """A checkpoint file cannot be read, does not fit its architecture, or cannot be written."""
