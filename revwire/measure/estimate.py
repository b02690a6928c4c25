"""The peak of one training step before it is run: parameters, gradients, optimizer state, activations, temporaries.

The step (forward, backward, optimizer) runs as it would, on fake tensors: every operation tells the shapes of what it
makes and computes nothing, so neither an accelerator nor memory is needed. `LiveBytes` counts what is alive. What it
cannot see, scratch memory inside one kernel and an allocator's fragmentation, is not in the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError
from revwire.measure.estimates import Estimate, Estimates
from revwire.measure.fake_step import Optimization, Optimizer, TrainingStep
from revwire.measure.meter import trainable
from revwire.measure.rewired import split_dials
from revwire.measure.strategies import STRATEGIES, treated
from revwire.printing import size_of
from revwire.rewrite.recording import Recording
from revwire.rewrite.wired import is_wired

if TYPE_CHECKING:
    import torch
    from torch import nn

    from revwire.measure.step import Loss
    from revwire.measure.strategies import Strategy


COMMON = ("plain", "checkpoint", "rewired", "transitions", "lean")
_MOST = 2**20


def estimate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    strategies: Iterable[str] | Mapping[str, Strategy] = COMMON,
    optimizer: Optimizer = "adamw",
    loss_fn: Loss | None = None,
    autocast: torch.dtype | None = None,
    accumulate: bool = False,
    limit: str | int | None = None,
    vary: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[str], None] | None = None,
) -> Estimates:
    """What one training step needs, for several ways of doing it; computes nothing and takes no memory.

    Args:
        model: The model as it was built, on any device; the meta device will do.
        example_inputs: What its forward takes, of the shapes of the step, as for `revwire.plan`; tensors may be fake.
        strategies: Names of `revwire.measure.strategies.STRATEGIES`; or names of one's own to keyword arguments of
            `revwire.rewire`.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"momentum"`, a function from parameters to an optimizer, or None.
        loss_fn: From the model's output to a scalar; the mean square of all outputs if not given.
        autocast: Run the forward under autocast to this dtype.
        accumulate: Gradients are there when the step begins, as in gradient accumulation, after
            `zero_grad(set_to_none=False)` and in DDP with `gradient_as_bucket_view=True`. If not, they come as
            activations go, and the peak is lower.
        limit: A size, in bytes or such as `"24GiB"`: find the largest input whose step fits.
        vary: Which dimension of the first input tensor to vary for it: 0, the batch.
        device: Type of the device that the step is for, as kernels differ; the model's own if not given.
        progress: Called with what is being estimated.

    Raises:
        RevwireError: the model is rewired already, does not run on the inputs, or a name or size makes no sense.
    """
    # long: each argument is told
    if any(map(is_wired, model.modules())):
        raise RevwireError(f"{type(model).__name__} is rewired already; estimate the model as it was built")
    say = progress or (lambda _: None)
    named = strategies if isinstance(strategies, Mapping) else {name: name for name in strategies}
    bytes_ = None if limit is None else size_of(limit)
    for strategy in named.values():
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            raise RevwireError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}")
    step = TrainingStep.of(
        model,
        example_inputs,
        optimizer=optimizer,
        loss_fn=loss_fn,
        autocast=autocast,
        accumulate=accumulate,
        device=device,
    )
    shared = _Shared(step, model)
    rows = []
    for name, strategy in named.items():
        say(name)
        rows.append(_row(name, strategy, shared, step, bytes_, vary))
    shapes = tuple(tuple(tensor.shape) for tensor in step.tensors)
    called = (
        optimizer if isinstance(optimizer, str) else "no optimizer" if optimizer is None else "own optimizer"
    )
    amp = "" if autocast is None else str(autocast).removeprefix("torch.")
    return Estimates(type(model).__name__, shapes, called, amp, accumulate, bytes_, vary, tuple(rows))


class _Shared:
    """What several ways of doing the step have in common.

    Rewired models that differ in their dials alone share one recorded run; optimizers of the same tensors one step.
    """

    def __init__(self, step: TrainingStep, model: nn.Module) -> None:
        self._step, self._model = step, model
        self._recordings: dict[str, Recording] = {}
        self._optimizations: dict[tuple[Any, ...], Optimization] = {}

    def optimization(self, prepared: nn.Module) -> Optimization:
        """What the optimizer of a model made ready takes."""
        key = tuple((p.shape, p.stride(), p.dtype) for p in trainable(prepared))
        if key not in self._optimizations:
            self._optimizations[key] = self._step.optimized(prepared)
        return self._optimizations[key]

    def prepared(self, strategy: Strategy) -> nn.Module:
        """A copy of the model, made ready for one way of doing the step."""
        options = STRATEGIES.get(strategy) if isinstance(strategy, str) else strategy
        if isinstance(options, Mapping) and not options.keys() & {"plan", "budget"}:
            strategy = partial(self._rewired, options)
        return treated(*self._step.on_meta(self._model), strategy)

    def _rewired(self, options: Mapping[str, Any], model: nn.Module) -> nn.Module:
        dials, choice = split_dials(options)
        overlap = choice.pop("overlap", False)
        choice.pop("check", None)
        fallback = choice.pop("fallback", "error")
        choice.pop("compile", None)  # fake tensors run branches as they are
        key = repr(sorted(choice.items()))
        if key not in self._recordings:
            model_on_meta, inputs = self._step.on_meta(self._model)
            self._recordings[key] = Recording.of(model_on_meta, inputs, **choice)
        recording = self._recordings[key]
        chosen = dials.turned(recording.fresh, recording.found)
        return recording.rewire(model, chosen, overlap=overlap, fallback=fallback)


def _row(
    name: str, strategy: Strategy, shared: _Shared, step: TrainingStep, limit: int | None, vary: int
) -> Estimate:
    size = step.varied(vary) if limit is not None else 0
    try:
        prepared = shared.prepared(strategy)
        optimization = shared.optimization(prepared)
        found = Estimate(name, **vars(step.run(prepared, optimization)))
        if limit is None:
            return found
        # images and clips come in multiples of a patch; samples do not
        unit = 1 if vary == 0 else size & -size
        peaks = {size // unit: found.peak}

        def peak(units: int) -> int:
            if units not in peaks:
                peaks[units] = step.resized(vary, units * unit).run(prepared, optimization).peak
            return peaks[units]

        return replace(found, fits=_largest(peak, size // unit, limit) * unit)
    except RevwireError as error:
        return Estimate(name, failure=str(error))


def _largest(peak: Callable[[int], int], start: int, limit: int) -> int:
    """The largest number whose peak is within the limit, by lines through what is known: peaks grow almost evenly.

    Almost: they may be flat at first, where the optimizer's step is the peak, and bend where that changes. After a line
    that did not halve what is left comes a halving, or, as long as everything fits, a doubling.
    """
    known = {start: peak(start), 2 * start: peak(2 * start)}
    before = 2 * _MOST
    while True:
        low = max((n for n, size in known.items() if size <= limit), default=0)
        high = min((n for n, size in known.items() if size > limit), default=_MOST)
        if high - low <= 1:
            return low
        if 2 * (high - low) <= before:
            around = [n for n in (low, high) if n in known]
            ends = sorted(known)[-2:] if high not in known else sorted(known)[:2]
            guess = _meeting(known, around if len(around) == 2 else ends, limit)
        else:
            guess = (low + high) // 2 if high in known else 2 * low
        before = high - low
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = peak(guess)


def _meeting(known: Mapping[int, int], ends: Sequence[int], limit: int) -> int:
    """Where the line through two points meets the limit; twice as far out where it does not rise."""
    a, b = ends
    rise = known[b] - known[a]
    return a + (limit - known[a]) * (b - a) // rise if rise > 0 else 2 * b
