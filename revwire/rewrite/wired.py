"""Questions to a rewired model (its plan, its options), and the way back to the classes that it had."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from revwire._torch import not_compiled
from revwire.errors import RewireError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from revwire.planning.plan import Plan
    from revwire.run.coupling import Coupling
    from revwire.run.options import Options
from typing import TYPE_CHECKING

PROGRAM = "_revwire_program"


"""The attribute that holds a rewired module's `Program`."""


PLAN = "_revwire_plan"


PLANNED = "_revwire_planned"


"""The attribute of a rewired model that holds the programs of its modules, by path."""


def unwire(model: nn.Module) -> nn.Module:
    """Put a rewired model back: the same classes, the same code, the parameters as they are now.

    Raises:
        RewireError: the model is not rewired, or the class of one of its modules was replaced since (FSDP2,
            parametrizations).
    """
    for module in _wired(model, "so there is nothing to undo"):
        _take_off(module)
    return model


@contextmanager
def unwired(model: nn.Module) -> Iterator[nn.Module]:
    """For the length of the block, a rewired model is the network it was: what runs in between is the original.

    For tools that look at what every module returns and know nothing but tensors (torchinfo, torchview), and to compare
    with the original network on the weights of now. A backward of what ran before the block may run within it.

    Raises:
        RewireError: as `unwire`.
    """
    taken = [
        (module, type(module), _take_off(module)) for module in _wired(model, "so it is the network it was")
    ]
    try:
        yield model
    finally:
        for module, cls, own in taken:
            module.__class__ = cls
            module.__dict__.update(own)


def _wired(model: nn.Module, otherwise: str) -> list[nn.Module]:
    """The modules whose classes were made here."""
    wired = [(path, module) for path, module in model.named_modules() if is_wired(module)]
    if not wired:
        raise RewireError(f"{type(model).__name__} is not rewired, {otherwise}")
    for path, module in wired:
        if "revwire_original" not in vars(type(module)):
            raise RewireError(
                f"{path or '(model)'}: since it was rewired its class was replaced by {type(module).__name__}, as "
                "fully_shard and parametrizations do; undo that first, or unwire before it"
            )
    return [module for _, module in wired]


def _take_off(module: nn.Module) -> dict[str, Any]:
    """Put a module's class back; returns the attributes that the class made here went by."""
    module.__class__ = cast("Any", type(module)).revwire_original
    return {name: module.__dict__.pop(name) for name in (PROGRAM, PLAN, PLANNED) if name in module.__dict__}


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


def set_coupling(model: nn.Module, coupling: Coupling) -> None:
    """Have the next forward of a rewired model run another recurrence; one in flight keeps its own."""
    for module in model.modules():
        if (program := module.__dict__.get(PROGRAM)) is not None:
            program.options = replace(program.options, coupling=coupling)
