"""Operations one after the other that act on each index of their leading dimensions by itself, run slice by slice.

Forward holds what one slice makes at a time and keeps only the operands for backward. Backward runs each slice again,
with grad, and takes its gradients before it goes on to the next. Where this is part of a branch, the branch's second
run does the same.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire.run.ambient import no_weight_cache
from revwire.run.conditions import Conditions, observe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Span = tuple[int, int]
"""Where a slice begins and ends, in the leading dimensions counted as one."""


@dataclass(frozen=True)
class Operand:
    """Stands among an operation's arguments for a tensor that was made before: the `index`-th."""

    index: int


class Value:
    """Stands among an operation's arguments for what the operation before it made."""


@dataclass(frozen=True)
class Operation:
    """One operation; on its leading dimensions, all but the last two, it acts index by index.

    Attributes:
        function: What is called; None: the value takes other leading dimensions.
        args: With `Operand` and `Value` in the place of tensors.
        kwargs: Without tensors.
        lead: The leading dimensions of what it makes; those of its operands are, or are broadcast to, the same.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lead: tuple[int, ...]


class SlicedOperations:
    """Operations one after the other, and the slices they are done in.

    Args:
        name: What messages call them.
        operations: The first of them reads operands alone, the others the value too.
        spans: See `spans_of`.
    """

    def __init__(self, name: str, operations: Sequence[Operation], spans: Sequence[Span]) -> None:
        self.name, self.operations, self.spans = name, operations, spans
        self._leads = {
            a.index: operation.lead
            for operation in operations
            for a in operation.args
            if isinstance(a, Operand)
        }

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """What the operations make of these operands, in slices where grad is needed."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
            apply: Any = _Sliced.apply
            made: Tensor = apply(self, *operands)
            return made
        return self.forward(operands)[0]

    def forward(self, operands: Sequence[Tensor]) -> tuple[Tensor, list[Conditions]]:
        """The result, and what each slice ran under."""
        out: Tensor | None = None
        ran: list[Conditions] = []
        for span in self.spans:
            with observe(self.name, (), (), operands[0].device) as conditions:
                value = self._run(self._blocks(operands, span), span)
            ran.append(conditions)
            lead = self.operations[-1].lead
            if out is None:
                out = value.new_empty((*lead, *value.shape[-2:]))
            _block(out, lead, span).copy_(value)
            del value
        assert out is not None
        return out, ran

    def gradients(
        self, operands: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor, ran: Sequence[Conditions]
    ) -> list[Tensor | None]:
        """The gradients of the operands that are wanted, without a graph."""
        made = [
            self._room(i, t) if needed else None
            for i, (t, needed) in enumerate(zip(operands, wanted, strict=True))
        ]
        for span, conditions in zip(self.spans, ran, strict=True):
            blocks = [b.detach() for b in self._blocks(operands, span)]
            inputs = [b.requires_grad_() for b, needed in zip(blocks, wanted, strict=True) if needed]
            with conditions.restored(self.name), no_weight_cache(), torch.enable_grad():
                out = self._run(blocks, span)
            cotangent = _block(grad, self.operations[-1].lead, span)
            found = iter(torch.autograd.grad(out, inputs, cotangent, allow_unused=True))
            del out, blocks, inputs
            for i, room in enumerate(made):
                if room is not None and (gradient := next(found)) is not None:
                    _block(room, self._leads[i], span).add_(gradient)
        return [None if room is None else room.to(t.dtype) for room, t in zip(made, operands, strict=True)]

    def gradients_with_graph(
        self, operands: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor, ran: Sequence[Conditions]
    ) -> list[Tensor | None]:
        """The same, as functions of the operands and of `grad`: for a backward of the backward."""
        # one operand may have been made of another, and its gradient is that of its own use alone
        own = [t.view_as(t) if needed else t for t, needed in zip(operands, wanted, strict=True)]
        inputs = [t for t, needed in zip(own, wanted, strict=True) if needed]
        totals: list[Tensor | None] = [None] * len(inputs)
        for span, conditions in zip(self.spans, ran, strict=True):
            with conditions.restored(self.name), no_weight_cache():
                out = self._run(self._blocks(own, span), span)
            cotangent = _block(grad, self.operations[-1].lead, span)
            found = torch.autograd.grad(out, inputs, cotangent, create_graph=True, allow_unused=True)
            totals = [
                b if a is None else a if b is None else a + b for a, b in zip(totals, found, strict=True)
            ]
        remaining = iter(totals)
        return [next(remaining) if needed else None for needed in wanted]

    def _run(self, blocks: Sequence[Tensor], span: Span) -> Tensor:
        value: Any = None
        for operation in self.operations:
            if operation.function is None:
                lengths = (length for _, length in _ranges(operation.lead, span))
                value = value.reshape(*lengths, *value.shape[-2:])
                continue
            args = (
                value if a is Value else blocks[a.index] if isinstance(a, Operand) else a
                for a in operation.args
            )
            value = operation.function(*args, **operation.kwargs)
        assert isinstance(value, Tensor)
        return value

    def _blocks(self, operands: Sequence[Tensor], span: Span) -> list[Tensor]:
        return [_block(t, self._leads[i], span) for i, t in enumerate(operands)]

    def _room(self, index: int, operand: Tensor) -> Tensor:
        """Room for an operand's gradient; where every slice adds to it, sums are at least float32."""
        whole = operand.shape[:-2] == self._leads[index]
        dtype = operand.dtype if whole else torch.promote_types(operand.dtype, torch.float32)
        return torch.zeros_like(operand, dtype=dtype)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: SlicedOperations, *operands: Tensor) -> Tensor:
        out, ctx.ran = recipe.forward(operands)
        ctx.recipe = recipe
        ctx.save_for_backward(*operands)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        recipe: SlicedOperations = ctx.recipe
        (grad,) = grads
        gradients = recipe.gradients_with_graph if torch.is_grad_enabled() else recipe.gradients
        return None, *gradients(ctx.saved_tensors, ctx.needs_input_grad[1:], grad, ctx.ran)


