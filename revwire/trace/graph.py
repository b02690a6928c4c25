"""Walking a frame's graph: what depends on what, and what passes a tensor's values on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from revwire._torch import traced_assert
from revwire.pytree import tree_leaves
from revwire.run.rearrange import is_rearrangement
from revwire.trace.expected import expected
from revwire.trace.health import drop_checks, finite
from revwire.trace.operation import function_of, name_of
from revwire.trace.passing import loses_bits, passed_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from revwire.trace.frame import Frame

# calls that return nothing and belong to what they look at
_CHECKS = {traced_assert, finite}
# what takes the dtype, device or shape of its arguments and not their values; the second kind, of all but the first
_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
_LIKE |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_AS = {"type_as", "expand_as", "view_as", "reshape_as"}


def seen_through(frame: Frame, node: fx.Node) -> fx.Node:
    """The node whose value `node` passes on: behind `nn.Identity`, the identity's input."""
    while node.op == "call_module" and _is_identity(frame.module.get_submodule(str(node.target))):
        node = node.all_input_nodes[0]
    return node


def handed_on(frame: Frame, node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose values `node` hands on, also in another tensor (`revwire.trace.passing`): the nearest first."""
    while True:
        yield (node := seen_through(frame, node))
        if (passed := passed_on(node)) is None or loses_bits(node):
            return
        node = passed[0]


def _is_identity(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:
        return all(map(_is_identity, module))
    return type(module) is nn.Identity


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that some of `nodes` are computed from."""
    seen: set[fx.Node] = set()
    waiting = [i for n in nodes for i in n.all_input_nodes]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return seen


def between(skip: fx.Node, ends: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Nodes that depend on the values of `skip` and that `ends` are or depend on, in graph order."""
    after = dependents(skip)
    inside = after & (ancestors(ends) | set(ends))
    for node in after:
        if node.target in _CHECKS and inside.intersection(node.all_input_nodes):
            inside = inside | {node}
        elif node.target is expected:
            # a check of what a child of the branch returned, and the way to it
            way = ancestors([node]) & after
            if inside.issuperset(n for n in way if n.op == "call_module"):
                inside = inside | way | {node}
    return tuple(n for n in skip.graph.nodes if n in inside)


def dependents(source: fx.Node) -> set[fx.Node]:
    """Nodes computed from the values of `source`; what only reads its shape or dtype is not among them."""
    seen: set[fx.Node] = set()
    waiting = [user for user in source.users if _reads_values(user, source)]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting.extend(node.users)
    return seen


def _reads_values(user: fx.Node, source: fx.Node) -> bool:
    if source in user.meta.get("unread", ()):
        return False
    name = name_of(user)
    if name in _LIKE or (name in _AS and user.args[0] is not source):
        return False
    if user.target in _CHECKS or user.target is expected or user.meta.get("child") is not None:
        return True
    return any(isinstance(v, Tensor) for v in tree_leaves(user.meta.get("value")))


def unread_inputs(frame: Frame | None) -> frozenset[int]:
    """Which of its tensors a frame, where it was traced, reads no values of: `table(torch.arange(x.shape[1]))`."""
    graph = None if frame is None else frame.graph
    if graph is None or any(node.meta.get("changes") for node in graph.nodes):
        return frozenset()
    ends = set(graph.output_node().all_input_nodes)
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["value"], Tensor)]
    unread = (n for n in inputs if n not in ends and not ends & dependents(n))
    return frozenset(int(str(node.target)[len("input_") :]) for node in unread)


def leaves_alone(node: fx.Node, leaves: frozenset[int]) -> frozenset[fx.Node]:
    """The arguments of a call that stand at some of its leaves and nowhere else."""
    given = tree_leaves((node.args, node.kwargs))
    chosen = {leaf for i, leaf in enumerate(given) if i in leaves and isinstance(leaf, fx.Node)}
    return frozenset(
        chosen - {leaf for i, leaf in enumerate(given) if i not in leaves and isinstance(leaf, fx.Node)}
    )


def rearranges(node: fx.Node) -> bool:
    """Whether a node only moves the values of its first argument around."""
    return node.op != "call_module" and is_rearrangement(function_of(node), node.args, node.kwargs)


def drop_unused(graph: fx.Graph) -> None:
    """Erase what nobody uses: `B, N, C = x.shape` reads more than most code needs, a loop more than it keeps."""
    for node in reversed(graph.nodes):
        pure = node.target is getattr or getattr(node.target, "__module__", None) == "_operator"
        if node.op == "call_function" and pure and not node.users and not node.meta["changes"]:
            graph.erase_node(node)
    drop_checks(graph.nodes)
