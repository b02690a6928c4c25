"""What an operation does to the elements of a trunk: activations, norms and scales, told apart by trying them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from revwire.find.norms import is_norm, norm_by_hand
from revwire.libraries.drop import drops
from revwire.libraries.noise import Noise
from revwire.libraries.rates import DROPOUTS
from revwire.trace.graph import dependents, seen_through
from revwire.trace.operation import function_of, name_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from revwire.trace.frame import Frame

import copy
import inspect
import operator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.overrides import TorchFunctionMode

from revwire._torch import TorchDispatchMode
from revwire.trace.frame import Frame, original_forward

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
    elif node.target in DROPOUTS:
        call = torch.clone  # as a dropout module, tried at rest
    elif node.op == "call_function" and node.args and node.args[0] is source:
        call = _Rest(node.target, node.args[1:], node.kwargs)
    elif node.op == "call_method":
        call = _Rest(function_of(node), node.args[1:], node.kwargs)
    else:
        return False
    call = _AtRest(call)
    noise = Noise()
    sample = noise.normal([3, 5, *(2 for _ in source.meta["value"].shape[2:])])
    shuffle = noise.permutation(sample.numel())
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


def may_draw(frame: Frame, node: fx.Node) -> bool:
    """Whether an operation is one that draws random numbers in training, by its name: dropout and its kin."""
    if node.op == "call_module":
        return any(drops(module) for module in frame.module.get_submodule(str(node.target)).modules())
    name = name_of(node).lower()
    return node.op != "placeholder" and any(
        word in name for word in ("drop", "rand", "bernoulli", "multinomial")
    )


class _DropsNothing(TorchFunctionMode):
    """Runs functions that drop elements at random as they run in evaluation: a proof draws no numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            parameters = list(_signature(func))
            if "training" in parameters or "train" in parameters:
                name = "training" if "training" in parameters else "train"
                args, kwargs = args[: parameters.index(name)], {**kwargs, name: False}
        return func(*args, **kwargs)


def _signature(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # torch's own, written in C: (input, p, train)
        return ("input", "p", "train")


class _DrawsNothing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to draw random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _AtRest:
    """An operation as it is where nothing is dropped; what draws all the same is refused."""

    function: Any

    def __call__(self, tensor: Tensor) -> Any:
        with torch.no_grad(), _DropsNothing(), _DrawsNothing():  # type: ignore[no-untyped-call]
            return self.function(tensor)


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
    divides = "div" in name_of(node)
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
    noise = Noise()
    sample = noise.normal((2, *shape[1:]), torch.float64)
    try:
        tried = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        for tensor in (*tried.parameters(), *tried.buffers()):
            tensor.data = noise.normal(tensor.shape, torch.float64)
        with torch.no_grad():
            call = original_forward(tried)
            result, factors = call(sample), call(torch.ones_like(sample))
        scales = torch.allclose(result, sample * factors, rtol=1e-9, atol=1e-12)
        return scales and not torch.equal(result, sample)  # dropout at rest is no scale
    except Exception:  # noqa: BLE001 - whatever does not run on a plain tensor is no scale
        return False


def elementwise_after(frame: Frame, node: fx.Node, skips: Collection[fx.Node] = ()) -> tuple[fx.Node, ...]:
    """All elementwise operations and norms after `node`, as long as nothing else reads what is before them."""
    following: list[fx.Node] = []
    while node.users and node not in skips:
        user = next(iter(node.users))
        alone = len(node.users) == 1
        if alone and (is_elementwise(frame, user, node) or is_norm(frame, user, node)):
            following.append(user)
        elif by_hand := norm_by_hand(node):
            following += by_hand
        else:
            break
        node = following[-1]
    return tuple(following)