def spans_of(leads: Sequence[tuple[int, ...]], count: int) -> list[Span] | None:
    """At least `count` slices, or as many as there are indices; None where none fit.

    Each slice is a block, a range of every dimension, in all of these ways to write the leading dimensions.
    """
    total = math.prod(leads[0])
    marks = sorted({1, *(mark for lead in leads for mark in _strides(lead))})
    if total < 2 or any(after % mark for mark, after in itertools.pairwise(marks)):
        return None
    # what is cut are the runs of `unit` indices, within each `block` of them
    at = max(i for i, mark in enumerate(marks) if total // mark >= min(count, total))
    unit, block = marks[at], marks[min(at + 1, len(marks) - 1)]
    of_block = -(-count // (total // block))
    step = max(1, block // unit // of_block) * unit
    return [
        (begin, min(begin + step, start + block))
        for start in range(0, total, block)
        for begin in range(start, start + block, step)
    ]


def _strides(lead: tuple[int, ...]) -> list[int]:
    """How many indices follow each dimension, and how many there are."""
    return [math.prod(lead[i:]) for i in range(len(lead) + 1)]


def _ranges(lead: tuple[int, ...], span: Span) -> list[tuple[int, int]]:
    """A slice as a range of each leading dimension: where it begins, and how long it is."""
    begin, end = span
    return [
        (begin // stride % size, min(size, max(1, (end - begin) // stride)))
        for size, stride in zip(lead, _strides(lead)[1:], strict=True)
    ]


def _block(tensor: Tensor, lead: tuple[int, ...], span: Span) -> Tensor:
    """The slice of a tensor whose dimensions before the last two are broadcast to `lead`."""
    own = tensor.ndim - 2
    for dim in range(own):
        begin, length = _ranges(lead, span)[len(lead) - own + dim]
        if tensor.shape[dim] == lead[len(lead) - own + dim] != length:
            tensor = tensor.narrow(dim, begin, length)
    return tensor
