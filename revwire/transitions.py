"""The blocks between chains (stem, downsampling, last norm), run again in backward from their stored input.

They are not reversible, so what enters them is kept, as activation checkpointing does, under the same conditions as a
step's second run (random state, BatchNorm statistics moved once). Where a chain ends in such a block, what is kept is
the chain's last pair, which backward needs anyway, and not the merged tensor beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import not_compiled
from revwire.branch import Branch
from revwire.errors import ReplayError
from revwire.frame import Frame, original_forward, storage
from revwire.probe import sources
from revwire.streams import Streams, is_streams, settle
from revwire.structure import tree_flatten, tree_unflatten
from revwire.tape import Link, Tape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import fx

    from revwire.frame import Identity
    from revwire.plans import Plan
    from revwire.probe import Probe
    from revwire.program import Options
    from revwire.tape import Around, Pass


def find_transitions(plan: Plan, found: Probe) -> Plan:
    """The plan with the outermost modules beside its chains chosen to run again, those of more than one operation each.

    A single operation would keep its input either way; but where that is the end of a chain (a last norm), it is the
    chain's pair, and kept already: such a chain hands it on as it is.
    """
    planned = [r for step in plan.steps if (r := found.residual(step)) is not None]
    branches = {node for r in planned for node in (*r.inside, *r.post)}
    around = {path for step in plan.steps for path in _parents(step.module)}
    last = ((i, found.residual(chain.steps[-1])) for i, chain in enumerate(plan.chains))
    ends = {residual.leaving: i for i, residual in last if residual is not None}
    chosen: dict[str, bool] = {}
    entered: dict[str, set[int]] = {}
    for frame in found.frames:
        outer = {*_parents(frame.path)} - {frame.path}
        if frame.path in around or frame.graph is None or any(chosen.get(path) for path in outer):
            continue
        if any(caller in branches for caller in frame.callers) or _changes_inputs(frame):
            chosen[frame.path] = False
            continue
        chains = {ends[at] for node in _inputs(frame) for at in _sources(node, found) if at in ends}
        entered.setdefault(frame.path, set()).update(chains)
        chosen[frame.path] = (bool(frame.module._modules) or bool(chains)) and chosen.get(frame.path, True)
    for path, at in _single(found, around, branches):
        # modules of torch itself have no frame of their own
        if at in ends:
            chosen.setdefault(path, True)
            entered.setdefault(path, set()).add(ends[at])
    recomputed = tuple(path for path, is_chosen in chosen.items() if is_chosen)
    handing = set[int]().union(*(entered[path] for path in recomputed))
    opened = tuple(replace(chain, open=i in handing) for i, chain in enumerate(plan.chains))
    return replace(plan, chains=opened, recomputed=recomputed)


def _parents(path: str) -> Iterator[str]:
    """A module's path and those of all modules around it."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _inputs(frame: Frame) -> list[fx.Node]:
    assert frame.graph is not None
    return [n for n in frame.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("value"), Tensor)]


def _changes_inputs(frame: Frame) -> bool:
    assert frame.graph is not None
    given = {storage(n.meta["value"]) for n in _inputs(frame)}
    return any(given & n.meta["changes"] for n in frame.graph.nodes if "changes" in n.meta)


def _sources(node: fx.Node, found: Probe) -> Iterator[Identity]:
    return sources((id(node.meta["value"]), node.meta["version"]), found.origins)


def _single(found: Probe, around: set[str], branches: set[fx.Node]) -> Iterator[tuple[str, Identity]]:
    """Children without code of their own that the frames around the chains call: their path, what they are given."""
    for frame in found.frames:
        if frame.path not in around or frame.graph is None:
            continue
        for node in frame.graph.nodes:
            alone = node.op == "call_module" and len(node.all_input_nodes) == 1 and node not in branches
            if not alone or node.meta.get("changes"):
                continue
            path = f"{frame.path}.{node.target}".lstrip(".")
            if not frame.module.get_submodule(str(node.target))._modules:
                for at in _sources(node.all_input_nodes[0], found):
                    yield path, at


class Recomputed:
    """What a transition runs in place of its forward: the same, keeping its input alone.

    Args:
        path: The module's path, for messages.
        options: Those of the rewired model.
    """

    def __init__(self, path: str, options: Options) -> None:
        self.path, self.options = path, options

    @not_compiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward."""
        forward = original_forward(module)
        leaves, spec = tree_flatten((args, kwargs), is_leaf=is_streams)
        first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor | Streams)), None)
        dropping = self.options.replay and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        if not dropping or first is None:
            return forward(*settle(args), **settle(kwargs))
        trunk = leaves[first]
        others = tuple(settle(leaf) for i, leaf in enumerate(leaves) if i != first)

        def run(x: Tensor, *rest: Any) -> Any:
            again, named = tree_unflatten([*rest[:first], x, *rest[first:]], spec)
            return forward(*again, **named)

        if isinstance(trunk, Streams) and not trunk.left:
            merge = trunk.merger()

            def run_on_pair(current: Tensor, previous: Tensor, *rest: Any) -> Any:
                return run(merge(previous, current), *rest)

            return self._keeping(module, run_on_pair, trunk.current, (trunk.previous, *others))
        return self._keeping(module, run, settle(trunk), others)

    def _keeping(
        self, module: nn.Module, function: Callable[..., Any], x: Tensor, sides: tuple[Any, ...]
    ) -> Any:
        return _Kept(Branch(self.path, function, [module]), x).run(x, sides, drop=True)


class _Kept(Link):
    """A step without a chain: what it runs on is kept, and not reconstructed by a step after it."""

    def __init__(self, branch: Branch, x: Tensor) -> None:
        super().__init__(Tape(branch.name), 0, branch, bottom=True)
        self.keep(x)

    def _take(self, now: Pass, *, last: bool) -> Around:  # noqa: ARG002 - as the links of a chain
        assert self.anchor is not None
        x, version = self.anchor
        if x._version != version:
            raise ReplayError(
                f"{self.branch.name}: its input has been modified by an inplace operation, and backward needs it as it "
                "was; use the out-of-place form of that operation"
            )
        return x, None
