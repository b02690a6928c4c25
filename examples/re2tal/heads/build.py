"""A head by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads import actionformer, convolutional

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.re2tal.heads.base import Head

_BUILDERS: dict[str, Callable[..., Head]] = {
    "actionformer": actionformer.build,
    "convolutional": convolutional.build,
}

NAMES = tuple(_BUILDERS)


def build_head(name: str, *, in_channels: int, classes: int, **options: Any) -> Head:
    """Build a head.

    Args:
        name: One of `NAMES`.
        in_channels: Channels of the features.
        classes: How many classes there are.
        options: Of that head.

    Raises:
        Re2TALError: there is none of that name, or it has no such option.
    """
    if name not in _BUILDERS:
        raise Re2TALError(f"there is no head {name!r}; choose one of {', '.join(NAMES)}")
    try:
        return _BUILDERS[name](in_channels, classes, **options)
    except TypeError as error:
        raise Re2TALError(f"head {name}: {error}") from None
