"""What operations do to the elements of a trunk, proven by trying: activations, norms, scales, sums piece by piece."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from revwire.pytree import tree_leaves
from revwire.trace.frame import Frame, original_forward
from revwire.trace.graph import dependents, rearranges, seen_through

if TYPE_CHECKING:
    from collections.abc import Container

_PRODUCTS = {operator.mul, operator.imul, operator.truediv, torch.mul, torch.multiply, torch.div}
_PRODUCT_METHODS = {"mul", "mul_", "div", "div_", "multiply", "__mul__", "__rmul__", "__truediv__"}


def is_elementwise(frame: Frame, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is an activation or dropout on `source`, proven by trying.

    It acts on each element alone, so it commutes with any shuffle; and it does more than scale, or nothing at all.
    """
    if (
        node.op == "output"
        or node.all_input_nodes != [source]
        or not isinstance(node.meta.get("value"), Tensor)
    ):
        return False
    if node.meta["value"].shape != source.meta["value"].shape:
        return False
    call: Any
    if node.op == "call_module":
        module = frame.module.get_submodule(str(node.target))
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            return False
        module = copy.copy(module)
        module.training = False  # dropout acts on each element alone too, but would shuffle the proof
        call = original_forward(module)
    elif node.op == "call_function" and node.args and node.args[0] is source:
        call = _Rest(node.target, node.args[1:], node.kwargs)
    elif node.op == "call_method":
        call = _Rest(getattr(Tensor, str(node.target), None), node.args[1:], node.kwargs)
    else:
        return False
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 5, *(2 for _ in source.meta["value"].shape[2:]), generator=generator)
    shuffle = torch.randperm(sample.numel(), generator=generator)
    try:
        result = call(sample.clone())
        direct = result.flatten()[shuffle]
        shuffled = call(sample.flatten()[shuffle].reshape(sample.shape).clone()).flatten()
        # a scaled trunk is no activation: x + F(x) halved after each block is another network than F(x) halved
        scales = torch.allclose(call(-2 * sample), -2 * result) and not torch.equal(result, sample)
    except Exception:  # noqa: BLE001 - whatever does not run on a plain tensor is no activation
        return False
    # not equal to the last bit: the end of a tensor takes another code path than its vectors (SiLU)
    return bool(torch.allclose(direct, shuffled)) and not scales


def is_norm(frame: Frame, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is a normalisation layer on `source`: a module of that name that keeps the shape."""
    if node.op != "call_module" or node.all_input_nodes != [source]:
        return False
    value = node.meta.get("value")
    named = "norm" in type(frame.module.get_submodule(str(node.target))).__name__.lower()
    return named and isinstance(value, Tensor) and value.shape == source.meta["value"].shape


def may_draw(frame: Frame, node: fx.Node) -> bool:
    """Whether an operation is one that draws random numbers in training, by its name: dropout and its kin."""
    if node.op == "call_module":
        return any(_drops(module) for module in frame.module.get_submodule(str(node.target)).modules())
    name = getattr(node.target, "__name__", str(node.target)).lower()
    return node.op != "placeholder" and any(
        word in name for word in ("drop", "rand", "bernoulli", "multinomial")
    )


def _drops(module: nn.Module) -> bool:
    rate = next((getattr(module, key) for key in ("p", "drop_prob") if hasattr(module, key)), 1)
    named = any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth"))
    return named and not any(True for _ in module.children()) and rate != 0


@dataclass(frozen=True)
class _Rest:
    """A recorded function with all but its first argument filled in."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, tensor: Tensor) -> Any:
        return self.function(tensor, *self.args, **self.kwargs)


def scaled(frame: Frame, node: fx.Node) -> fx.Node | None:
    """The trunk that `node` is a multiple of, element by element; None if it is no such thing."""
    value = node.meta.get("value")
    if not isinstance(value, Tensor):
        return None
    if node.op == "call_module":
        child = frame.module.get_submodule(str(node.target))
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("value"), Tensor)]
        scales = (
            len(sources) == 1
            and sources[0].meta["value"].shape == value.shape
            and _is_scale(child, value.shape)
        )
        return sources[0] if scales else None
    names = _PRODUCT_METHODS if node.op == "call_method" else _PRODUCTS
    if node.target not in names or node.kwargs or len(node.args) != 2:
        return None
    divides = "div" in getattr(node.target, "__name__", str(node.target))
    for source, factor in zip(node.args, reversed(node.args), strict=True):
        if isinstance(source, fx.Node) and isinstance(held := source.meta.get("value"), Tensor):
            depends = isinstance(factor, fx.Node) and factor in dependents(source) | {source}
            if held.shape == value.shape and source.op != "get_attr" and not depends:
                return seen_through(frame, source)
        if divides:
            break
    return None


