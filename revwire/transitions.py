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

from revwire._torch import at_end_of_backward, backward_pass, not_compiled
from revwire.branch import Branch, BranchRun
from revwire.errors import ReplayError
from revwire.frame import Frame, original_forward, storage
from revwire.streams import Streams, settle
from revwire.structure import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from revwire.frame import Identity
    from revwire.plan import Plan
    from revwire.probe import Probe
    from revwire.program import Options


def find_transitions(plan: Plan, found: Probe) -> Plan:
    """The plan with the outermost modules beside its chains chosen to run again, those of more than one operation each.

    A single operation would keep its input either way; but where that is the end of a chain (a last norm), it is the
    chain's pair, and kept already: such a chain hands it on as it is.
    """
    residuals = {(r.frame.path, r.index): r for r in (*found.residuals, *found.blocks)}
    planned = [residuals[step.module, step.residual] for step in plan.steps]
    branches = {node for r in planned for node in (*r.inside, *r.post)}
    around = {path for step in plan.steps for path in _parents(step.module)}
    ends = {residuals[c.steps[-1].module, c.steps[-1].residual].leaving: i for i, c in enumerate(plan.chains)}
    chosen: dict[str, bool] = {}
    entered: dict[str, set[int]] = {}
    for frame in found.frames:
        outer = {*_parents(frame.path)} - {frame.path}
        if frame.path in around or frame.graph is None or any(chosen.get(path) for path in outer):
            continue
        if any(caller in branches for caller in _calls(frame)) or _changes_inputs(frame):
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


def _calls(frame: Frame) -> Iterator[fx.Node]:
    around: Frame | None = frame
    while around is not None and around.caller is not None:
        yield around.caller
        around = around.parent


def _inputs(frame: Frame) -> list[fx.Node]:
    assert frame.graph is not None
    return [n for n in frame.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("value"), Tensor)]


def _changes_inputs(frame: Frame) -> bool:
    assert frame.graph is not None
    given = {storage(n.meta["value"]) for n in _inputs(frame)}
    return any(given & n.meta["changes"] for n in frame.graph.nodes if "changes" in n.meta)


def _sources(node: fx.Node, found: Probe) -> Iterator[Identity]:
    """A value, and those it is a rearrangement of."""
    at: Identity | None = (id(node.meta["value"]), node.meta["version"])
    while at is not None:
        yield at
        at = found.origins.get(at)


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
        leaves, spec = tree_flatten((args, kwargs), is_leaf=_is_streams)
        first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor | Streams)), None)
        if not self.options.replay or not torch.is_grad_enabled() or first is None:
            return forward(*settle(args), **settle(kwargs))
        trunk = leaves[first]
        others = [settle(leaf) for i, leaf in enumerate(leaves) if i != first]
        pair = isinstance(trunk, Streams) and not trunk.left
        if not pair:
            trunk = settle(trunk)

        def run(x: Tensor, *rest: Any) -> Any:
            if pair:
                x, rest = merge(rest[0], x), rest[1:]
            again, named = tree_unflatten([*rest[:first], x, *rest[first:]], spec)
            return forward(*again, **named)

        if pair:
            merge = trunk.merge
            trunk, others = trunk.current, [trunk.previous, *others]
        return _Kept(Branch(self.path, run, [module])).forward(trunk, tuple(others))


class _Kept:
    """One run whose input is kept; redeems what it dropped."""

    __slots__ = ("_passes", "_run", "_version", "_x")

    def __init__(self, branch: Branch) -> None:
        self._run = BranchRun(branch)
        self._passes: dict[int, dict[int, Tensor]] = {}

    def forward(self, x: Tensor, sides: tuple[Any, ...]) -> Any:
        self._x, self._version = x.detach(), x._version
        return self._run.forward(self, 0, x, sides)

    def redeem(self, part: int, index: int) -> Tensor:  # noqa: ARG002 - there is one part
        number = backward_pass()
        saved = self._passes.get(number)
        if saved is None:
            if self._x._version != self._version:
                raise ReplayError(
                    f"{self._run.branch.name}: its input has been modified by an inplace operation, and backward needs "
                    "it as it was; use the out-of-place form of that operation"
                )
            _, saved = self._run.again(self._x, output=False)
            if number != -1:
                self._passes[number] = saved
                passes = self._passes
                at_end_of_backward(lambda: passes.pop(number, None))
        return saved.pop(index)


def _is_streams(value: object) -> bool:
    return isinstance(value, Streams)
