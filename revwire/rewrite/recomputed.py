"""What replaces the forward of a block between chains, where that is to run again in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire._torch import not_compiled
from revwire.run.recompute import run_again
from revwire.trace.frame import original_forward

if TYPE_CHECKING:
    from torch import nn

    from revwire.run.options import Options


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
        return run_again(self.path, [module], original_forward(module), self.options, args, kwargs)