def _is_scale(module: nn.Module, shape: torch.Size) -> bool:
    """Whether a module multiplies each element by a number of its own, proven by trying."""
    if any(True for _ in module.children()) or any(p.numel() > shape.numel() for p in module.parameters()):
        return False
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, *shape[1:], generator=generator, dtype=torch.float64)
    try:
        tried = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        for tensor in (*tried.parameters(), *tried.buffers()):
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            call = original_forward(tried)
            result, factors = call(sample), call(torch.ones_like(sample))
        scales = torch.allclose(result, sample * factors, rtol=1e-9, atol=1e-12)
        return scales and not torch.equal(result, sample)  # dropout at rest is no scale
    except Exception:  # noqa: BLE001 - whatever does not run on a plain tensor is no scale
        return False


_PIECES = {operator.getitem, torch.cat, torch.concat, torch.concatenate}
_PIECES |= {
    getattr(torch, name) for name in ("narrow", "select", "split", "chunk", "unbind", "squeeze", "unsqueeze")
}
_PIECE_METHODS = {"narrow", "select", "split", "chunk", "unbind", "squeeze", "unsqueeze", "tensor_split"}


@dataclass(frozen=True)
class Pieces:
    """A trunk put together again: the trunk, the additions onto its slices, and what those add."""

    trunk: fx.Node
    additions: frozenset[fx.Node]
    added: frozenset[fx.Node]


def pieced(node: fx.Node, additions: Container[fx.Node]) -> Pieces | None:
    """The trunk that `node` puts together again from its slices, with something added to some of them.

    `cat([x[:, :1], x[:, 1:] + F(x)], 1)`, as class tokens and partial residuals have it, is a residual of all of `x`.
    Proven by trying: with what is added left out, a random `x` comes out as it went in.
    """
    if node.target not in {torch.cat, torch.concat, torch.concatenate}:
        return None
    leaves: set[fx.Node] = set()
    used: set[fx.Node] = set()
    _collect_pieces(node, additions, leaves, used)
    value = node.meta["value"]
    trunks = [
        n for n in leaves if n.op != "get_attr" and getattr(n.meta["value"], "shape", None) == value.shape
    ]
    sample = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    terms = {term for addition in used for term in addition.all_input_nodes}
    for trunk in trunks if used else ():
        try:
            result = _put_together(node, additions, trunk, sample)
            added = {term for term in terms if _put_together(term, additions, trunk, sample) is None}
        except (RuntimeError, IndexError, TypeError):
            continue
        if isinstance(result, Tensor) and torch.equal(result, sample):
            return Pieces(trunk, frozenset(used), frozenset(added))
    return None


def _moves_pieces(node: fx.Node) -> bool:
    """Whether an operation only takes slices, puts them together, or rearranges what is in them."""
    if node.op == "call_module":
        return False
    return node.target in (_PIECE_METHODS if node.op == "call_method" else _PIECES) or rearranges(node)


def _collect_pieces(
    node: fx.Node, additions: Container[fx.Node], leaves: set[fx.Node], used: set[fx.Node]
) -> None:
    if node in additions:
        used.add(node)
    elif not _moves_pieces(node):
        leaves.add(node)
        return
    for source in node.all_input_nodes:
        if any(isinstance(v, Tensor) for v in tree_leaves(source.meta["value"])):
            _collect_pieces(source, additions, leaves, used)


def _put_together(node: fx.Node, additions: Container[fx.Node], trunk: fx.Node, sample: Tensor) -> Any:
    """The value of `node` for a trunk of `sample`, with what is added left out; None where it is not of the trunk."""
    if node is trunk:
        return sample
    if node in additions:
        terms = [_put_together(term, additions, trunk, sample) for term in node.all_input_nodes]
        return next((term for term in terms if term is not None), None)
    if not _moves_pieces(node):
        return None

    def value_of(source: fx.Node) -> Any:
        held = source.meta["value"]
        of_tensors = any(isinstance(v, Tensor) for v in tree_leaves(held))
        return _put_together(source, additions, trunk, sample) if of_tensors else held

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    if any(leaf is None for leaf in tree_leaves(args[:1])):
        return None
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return function(*args, **kwargs)
