"""The blocks between chains (stem, downsampling, last norm), run again in backward from their stored input.

They are modules, or children that a module calls one after the other (conv, norm, act), and not reversible, so what
enters them is kept, as activation checkpointing does, under the same conditions as a step's second run (random state,
BatchNorm statistics moved once). Where a chain ends in such a block, what is kept is the chain's last pair, which
backward needs anyway, and not the merged tensor beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from revwire._torch import AnyDropout
from revwire.find.consecutive import changed_by, keeps_input, lines
from revwire.find.probe import sources
from revwire.planning.plan import Joined
from revwire.trace.frame import Frame, storage
from revwire.trace.graph import seen_through

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from revwire.find.consecutive import Calls
    from revwire.find.probe import Probe
    from revwire.planning.plan import Plan


def find_transitions(plan: Plan, found: Probe) -> Plan:
    """The plan with what is beside its chains chosen to run again, where that is more than one operation.

    Those are the outermost modules, and children that a frame around the chains calls one after the other (conv, norm,
    act, pool). A single operation would keep its input either way; but where that is the end of a chain (a last norm),
    it is the chain's pair, and kept already: such a chain hands it on as it is.
    """
    beside = _Beside(plan, found)
    chosen, joined = beside.modules(), beside.joined()
    together = {path for run in joined for path in run.paths}
    recomputed = tuple(path for path in chosen if path not in together)
    handing = set[int]().union(*(chosen[path] for path in recomputed), *joined.values())
    opened = tuple(replace(chain, open=i in handing) for i, chain in enumerate(plan.chains))
    return replace(plan, chains=opened, recomputed=recomputed, joined=tuple(joined))


def transitions_refused(plan: Plan, found: Probe) -> str | None:
    """Why this model cannot run again what the plan says is run again, None where it can."""
    if not plan.recomputed and not plan.joined:
        return None
    beside = _Beside(plan, found)
    modules = beside.modules()
    if (path := next((path for path in plan.recomputed if path not in modules), None)) is not None:
        return f"{path or '(model)'} is no module beside the chains"
    joined = beside.joined()
    if (run := next((run for run in plan.joined if run not in joined), None)) is not None:
        return f"{run.name} are no modules beside the chains that {run.module or 'the model'} calls in a row"
    return None


class _Beside:
    """What a recorded run did beside the chains of a plan."""

    def __init__(self, plan: Plan, found: Probe) -> None:
        self.found = found
        planned = [r for step in plan.steps if (r := found.residual(step)) is not None]
        self.branches = {node for r in planned for node in r.nodes}
        self.around = {path for step in plan.steps for path in _parents(step.module)}
        last = ((i, found.residual(chain.steps[-1])) for i, chain in enumerate(plan.chains))
        self.ends = {residual.leaving: i for i, residual in last if residual is not None}

    def modules(self) -> dict[str, set[int]]:
        """The outermost modules that can run again on their own, by path, and which chains enter each."""
        chosen: dict[str, bool] = {}
        entered: dict[str, set[int]] = {}
        for frame in self.found.frames:
            outer = {*_parents(frame.path)} - {frame.path}
            if frame.path in self.around or frame.graph is None or any(chosen.get(path) for path in outer):
                continue
            if any(caller in self.branches for caller in frame.callers) or _changes_inputs(frame):
                chosen[frame.path] = False
                continue
            chains = set[int]().union(*map(self._entering, _inputs(frame)))
            entered.setdefault(frame.path, set()).update(chains)
            several = bool(frame.module._modules) or bool(chains)
            chosen[frame.path] = several and chosen.get(frame.path, True)
        for path, chains in self._single():
            # modules of torch itself have no frame of their own
            chosen.setdefault(path, True)
            entered.setdefault(path, set()).update(chains)
        return {path: entered[path] for path, is_chosen in chosen.items() if is_chosen}

    def joined(self) -> dict[Joined, set[int]]:
        """What children can run again together, and which chains enter the first of them."""
        calls: dict[str, list[dict[Joined, set[int]]]] = {}
        for frame in self._frames_around():
            runs = {}
            for line in lines(frame, self.branches):
                for nodes in self._worth_joining(frame, line):
                    run = Joined(frame.path, tuple(str(node.target) for node in nodes))
                    runs[run] = self._entering(nodes[0].all_input_nodes[0])
            calls.setdefault(frame.path, []).append(runs)
        # a frame that runs several times has one forward for all of them
        return {
            run: set[int]().union(*(runs[run] for runs in alike))
            for alike in calls.values()
            for run in alike[0]
            if all(run in runs for runs in alike)
        }

    def _frames_around(self) -> Iterator[Frame]:
        """The frames around the chains that can be rewritten, in running order."""
        for frame in self.found.frames:
            inside = frame.path not in self.around or any(c in self.branches for c in frame.callers)
            if not inside and frame.graph is not None and "forward" not in frame.module.__dict__:
                yield frame

    def _worth_joining(self, frame: Frame, line: Calls) -> Iterator[Calls]:
        """The parts of a line that gain by running again together.

        One module of several operations goes with the single ones around it; two run again one at a time, for the
        second run holds all that a part saves.
        """
        part: list[fx.Node] = []
        has_block = False
        for node in (*line, None):
            kind = None if node is None else self._kind(frame, node)
            if kind is None or (kind == "block" and has_block):
                yield from _trimmed(frame, tuple(part))
                part, has_block = [], False
            if node is not None and kind is not None:
                part.append(node)
                has_block |= kind == "block"

    def _kind(self, frame: Frame, node: fx.Node) -> Literal["operation", "block"] | None:
        """Whether a child is a single operation or several; None if it cannot run again."""
        path = f"{frame.path}.{node.target}".lstrip(".")
        frames = [f for f in self.found.frames if f.module is frame.module.get_submodule(str(node.target))]
        if path in self.around or any(f.graph is None for f in frames):
            return None
        if not frame.module.get_submodule(str(node.target))._modules:
            return "operation"
        # one that is called elsewhere too runs again on its own there
        return "block" if len({f.caller for f in frames}) == 1 else None

    def _entering(self, node: fx.Node) -> set[int]:
        """The chains that a value is the end of."""
        at = (id(node.meta["value"]), node.meta["version"])
        return {self.ends[a] for a in sources(at, self.found.origins) if a in self.ends}

    def _single(self) -> Iterator[tuple[str, set[int]]]:
        """Children without children that the frames around the chains call on the end of one: their path, which."""
        for frame in self.found.frames:
            if frame.path not in self.around or frame.graph is None:
                continue
            for node in frame.graph.nodes:
                alone = node.op == "call_module" and len(node.all_input_nodes) == 1
                if not alone or node in self.branches or node.meta.get("changes"):
                    continue
                has_children = bool(frame.module.get_submodule(str(node.target))._modules)
                # an identity passes the pair on
                if has_children or seen_through(frame, node) is not node:
                    continue
                if chains := self._entering(node.all_input_nodes[0]):
                    yield f"{frame.path}.{node.target}".lstrip("."), chains


def _trimmed(frame: Frame, nodes: Calls) -> Iterator[Calls]:
    """The calls from where nothing changes their input, without what gains nothing at the ends; none if one is left."""

    def is_identity(node: fx.Node) -> bool:
        return seen_through(frame, node) is not node

    def holds_little(node: fx.Node) -> bool:
        # a dropout holds its mask, and would hold its input
        return is_identity(node) or isinstance(frame.module.get_submodule(str(node.target)), AnyDropout)

    while nodes and (holds_little(nodes[0]) or not keeps_input(frame, nodes)):
        nodes = nodes[1:]
    while nodes and is_identity(nodes[-1]):
        nodes = nodes[:-1]
    if len(nodes) > 1:
        yield nodes


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
    return any(given & changed_by(frame, node) for node in frame.graph.nodes)
