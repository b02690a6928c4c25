"""The peak of one training step before it is run: parameters, gradients, optimizer state, activations, temporaries.

The step (forward, backward, optimizer) runs as it would, on fake tensors: every operation tells the shapes of what it
makes and computes nothing, so neither an accelerator nor memory is needed. `LiveBytes` counts what is alive. What it
cannot see, scratch memory inside one kernel and an allocator's fragmentation, is not in the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire.errors import RevwireError
from revwire.measure.fake_step import Optimization, TrainingStep, trainable
from revwire.measure.step import Loss, mean_square
from revwire.measure.strategies import STRATEGIES
from revwire.planning.dials import Dials
from revwire.rewrite.swap import Recording, call_arguments

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from revwire.measure.strategies import Strategy

Optimizer = str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None

_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}
COMMON = ("plain", "checkpoint", "rewired", "transitions", "lean")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_MOST = 2**20
_SHOWN = 4


@dataclass(frozen=True)
class Estimate:
    """One training step done in one way, in bytes.

    Attributes:
        strategy: The way, by name.
        peak: Most bytes alive at once in forward, backward and optimizer step, the model and its state included.
        model: Parameters and buffers.
        gradients: All gradients, when they are there.
        optimizer: The optimizer's state.
        inputs: What the model is called with.
        activations: Activations and temporaries alone, at the moment of forward and backward when they are most.
        where: What runs when the peak is reached: a module's path, or a phase of the step.
        alive: What is alive then: (what, bytes), the largest first.
        fits: The largest size of the varied dimension whose step fits, None where not asked for; 0 if none does.
        failure: Why there are no figures, if there are none.
    """

    strategy: str
    peak: int = 0
    model: int = 0
    gradients: int = 0
    optimizer: int = 0
    inputs: int = 0
    activations: int = 0
    where: str = ""
    alive: tuple[tuple[str, int], ...] = ()
    fits: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class Estimates:
    """The same step done in several ways; prints as a table.

    Attributes:
        model: Class name of the model.
        inputs: Shapes of the tensors that its forward takes.
        optimizer: Name of the optimizer.
        autocast: dtype of the forward's autocast, `""` for none.
        accumulate: Whether gradients were there when the step began.
        limit: The bytes that `Estimate.fits` refers to, None where not asked for.
        varied: The dimension of the first input that it varies.
        rows: One for each way.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    optimizer: str
    autocast: str
    accumulate: bool
    limit: int | None
    varied: int
    rows: tuple[Estimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """The estimates as JSON-ready dicts and lists."""
        return asdict(self)

    def __getitem__(self, strategy: str) -> Estimate:
        """The row of a strategy."""
        return next(row for row in self.rows if row.strategy == strategy)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        amp = f", autocast {self.autocast}" if self.autocast else ""
        kept = ", gradients there before" if self.accumulate else ""
        table = Table(
            title=f"{escape(self.model)}, input {shapes}, {self.optimizer}{amp}{kept}: one training step, GiB",
            title_justify="left",
        )
        table.add_column("strategy", overflow="fold")
        for heading in ("peak", "activations", "model", "gradients", "optimizer"):
            table.add_column(heading, justify="right")
        if self.limit is not None:
            table.add_column(f"fits {self.limit / 2**30:.3g} GiB", justify="right")
        table.add_column("peak reached in, and what is alive there", overflow="fold")
        for row in self.rows:
            sizes = row.peak, row.activations, row.model, row.gradients, row.optimizer
            cells = [f"{size / 2**30:.2f}" if not row.failure else "-" for size in sizes]
            if self.limit is not None:
                cells.append("-" if row.fits is None else str(row.fits))
            alive = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in row.alive[:_SHOWN])
            table.add_row(escape(row.strategy), *cells, escape(row.failure or f"{row.where}: {alive}"))
        yield table


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
    if any(hasattr(type(module), "revwire_original") for module in model.modules()):
        raise RevwireError(f"{type(model).__name__} is rewired already; estimate the model as it was built")
    say = progress or (lambda _: None)
    named = strategies if isinstance(strategies, Mapping) else {name: name for name in strategies}
    args, kwargs = call_arguments(model, example_inputs)
    bytes_ = None if limit is None else size_of(limit)
    for strategy in named.values():
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            raise RevwireError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}")
    place = _device_of(model) if device is None else _device(device)
    made = _optimizer(optimizer)
    step = TrainingStep(args, kwargs, made, loss_fn or mean_square, autocast, place, accumulate)
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


def size_of(text: str | int) -> int:
    """A number of bytes from `"24GiB"`, `"24G"`, `"800 MiB"` or a number.

    Raises:
        RevwireError: it is none.
    """
    if isinstance(text, int):
        return text
    matched = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if matched is None:
        raise RevwireError(f"{text!r} is no size; write 24GiB, 800MiB or a number of bytes")
    return int(float(matched[1]) * _UNITS[matched[2]])


def in_words(size: float) -> str:
    """A number of bytes as a person writes it: `1.50 GiB`, `37.2 MiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


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
        return self._step.prepared(self._model, strategy)

    def _rewired(self, options: Mapping[str, Any], model: nn.Module) -> nn.Module:
        turned = {f.name for f in fields(Dials)} & options.keys()
        others = {
            name: value for name, value in options.items() if name not in {*turned, "compile", "overlap"}
        }
        key = repr(sorted(others.items()))
        if key not in self._recordings:
            model_on_meta, inputs = self._step.on_meta(self._model)
            self._recordings[key] = Recording.of(model_on_meta, inputs, **others)
        recording = self._recordings[key]
        dials = Dials(**{name: options[name] for name in turned})
        chosen = dials.turned(recording.fresh, recording.found)
        return recording.rewire(model, chosen, overlap=options.get("overlap", False))


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


def _device_of(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _device(named: str | torch.device) -> torch.device:
    """Fake tensors of a device compute nothing, but torch asks the device itself about its streams."""
    try:
        place = torch.device(named)
        there = torch.get_device_module(place).is_available()
    except RuntimeError as error:
        raise RevwireError(f"{named!r} is no device that torch knows ({error}); estimate for cpu") from None
    if not there:
        raise RevwireError(f"there is no {place.type} device here; estimate for cpu")
    return place


def _optimizer(named: Optimizer) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None:
    if not isinstance(named, str):
        return named
    if named.lower() not in _OPTIMIZERS:
        raise RevwireError(
            f"{named!r} is not one of {', '.join(_OPTIMIZERS)}; pass a function from parameters to one"
        )
    return _OPTIMIZERS[named.lower()]
