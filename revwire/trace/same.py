"""Whether a value is the one that code was traced with."""

from __future__ import annotations

import math


def same(one: object, other: object) -> bool:
    """Whether a value is the one that code was traced with."""
    try:
        if one is other or (type(one) is type(other) and bool(one == other)):
            return True
        return isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    except Exception:  # noqa: BLE001 - an object whose == is no yes or no is another object
        return False
