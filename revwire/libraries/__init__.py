"""timm, torchvision and transformers behind one interface: the only room that knows them by name.

Each has a module with the functions of `revwire.libraries.interface.Library`; it is imported when it is first asked.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revwire.libraries.interface import (
    INDEXED,
    MARK,
    NAMES,
    OF_THE_HUB,
    OPTIONAL,
    TIMM,
    Architecture,
    Library,
    Variants,
    describe,
    example_inputs,
    from_config,
    from_training,
    library,
    library_of,
    noise,
    register,
    respelled,
    settings_of,
    sized_inputs,
    variants,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "INDEXED",
    "MARK",
    "NAMES",
    "OF_THE_HUB",
    "OPTIONAL",
    "TIMM",
    "Architecture",
    "Library",
    "Variants",
    "describe",
    "example_inputs",
    "from_config",
    "from_training",
    "library",
    "library_of",
    "noise",
    "respelled",
    "settings_of",
    "sized_inputs",
    "variants",
]


def _module(name: str) -> Callable[[], Any]:
    return lambda: import_module(f"{__name__}.{name}")


def _variants(module: str) -> Callable[[str], Variants]:
    return lambda name: import_module(f"{__name__}.{module}").Variants(name)


register("timm", _module("timm_models"), _variants("timm_variants"))
register("torchvision", _module("torchvision_models"), _variants("torchvision_models"))
register("transformers", _module("transformers_models"))
