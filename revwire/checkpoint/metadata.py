"""What a rewired checkpoint says about itself: written by `convert` and `save`, read by `load`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from revwire.checkpoint.disk import text_of
from revwire.checkpoint.limits import JSON_CHARACTERS, check_json
from revwire.errors import CheckpointError, RewireError
from revwire.libraries import MARK
from revwire.planning.plan import Plan

if TYPE_CHECKING:
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


def left_beside(state: Mapping[Any, Any]) -> dict[str, str]:
    """What a rewired model has left in the metadata of its state_dict, as metadata of ours; nothing if none has."""
    told = getattr(state, "_metadata", None)
    entries = told.values() if isinstance(told, Mapping) else ()
    texts = [each.get(MARK) for each in entries if isinstance(each, Mapping)]
    found = [text for text in texts if isinstance(text, str)]
    return {_PLAN: found[0]} if len(found) == 1 else {}


def in_config(path: Path) -> dict[str, str]:
    """The same of a `config.json` of transformers, which `save_pretrained` wrote for a rewired model."""
    try:
        config = parse_json(text_of(path, JSON_CHARACTERS), str(path))
    except (FileNotFoundError, CheckpointError):  # of no matter yet, or told by whoever needs more of it
        return {}
    entry = config.get(MARK)
    if entry is None:
        return {}
    return {_PLAN: json.dumps(entry.get("plan") if isinstance(entry, dict) else entry)}


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
