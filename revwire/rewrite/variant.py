"""A frame's rewritten forward for one way of calling it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from revwire.pytree import tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from revwire._torch import TreeSpec
    from revwire.trace.guards import Guards


@dataclass(frozen=True)
class Variant:
    """A frame's rewritten forward, and the calls it holds for.

    Attributes:
        function: The generated code, of the module and its input leaves.
        output: How its results make up what the frame returns; None for one value or a tuple of values.
        guards: What a call has to agree on.
    """

    function: Callable[..., Any]
    output: TreeSpec | None
    guards: Guards

    def run(self, module: nn.Module, inputs: list[Any]) -> Any:
        """What the module returns for these input leaves."""
        result = self.function(module, *inputs)
        return result if self.output is None else tree_unflatten(list(result), self.output)
