"""Questions to a rewired model: its plan, its options, whether it is whole."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from revwire._torch import not_compiled
from revwire.errors import RewireError

if TYPE_CHECKING:
    from torch import nn

    from revwire.planning.plan import Plan
    from revwire.run.options import Options

PROGRAM = "_revwire_program"
"""The attribute that holds a rewired module's `Program`."""
PLAN = "_revwire_plan"
"""The attribute of a rewired model that holds its `Plan`."""
PLANNED = "_revwire_planned"
"""The attribute of a rewired model that holds the programs of its modules, by path."""


@not_compiled
def check_complete(model: nn.Module) -> None:
    """Check that a model still holds every module that was rewired, whatever is around them now.

    Fusing (`reparameterize_model` of timm) puts other modules in the place of blocks, and what these stood for, the
    planned network, is then no more.

    Raises:
        RewireError: one is gone.
    """
    planned: dict[str, Any] = model.__dict__.get(PLANNED, {})
    if all(_program_at(model, path) is program for path, program in planned.items()):
        return
    # wrappers (torch.compile, checkpointing, adapters) hold the modules further down
    at = {id(m.__dict__[PROGRAM]): path for path, m in model.named_modules() if PROGRAM in m.__dict__}
    if gone := [path for path, program in planned.items() if id(program) not in at]:
        found = _module_at(model, gone[0])
        now = "is gone" if found is None else f"was replaced by {type(found).__name__}"
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise RewireError(
            f"{gone[0]}{more} {now} since {type(model).__name__} was rewired, and with it the planned network; "
            "to fuse or replace blocks, call revwire.unwire(model) first, then fuse, then rewire"
        )
    model.__dict__[PLANNED] = {at[id(program)]: program for program in planned.values()}


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def _program_at(model: nn.Module, path: str) -> Any:
    module = _module_at(model, path)
    return None if module is None else module.__dict__.get(PROGRAM)


def is_wired(module: nn.Module) -> bool:
    """Whether a module's class was made here."""
    return hasattr(type(module), "revwire_original")


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a model was rewired by, None if it is not rewired."""
    return model.__dict__.get(PLAN)


def options_of(model: nn.Module) -> Options | None:
    """How the steps of a rewired model run, None if it is not rewired."""
    return next((m.__dict__[PROGRAM].options for m in model.modules() if PROGRAM in m.__dict__), None)


def with_options(model: nn.Module, options: Options) -> nn.Module:
    """A deep copy of a rewired model whose steps run another way."""
    duplicate = copy.deepcopy(model)
    for module in duplicate.modules():
        if (program := module.__dict__.get(PROGRAM)) is not None:
            program.options = options
    return duplicate
