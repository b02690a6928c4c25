"""Data from outside as the dataclasses that it is written from: every field of the kind that its annotation names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from revwire.errors import RewireError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_Data = TypeVar("_Data")


class Strict:
    """Base of the dataclasses that are read: nothing is taken for what it is not, and no field is unknown."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}


def read(kind: type[_Data], data: Any) -> _Data:
    """A dataclass from its `asdict` form.

    Args:
        kind: The class, of `Strict` ones through and through.
        data: Dicts, lists, numbers and texts, as JSON has them.

    Raises:
        RewireError: a field is missing, unknown, or of another kind; the message names its place.
    """
    from pydantic import ValidationError

    noun = kind.__name__.lower()
    try:
        # JSON has no tuples: only of a text does a strict reading take a list for one
        found: _Data = _adapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise RewireError(f"not a {noun}: {f'{place}: ' if place else ''}{fault['msg']}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RewireError(f"not a {noun}: {error}") from error
    return found


_ADAPTERS: dict[type, Any] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """What reads a class: making one takes longer than reading with it."""
    from pydantic import TypeAdapter

    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    found: TypeAdapter[Any] = _ADAPTERS[kind]
    return found
