"""Values on the command line, read and written."""

from __future__ import annotations

import json
import math
from typing import Any

import typer


def parse_arguments(text: str | None) -> dict[str, Any] | None:
    """The JSON object of --model-args."""
    if text is None:
        return None
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--model-args") from error
    if not isinstance(arguments, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object", param_hint="--model-args")
    return arguments


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """The three numbers of --input-size, or four of a clip."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (3, 4) or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not of the form 3x224x224", param_hint="--input-size")
    return tuple(map(int, parts))


def finite(data: Any) -> Any:
    """The same data with None for NaN and infinities, which JSON does not have."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
