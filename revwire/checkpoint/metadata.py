"""What a rewired checkpoint says about itself: written by `convert` and `save`, read by `load`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from revwire.checkpoint.limits import JSON_CHARACTERS, check_json
from revwire.errors import CheckpointError, RewireError
from revwire.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from revwire.libraries import Architecture

_PLAN, _COUPLING, _VERSION = "revwire.plan", "revwire.coupling", "revwire.version"


def rewiring_metadata(architecture: Architecture, plan: Plan) -> dict[str, str]:
    """What a rewired checkpoint says about itself, for `load` and for other readers."""
    from revwire.version import __version__

    return {
        "format": "pt",
        "architecture": architecture.spec,
        "model_args": json.dumps(dict(architecture.model_args)),
        _PLAN: plan.to_json(),
        _COUPLING: plan.coupling,
        _VERSION: __version__,
    }


def is_rewired(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata is that of a rewired checkpoint."""
    return _PLAN in metadata


def without_rewiring(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the same tensors as a checkpoint of the original model."""
    return {key: text for key, text in metadata.items() if not key.startswith("revwire.")}


def rewiring_of(metadata: Mapping[str, str], path: Path) -> Plan:
    """The plan that a rewired checkpoint carries.

    Raises:
        CheckpointError: The file was not written by revwire, or its plan cannot be read.
    """
    if not is_rewired(metadata):
        raise CheckpointError(f"{path} is not a rewired checkpoint: make one with `revwire convert {path}`")
    again = (
        f"convert the original again (written by revwire {metadata.get(_VERSION, 'of unknown version')[:50]})"
    )
    try:
        plan = Plan.from_dict(parse_json(metadata[_PLAN], f"{path}: the plan in its metadata"))
    except RewireError as error:
        raise CheckpointError(f"{path}: the plan in its metadata is {error}; {again}") from error
    if plan.coupling != metadata.get(_COUPLING, plan.coupling):
        raise CheckpointError(
            f"{path} names two couplings, {plan.coupling!r} and {metadata[_COUPLING][:50]!r}; {again}"
        )
    return plan


def parse_json(text: str, what: str) -> dict[str, Any]:
    """A JSON object from outside.

    Args:
        text: The JSON text.
        what: Where it comes from, for the message.

    Raises:
        CheckpointError: Too long, not JSON, not an object, or beyond what `revwire.checkpoint.limits` lets pass.
    """
    if len(text) > JSON_CHARACTERS:
        raise CheckpointError(f"{what} is {len(text)} characters long; at most {JSON_CHARACTERS} are read")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} is a JSON {type(data).__name__}, not an object")
    check_json(data, what)
    return data
