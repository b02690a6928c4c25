"""Whether a branch may run slice by slice, proven by trying it: a slice must come out as it does in the whole.

Samples of a batch are tried first; where there is one sample only (a long video), any other dimension that the branch
treats position by position, as an MLP does its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from revwire._torch import AnyBatchNorm
from revwire.planning.trial import DIFFERS, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from revwire.find.residual import Residual
    from revwire.run.slices import Slices

_SHARES = "its branch hands out inner values that other code reads"


def slices_for(residual: Residual, trained: Residual | None = None) -> tuple[int, tuple[bool, ...]] | str:
    """Along which dimension a residual's branch may be cut, with which side inputs; or in words why it may not.

    Runs copies of what the branch calls on noise of the shapes that the planning run saw, but for three samples,
    three times for each dimension tried, in eval mode and in train mode; nothing of the model changes.

    Args:
        residual: What to cut.
        trained: The same residual as training runs it.
    """
    if (why_not := _refused(residual)) is not None:
        return why_not
    trial = Trial(residual, trained)
    told = DIFFERS
    for dim in _dimensions(trial.shape):
        for sides in trial.ways(dim):
            if (why_not := trial.differs(dim, sides)) is None:
                return trial.changes(dim, sides) or (dim, sides)
            # that it can be cut in evaluation is what a reader would wonder about
            told = told if why_not == DIFFERS else why_not
    return told


def refusal_of(
    residual: Residual, cut: Slices | None, trained: Residual | None = None, *, inside: bool
) -> str | None:
    """Why a residual's branch cannot be cut in one given way, None if it can: for plans that were made elsewhere."""
    if inside and (why_not := attention_refusal(residual, trained)) is not None:
        return why_not
    if cut is None:
        return None if inside else DIFFERS
    if (why_not := _refused(residual)) is not None:
        return why_not
    trial = Trial(residual, trained)
    if not 0 <= cut.dim < len(trial.shape) or len(cut.sides) != len(residual.sides):
        return "the plan cuts it along a dimension, or with side inputs, that it has not"
    return trial.differs(cut.dim, cut.sides) or trial.changes(cut.dim, cut.sides)


def attention_refusal(residual: Residual, trained: Residual | None = None) -> str | None:
    """Why the attention in a residual's branch cannot run in slices, None if it can.

    Runs the branch on noise, forward and backward, with and without: what comes out, and all gradients, must agree.
    """
    if residual.shared:
        return _SHARES
    return Trial(residual, trained).refuses_attention()


def _refused(residual: Residual) -> str | None:
    if residual.shared:
        return _SHARES
    for path in residual.modules:
        child = residual.frame.module.get_submodule(path)
        for name, module in child.named_modules(prefix=path):
            if isinstance(module, AnyBatchNorm):
                return f"{name} ({type(module).__name__}) mixes samples in training"
            if getattr(module, "mode", None) == "batch":
                return f"{name} ({type(module).__name__}) draws one number for the whole batch"
    return None


def mixes_now(modules: Sequence[nn.Module]) -> bool:
    """Whether a branch that could be cut would mix samples in the mode it runs in."""
    return any(isinstance(m, AnyBatchNorm) and m.training for child in modules for m in child.modules())


def _dimensions(shape: Sequence[int]) -> list[int]:
    """The dimensions to try, best first: samples, if there are several; then the longest."""
    rest = sorted(range(1, len(shape)), key=lambda dim: -shape[dim])
    return [0, *rest] if shape[0] > 1 else [*rest, 0]
