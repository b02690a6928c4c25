"""Writes a residual branch as a Python function of the module, the trunk and the side inputs."""

from __future__ import annotations

import linecache
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from revwire.find.residual import Residual


@dataclass(frozen=True)
class StepCode:
    """One planned residual as code.

    Attributes:
        branch: `branch(self, x, *sides)`: a tuple of the sum of the residual's branches at the trunk `x`, and of the
            values of the branch that the frame uses elsewhere.
        whole: Whether that sum holds the (scaled) skip too.
        leads: Whether the trunk is the first term of the frame's own sum.
        casts: Whether that sum is in another dtype than the trunk before and after it.
        post: `post(self, total, *sides)`: what follows the sum and moves into the branch, or None.
        modules: Paths of the children both call.
        own: Paths of the parameters and buffers both read themselves.
    """

    branch: Callable[..., tuple[Any, ...]]
    whole: bool
    leads: bool
    casts: bool
    post: Callable[..., Tensor] | None
    modules: tuple[str, ...]
    own: tuple[str, ...]

    def block(self, module: nn.Module, x: Tensor, *sides: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """The block as it was: its output, and the values of its branch that the frame uses elsewhere."""
        out, *inner = self.branch(module, x, *sides)
        total = out if self.whole else x + out if self.leads else out + x
        total = total.to(x.dtype) if self.casts else total
        return (total if self.post is None else self.post(module, total, *sides)), tuple(inner)

    def added(
        self, module: nn.Module, x: Tensor, *sides: Any, keeps_skip: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """`F(x)`, what a step adds to the trunk, and the values of the branch that the frame uses elsewhere.

        Where a coupling keeps `x[i]` in `x[i+1]` (`keeps_skip`), an operation after the sum stays where it is, and the
        step is the whole block less its input, `F(x) = G(x) - x`; else that operation moves into the branch.
        """
        out, *inner = self.branch(module, x, *sides)
        out = out.to(x.dtype) if self.casts else out
        if self.whole:
            out = (out if self.post is None else self.post(module, out, *sides)) - x
        elif self.post is not None:
            out = self.post(module, x + out, *sides) - x if keeps_skip else self.post(module, out, *sides)
        return out, tuple(inner)


def step_code(residual: Residual, without: Sequence[fx.Node] = ()) -> StepCode:
    """The branch of a residual as functions of `(self, x, *sides)`.

    Args:
        residual: What to write.
        without: Calls of one tensor that the branch ends with, in order, to leave out of its function.
    """
    sides = residual.sides
    terms = tuple(without[0].all_input_nodes) if without else residual.terms
    inside = tuple(node for node in residual.inside if node not in without)
    branch = _function(residual, "branch", residual.skip, inside, sides, terms, residual.shared)
    post = None
    if residual.post:
        post = _function(residual, "post", residual.total, residual.post, sides, (residual.result,))
    nodes = (*residual.inside, *residual.post)
    read = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
    return StepCode(
        branch,
        residual.scale is not None,
        residual.leads,
        residual.casts,
        post,
        residual.modules,
        tuple(dict.fromkeys(str(n.target) for n in read)),
    )


def _function(
    residual: Residual,
    kind: str,
    trunk: fx.Node,
    inside: tuple[fx.Node, ...],
    sides: tuple[fx.Node, ...],
    terms: Iterable[fx.Node],
    shared: tuple[fx.Node, ...] | None = None,
) -> Callable[..., Any]:
    graph = fx.Graph()
    copies = {trunk: graph.placeholder("x")}
    copies.update({node: graph.placeholder(f"side_{i}") for i, node in enumerate(sides)})
    for node in inside:
        for read in node.all_input_nodes:
            if read not in copies:
                assert read.op == "get_attr", f"{read} is neither trunk, side nor inside"
                copies[read] = graph.get_attr(str(read.target))
        copies[node] = graph.node_copy(node, copies.__getitem__)
    total, *rest = (copies[term] for term in terms)
    for term in rest:
        total = graph.call_function(_add, (total, term))
    graph.output(total if shared is None else (total, *(copies[n] for n in shared)))
    name = f"{type(residual.frame.module).__name__}.{kind}_{residual.index}"
    return compile_graph(graph, f"<revwire {name} {id(graph):x}>")


def _add(left: Tensor, right: Tensor) -> Tensor:
    return left + right


def compile_graph(graph: fx.Graph, filename: str) -> Callable[..., Any]:
    """The function that a graph stands for; tracebacks show its source under `filename`."""
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # noqa: S102 - our own code, printed by torch.fx
    lines = code.src.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.src), None, lines, filename)  # tracebacks show the generated line
    function: Callable[..., Any] = namespace["forward"]
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function


def source_of(function: Callable[..., Any]) -> str:
    """The text of a function that was generated here."""
    return "".join(linecache.getlines(function.__code__.co_filename))


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor at `path` below `module`, and its name there."""
    parent, _, key = path.rpartition(".")
    return module.get_submodule(parent), key
