"""Softmax attention as models write it out, run in slices, so that the scores of one slice alone are alive at a time.

    q @ k^T  ->  scale, bias, mask, views  ->  softmax  ->  dropout  ->  @ v

Within `SlicedAttention` the first product computes nothing: it returns `Scores`, an object that looks like the tensor
of scores and notes what is done with it. When the last product comes, everything noted is computed for one slice of the
leading dimensions (windows, samples, heads) at a time. If the code does anything else with the scores, such as looking
at their values, they are computed whole and the code goes on as it would have.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from revwire._torch import function_modes, is_traceable_wrapper_subclass, swapped_function_modes
from revwire.errors import ReplayError
from revwire.pytree import tree_map
from revwire.run.ambient import as_autocast, autocast_now
from revwire.run.sliced_operations import Operand, Operation, SlicedOperations, Value, spans_of
from revwire.run.tensor_like import TensorLike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def _functions(*names: str) -> frozenset[Any]:
    places = (torch, Tensor, functional)
    return frozenset(getattr(place, name) for place in places for name in names if hasattr(place, name))


_PRODUCT = _functions("matmul", "bmm", "__matmul__")
_SOFTMAX = _functions("softmax")
_DROPOUT = _functions("dropout")
_VIEW = frozenset({Tensor.view, Tensor.reshape, torch.reshape})
_ELEMENTWISE = (
    _functions("add", "sub", "mul", "div", "true_divide", "masked_fill", "where", "clamp", "tanh")
    | _functions("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "rsub")
    | _functions("to", "float", "half", "bfloat16", "double")
)
_Made = tuple["Callable[..., Any] | None", tuple[Any, ...], dict[str, Any]]


class SlicedAttention(TorchFunctionMode):
    """Within it, attention runs in slices.

    Args:
        slices: How many, at least.
        name: What messages call the code that runs.
        always: Also where the scores are smaller than what they are made of.

    Attributes:
        run: How many attentions did.
        reused: Whether what was run in slices was used once more, whole.
    """

    def __init__(self, slices: int, name: str, *, always: bool = False) -> None:
        super().__init__()
        self.slices, self.name, self.always = slices, name, always
        self.run, self.reused = 0, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(a, Scores) for a in args):
            return function(*args, **(kwargs or {}))
        return self.call(function, args, kwargs or {})

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)`, of tensors: scores where attention begins with it."""
        if (shape := self._begun(function, args, kwargs)) is not None:
            return Scores(self, shape, None, (function, tuple(args), kwargs), softmax=function in _SOFTMAX)
        return function(*args, **kwargs)

    def _begun(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """The shape of the scores that a call makes, None if it makes none."""
        if function not in _PRODUCT and function not in _SOFTMAX:
            return None
        if torch.is_inference_mode_enabled() or _holds_tensors(kwargs):
            return None
        if function in _SOFTMAX:
            whole = bool(args) and _is_plain(args[0]) and args[0].ndim > 2
            return tuple(args[0].shape) if whole and _along_last(args, kwargs) else None
        if len(args) != 2 or not all(_is_plain(a) and a.ndim > 2 for a in args):
            return None
        q, k = args
        shape = (*q.shape[:-1], k.shape[-1])
        large = math.prod(shape) > q.numel() + k.numel()
        return shape if q.shape[:-2] == k.shape[:-2] and (large or self.always) else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in the block is no attention of the code's, nor is it where backward runs it again."""
        with swapped_function_modes([mode for mode in function_modes() if mode is not self]):
            yield


class Scores(TensorLike):
    """Attention's scores, or its weights after the softmax, before anything needs them.

    Args:
        mode: What runs.
        shape: Theirs.
        before: What they are made of, None at the beginning.
        made: How: the function (None: another view), its arguments with `Value` for what was before, others by name.
        softmax: Whether they are weights already.
    """

    def __init__(
        self,
        mode: SlicedAttention,
        shape: tuple[int, ...],
        before: Scores | None,
        made: _Made,
        *,
        softmax: bool,
    ) -> None:
        self.shape = torch.Size(shape)
        self._mode, self.before, self.made, self._softmax = mode, before, made, softmax
        own = [a for a in made[1] if isinstance(a, Tensor)]
        self.device: torch.device = own[0].device if before is None else before.device
        self._versions = [a._version for a in own]
        self._grad, self._autocast = torch.is_grad_enabled(), autocast_now(self.device)
        self.whole: Tensor | None = None
        self.used = False
        self.drawn: bool = made[0] in _DROPOUT or (before is not None and before.drawn)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Scores({tuple(self.shape)}; .tensor() makes them)"

    def tensor(self) -> Tensor:
        """The scores, whole; made once."""
        if self.whole is None:
            self.check_unused()
            value = None if self.before is None else self.before.tensor()
            self.check_operands()
            function, args, kwargs = self.made
            with ExitStack() as stack:
                stack.enter_context(self._mode.paused())
                stack.enter_context(torch.set_grad_enabled(self._grad))
                for context in as_autocast(self._autocast):
                    stack.enter_context(context)
                if function is None:
                    assert value is not None
                    self.whole = value.reshape(self.shape)
                else:
                    self.whole = function(*(value if a is Value else a for a in args), **kwargs)
            self.before, self.made = None, (None, (), {})
        assert self.whole is not None
        return self.whole

    def _call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if (result := self._followed(function, args, kwargs)) is not None:
            return result
        args, kwargs = tree_map(_made_tensor, (tuple(args), kwargs), is_leaf=_is_scores)
        return self._mode.call(function, args, kwargs)

    def _followed(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the call makes without making the scores, None if it has to."""
        if self.whole is not None or _holds_tensors(kwargs):
            return None
        if self._grad != torch.is_grad_enabled() or self._autocast != autocast_now(self.device):
            return None
        first = bool(args) and args[0] is self
        if function in _VIEW and first and not kwargs:
            shape = _viewed(self.shape, args[1:])
            return None if shape is None else self._after(None, (), {}, shape)
        tensors = [a for a in args if isinstance(a, Tensor | Scores)]
        others = [a for a in tensors if a is not self]
        if not all(map(_is_plain, others)) or len(others) + 1 != len(tensors):
            return None
        if function in _PRODUCT and first and self._softmax and len(args) == 2:
            return self._product(function, args[1])
        if first and function in _SOFTMAX and not others and _along_last(args, kwargs):
            return self._after(function, args, kwargs, self.shape, softmax=True)
        if first and function in _DROPOUT and not (kwargs.get("inplace") or any(args[3:])):
            return self._after(function, args, kwargs, self.shape)
        if function in _ELEMENTWISE and _broadcast(self.shape, others):
            return self._after(function, args, kwargs, self.shape)
        return None

    def _after(
        self,
        function: Callable[..., Any] | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        *,
        softmax: bool = False,
    ) -> Scores:
        args = tuple(Value if a is self else a for a in args)
        return Scores(self._mode, shape, self, (function, args, kwargs), softmax=softmax or self._softmax)

    def _product(self, function: Callable[..., Any], v: Any) -> Tensor | None:
        """The weights times `v`, in slices; None where they cannot be."""
        lead = tuple(self.shape[:-2])
        if not isinstance(v, Tensor) or v.shape[:-1] != (*lead, self.shape[-1]):
            return None
        chain: list[Scores] = []
        scores: Scores | None = self
        while scores is not None and scores.whole is None:
            chain.insert(0, scores)
            scores = scores.before
        if scores is not None:
            return None  # something looked at them on the way
        made = [(s.made, tuple(s.shape[:-2])) for s in chain]
        made.append(((function, (Value, v), {}), lead))
        spans = spans_of([of for _, of in made], self._mode.slices)
        if spans is None:
            return None
        for scores in chain:
            scores.check_unused()
            scores.check_operands()
            scores.used = True
        operands: list[Tensor] = []
        operations = []
        for (called, args, kwargs), of in made:
            stood_in = []
            for a in args:
                if isinstance(a, Tensor):
                    stood_in.append(Operand(len(operands)))
                    operands.append(a)
                else:
                    stood_in.append(a)
            operations.append(Operation(called, tuple(stood_in), kwargs, of))
        self._mode.run += 1
        with self._mode.paused():
            return SlicedOperations(self._mode.name, operations, spans)(operands)

    def check_unused(self) -> None:
        """Raise where numbers that were drawn would have to be drawn once more."""
        if not self.used:
            return
        self._mode.reused = True
        if self.drawn:
            raise ReplayError(
                f"{self._mode.name}: its attention weights are used twice, and their dropout was drawn slice by slice; "
                "leave the step out of chunks"
            )

    def check_operands(self) -> None:
        """Raise where what they are made of is not what it was."""
        own = [a for a in self.made[1] if isinstance(a, Tensor)]
        if [a._version for a in own] != self._versions:
            raise ReplayError(
                f"{self._mode.name}: what its attention is computed from is changed in place before it is used; "
                "use the out-of-place form of that operation, or leave the step out of chunks"
            )


def _is_scores(value: object) -> bool:
    return isinstance(value, Scores)


def _made_tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Scores) else value


def _holds_tensors(kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor | Scores) for value in kwargs.values())


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)


def _along_last(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in {-1, len(args[0].shape) - 1}


def _broadcast(shape: torch.Size, others: Sequence[Any]) -> bool:
    """Whether others are broadcast to the shape."""
    return all(
        len(other.shape) <= len(shape)
        and all(n in {1, m} for n, m in zip(reversed(other.shape), reversed(shape), strict=False))
        for other in others
    )


def _viewed(shape: torch.Size, args: Sequence[Any]) -> tuple[int, ...] | None:
    """What a view makes of a shape; None if it is more than other leading dimensions."""
    sizes = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else tuple(args)
    if not all(isinstance(size, int) for size in sizes) or sizes.count(-1) > 1 or len(sizes) < 3:
        return None
    known = math.prod(size for size in sizes if size != -1)
    total = math.prod(shape)
    if not known or total % known:
        return None
    sizes = tuple(total // known if size == -1 else size for size in sizes)
    return sizes if math.prod(sizes) == total and sizes[-2:] == shape[-2:] else None
