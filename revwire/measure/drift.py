"""How far the inputs of chains that backward reconstructs are from the true ones (drift)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.errors import RewireError
from revwire.measure.specimen import seed
from revwire.measure.step import mean_square
from revwire.measure.watching import around_steps
from revwire.printing import Printed
from revwire.pytree import tree_leaves
from revwire.rewrite.wired import with_options
from revwire.run.exact import exact_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import Console, ConsoleOptions, RenderResult

    from revwire.planning.plan import Chain, Plan
    from revwire.run.options import Options
    from revwire.run.streams import Streams


@dataclass(frozen=True)
class Drift:
    """One chain's reconstructed input against the true one, in train mode: largest difference over largest value.

    Attributes:
        chain: Name of the chain.
        steps: How many steps are undone to get there.
        float32: With float streams.
        bfloat16: The same under autocast to bfloat16 (streams stay float32).
        exact: With exact streams; None where the coupling cannot be exact. All are None where nothing of the chain
            ran again: its coupling is not reversible, or its first branches call no module.
    """

    chain: str
    steps: int
    float32: float | None
    bfloat16: float | None
    exact: float | None


@dataclass(frozen=True)
class Drifts(Printed):
    """The drift of all chains; prints as a table."""

    chains: tuple[Drift, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        if not self.chains:
            return
        table = Table(title="reconstructed chain inputs, relative difference", title_justify="left")
        table.add_column("chain", overflow="fold")
        for heading in ("steps", "float32", "bf16 autocast", "exact"):
            table.add_column(heading, justify="right")
        for drift in self.chains:
            figures = (drift.float32, drift.bfloat16, drift.exact)
            shown = ("-" if figure is None else f"{figure:.2g}" for figure in figures)
            table.add_row(escape(drift.chain), str(drift.steps), *shown)
        yield table


def drifts(model: nn.Module, options: Options, plan: Plan, args: Any, kwargs: Any) -> Drifts:
    """Measure the drift of every chain of a rewired model, on copies, by one training step in each precision."""
    # slices would be told apart by nothing, and reconstruct the same
    options = replace(options, sliced=False)
    float_streams = replace(options, exact=False)
    ways = [(float_streams, False), (float_streams, True)]
    try:
        exact = options.exact if options.exact is not False else exact_of(True, options.coupling)
        ways.append((replace(options, exact=exact), False))
    except RewireError:
        pass
    found = [_differences(with_options(model, o), plan.chains, args, kwargs, autocast=a) for o, a in ways]
    found += [[None] * len(plan.chains)] * (3 - len(ways))
    chains = zip(plan.chains, *found, strict=True)
    return Drifts(tuple(Drift(c.name, len(c.steps), *figures) for c, *figures in chains))


def _differences(
    model: nn.Module, chains: Iterable[Chain], args: Any, kwargs: Any, *, autocast: bool
) -> list[float | None]:
    """For each chain, what the first module of its first branches was given in forward and in backward."""
    first: dict[int, list[tuple[int, Tensor]]] = {}
    last: dict[int, list[Tensor]] = {}
    backward = False
    running = [0]
    # a module that several chains begin with is watched once; its calls are told apart by their order
    watched = [_first_module(model, chain) for chain in chains]

    def watch(module: nn.Module, given: Any, named: Any) -> None:
        x = next((leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, Tensor)), None)
        if x is not None and backward:
            last.setdefault(id(module), []).append(x.detach().clone())
        elif x is not None:
            first.setdefault(id(module), []).append((running[0], x.detach().clone()))

    for module in {id(m): m for m in watched if m is not None}.values():
        module.register_forward_pre_hook(watch, with_kwargs=True)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    model.train()

    def counted(step: Callable[[], Streams], *_: Any) -> Streams:
        running[0] += 1
        return step()

    seed(3)
    with around_steps(counted), torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = mean_square(model(*args, **kwargs))
    backward = True
    loss.backward()  # type: ignore[no-untyped-call]
    return [None if m is None else _drift_of(first.get(id(m), []), last.get(id(m), [])) for m in watched]


def _drift_of(first: list[tuple[int, Tensor]], last: list[Tensor]) -> float | None:
    """The first call of a module in forward against its first one in the last second run, the same step's."""
    if not first or not last:
        return None
    step, given = first[0]
    # a branch may call it several times, as often when it runs again; of a run that stops early, as often as it got
    calls = min(sum(1 for at, _ in first if at == step), len(last))
    return _difference(given, last[-calls])


def _first_module(model: nn.Module, chain: Chain) -> nn.Module | None:
    for step in chain.steps:
        if step.branch:
            return model.get_submodule(f"{step.module}.{step.branch[0]}".lstrip("."))
    return None


def _difference(true: Tensor, found: Tensor) -> float:
    # exact to the bit before anything is rounded
    if torch.equal(true, found):
        return 0.0
    scale = float(true.abs().max()) or 1.0
    return float((true.double() - found.double()).abs().max()) / scale
