"""What children return beside tensors: handed to the code as it is, and checked where the generated code runs.

Code asks `gate is None` of what a child returned, and no stand-in can answer that but the value itself. So the code
gets None, flags and words as they are, and the graph a node that says what was seen. Numbers stay values of the graph,
as they may be sizes, unless the code decides by them.
"""

from __future__ import annotations

import dis
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revwire.errors import ReplayError
from revwire.trace.same import same

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from torch import fx

HANDED = (bool, str, type(None), torch.dtype, torch.device)
"""What code is handed as it is."""

SEEN = (*HANDED, int, float)
"""What a graph can be made to hold for."""


def expected(found: Any, value: Any, child: str) -> None:
    """Check that a child returns what the code was traced with.

    Raises:
        ReplayError: it returned something else.
    """
    if found is value or same(found, value):
        return
    now = "a tensor" if isinstance(found, Tensor) else repr(found)
    raise ReplayError(
        f"{child} returned {now} where it returned {value!r} when the code that called it was traced, and that code "
        "may decide by it; what this depends on has to be on the modules or among the arguments before the call, or "
        f"rewire with the module that calls {child} excluded"
    )


def child_of(node: fx.Node) -> str | None:
    """The child that the value of a node, no tensor, was returned by or worked out from; None if by none."""
    if node.op == "call_module":
        return str(node.target)
    for source in node.all_input_nodes:
        if (
            not isinstance(source.meta.get("value"), Tensor)
            and (child := source.meta.get("child")) is not None
        ):
            return str(child)
    return None


def unused_targets(frame: FrameType) -> frozenset[int]:
    """Which of the names that this frame is unpacking a value into its code never reads: `out, _ = self.attn(x)`."""
    return _unused(frame.f_code, frame.f_lasti)


@functools.lru_cache(maxsize=1024)
def _unused(code: CodeType, at: int) -> frozenset[int]:
    instructions = list(dis.get_instructions(code))
    start = next((i for i, each in enumerate(instructions) if each.offset == at), None)
    if start is None or instructions[start].opname != "UNPACK_SEQUENCE":
        return frozenset()
    targets: list[str] = []
    for each in instructions[start + 1 :]:
        if not each.opname.startswith("STORE_FAST"):
            break
        # newer Pythons store two at once, or store one and load another
        names = list(each.argval) if isinstance(each.argval, tuple) else [each.argval]
        targets += names[:1] if "LOAD" in each.opname else names
    read: set[str] = set()
    for each in instructions:
        names = list(each.argval) if isinstance(each.argval, tuple) else [each.argval]
        if each.opname.startswith("STORE_FAST_LOAD"):
            read.update(names[1:])
        elif each.opname.startswith("LOAD"):
            read.update(name for name in names if isinstance(name, str))
    count = instructions[start].arg or 0
    return frozenset(i for i, name in enumerate(targets[:count]) if name not in read)
