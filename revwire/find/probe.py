"""One run of a model on fake tensors, every frame traced as it goes, and all residual additions that it ran through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from revwire._torch import DataDependentOutputException
from revwire.errors import RewireError
from revwire.find.additions import find_residuals
from revwire.find.blocks import find_blocks, is_sequence
from revwire.find.training import Training, record_training
from revwire.trace.patches import one_at_a_time
from revwire.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from revwire.find.residual import Residual
    from revwire.trace.frame import Frame, Identity
    from revwire.trace.origins import Origins


class Named(Protocol):
    """What names a residual: a planned step does."""

    @property
    def module(self) -> str:
        """Path of the module whose frame holds it."""

    @property
    def residual(self) -> int:
        """Which of the frame's residuals it is."""

    @property
    def block(self) -> bool:
        """Whether it is a block of an `nn.Sequential`."""

    @property
    def post(self) -> str | None:
        """What moves into its branch after the sum."""


@dataclass(frozen=True)
class Probe:
    """A recorded run.

    Attributes:
        model: The model that ran.
        frames: Every module call, in running order.
        residuals: All residual additions, in running order; a module called twice has each twice.
        notes: Sums that look like residuals and are none: (module path, reason).
        origins: Which tensor each rearranged, or cut and joined, tensor came from.
        training: The same model's run in train mode.
    """

    model: nn.Module
    frames: tuple[Frame, ...]
    residuals: tuple[Residual, ...]
    notes: tuple[tuple[str, str], ...]
    origins: Origins
    training: Training

    @cached_property
    def blocks(self) -> tuple[Residual, ...]:
        """Children of `nn.Sequential`s that can be steps of a coupling with b != 0, in running order."""
        return tuple(block for f in self.frames if f.graph is not None for block in find_blocks(f))

    @cached_property
    def sliceable(self) -> dict[tuple[Any, ...], tuple[int, tuple[bool, ...]] | str]:
        """What `revwire.planning.slicing` has proven of each kind of branch so far."""
        return {}

    @cached_property
    def attention_refusals(self) -> dict[tuple[Any, ...], str | None]:
        """Why the attention of each kind of branch cannot run in slices, None where it can, as far as it was asked."""
        return {}

    @cached_property
    def _additions(self) -> dict[tuple[str, int], Residual]:
        return {key_of(r): r for r in self.residuals if not r.refused}

    @cached_property
    def _whole(self) -> dict[tuple[str, int], Residual]:
        return {key_of(r): r for r in self.blocks if not r.refused}

    def residual(self, step: Named) -> Residual | None:
        """What a planned step runs, with what moves into its branch; None if this model has no such residual."""
        found = (self._whole if step.block else self._additions).get((step.module, step.residual))
        return None if found is None else found.with_post(step.post) or found


def sources(value: Identity, origins: dict[Identity, Identity]) -> Iterator[Identity]:
    """A value, and those that it is a rearrangement of, the nearest first."""
    at: Identity | None = value
    while at is not None:
        yield at
        at = origins.get(at)


@one_at_a_time
def probe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Probe:
    """Run `model` on fake tensors, in eval mode and in train mode, and find all residual additions.

    They are those of eval mode, so that layers dropped at random while training are seen. The model keeps its mode,
    parameters, buffers, attributes and random state, and no memory is taken for activations. Only a model whose code
    decides by the numbers in a tensor is run for real.

    Raises:
        RewireError: the model does not run on these inputs.
    """
    try:
        recorder = _evaluated(model, args, kwargs)
    except Exception as error:
        raise RewireError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}; "
            "pass example_inputs that its forward takes"
        ) from error
    residuals: list[Residual] = []
    notes: list[tuple[str, str]] = []
    for frame in recorder.frames:
        if frame.graph is not None:
            found, reasons = find_residuals(frame)
            residuals.extend(found)
            notes.extend((frame.path, reason) for reason in reasons)
    residuals.sort(key=lambda r: r.total.meta["order"])
    residuals = _with_norms(residuals, recorder.origins)
    wanted: dict[str, Frame] = {}
    for frame in (r.frame for r in residuals if not r.refused):
        wanted.setdefault(frame.path, frame)
    for frame in recorder.frames:
        if frame.graph is not None and is_sequence(frame.module):
            wanted.setdefault(frame.path, frame)
    trained = record_training(recorder, wanted, args, kwargs) if wanted else Training()
    return Probe(model, tuple(recorder.frames), tuple(residuals), tuple(notes), recorder.origins, trained)


def _with_norms(residuals: list[Residual], origins: dict[Identity, Identity]) -> list[Residual]:
    """The residuals of post-norm blocks with their norm moved into the branch: the next one's trunk is its output.

    The last block of a kind goes with the others: what its norm feeds is no residual's trunk.
    """
    entered = {at for residual in residuals for at in sources(residual.entering, origins)}
    moved: dict[tuple[type, int], str | None] = {}
    for residual in residuals:
        if residual.leaving not in entered:
            for count in range(len(residual.following), 0, -1):
                longer = replace(residual, post=residual.following[:count])
                if longer.leaving in entered:
                    moved[type(residual.frame.module), residual.index] = longer.post_name
                    break
    return [
        (r.with_post(moved[kind]) or r) if (kind := (type(r.frame.module), r.index)) in moved else r
        for r in residuals
    ]


def _evaluated(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorder:
    try:
        return _recorded(model, args, kwargs, real=False)
    except DataDependentOutputException:
        return _recorded(model, args, kwargs, real=True)
    except Exception as error:  # noqa: BLE001 - code of the model's own
        # code that only takes real tensors; where these do not do either, the first error is the one to tell
        try:
            return _recorded(model, args, kwargs, real=True)
        except Exception:  # noqa: BLE001 - the model does not run
            raise error from None


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, real: bool) -> Recorder:
    recorder = Recorder(model, real=real, modes=dict.fromkeys(model.modules(), False))
    args, kwargs = recorder.example((args, kwargs))
    with recorder.recording():
        model(*args, **kwargs)
    return recorder


def key_of(residual: Residual) -> tuple[str, int]:
    """What tells the residuals of a model apart: the path of their module, and which of its frame they are."""
    return residual.frame.path, residual.index
