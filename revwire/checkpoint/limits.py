"""Limits on what a file from a stranger can make of itself, looked at before anything is unpacked or built.

What a checkpoint says is believed only as far as the bytes that it has brought can fill it: a header, a configuration
or a zip directory of a few kilobytes can name billions of layers, numbers and bytes.
"""

from __future__ import annotations

import math
import threading
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as nn_module

from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

JSON_CHARACTERS = 16 * 2**20
"""Of one JSON text; timm's largest config.json (22k class names) has two million."""
JSON_DEPTH = 64
"""Of objects and lists within each other; configurations nest less than ten deep."""
INTEGER = 2**63
"""No integer of a configuration is as large as that."""
UNPACKED = 4
"""How many times the bytes of a file its content may be, beside `ALLOWANCE`; torch stores without compressing."""
ALLOWANCE = 64 * 2**20
"""Bytes that any file may take."""
COUNT = 2**16
"""What a number among the arguments of a model may be however small the file, such as the side of an image."""
PARTS, PARTS_BESIDE = 64, 20_000
"""Modules and tensors that a model may have for each tensor in the file, and beside those."""
BUILT, BUILT_BESIDE = 8, 2**30
"""How many times the bytes of the tensors in the file its model may be, and bytes beside those."""

_TOLD = (
    "pass the architecture (arch=, --arch) and the arguments (model_args=, --model-args) it was trained with"
)


def check_json(data: Any, what: str) -> None:
    """Refuse values that no configuration has and that code chokes on later.

    Raises:
        CheckpointError: nested too deep, an integer of more than 63 bits, or a number that is not finite.
    """
    waiting = [(data, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > JSON_DEPTH:
            raise CheckpointError(f"{what} is nested more than {JSON_DEPTH} deep")
        if isinstance(value, dict):
            waiting += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            waiting += [(each, depth + 1) for each in value]
        elif isinstance(value, int) and abs(value) >= INTEGER:
            raise CheckpointError(f"{what} has an integer of {value.bit_length()} bits; at most 63 are read")
        elif isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{what} has a number that is not finite ({value})")


def check_unpacked(path: Path) -> None:
    """Refuse a zip file whose directory promises far more than the file holds.

    Raises:
        CheckpointError: it does, or there is no directory.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole torch checkpoint of tensors ({error}): it is truncated, damaged or "
            f"of another format; download or save it again"
        ) from error
    if unpacked > UNPACKED * size + ALLOWANCE:
        raise CheckpointError(
            f"{path} has {size} bytes and would be {unpacked} unpacked, which no checkpoint is; download it again"
        )


def check_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that repeat a few stored numbers over shapes of any size (a stride of 0).

    Raises:
        CheckpointError: they take far more memory than was stored.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    stored = sum(storage.nbytes() for storage in storages.values())
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > UNPACKED * stored + ALLOWANCE:
        raise CheckpointError(
            f"{path} stores {stored} bytes of numbers and repeats them over tensors of {size}; save a state dict whose "
            "tensors are stored in full, {name: tensor.clone() for ...}"
        )


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all there, each in its place."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested:
        return False
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized


def check_arguments(model_args: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse counts and sizes that the tensors of a file cannot fill.

    Args:
        model_args: The arguments that a model would be built with.
        tensors: What would be loaded into it.
        what: Where they come from, for the message.

    Raises:
        CheckpointError: a number is larger than any that the tensors can be told by.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    most = max(COUNT, held)

    def check(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                check(f"{name}.{key}", each)
        elif isinstance(value, list | tuple):
            for each in value:
                check(name, each)
        elif isinstance(value, int | float) and not abs(value) <= most:
            raise CheckpointError(
                f"{what} does not fit a model with {name[:100]}={value}: its tensors have {held} numbers in all; "
                f"{_TOLD}"
            )

    for name, value in model_args.items():
        check(str(name), value)


@contextmanager
def built_within(tensors: Mapping[str, Tensor], what: str) -> Iterator[None]:
    """For the length of the block, this thread builds no model that is far larger than the tensors for it.

    Args:
        tensors: What would be loaded into it.
        what: Where they come from, for the message.

    Raises:
        CheckpointError: a model has many times more parts than there are tensors, or bytes than they have.
    """
    thread = threading.get_ident()
    parts = PARTS * len(tensors) + PARTS_BESIDE
    size = BUILT * sum(tensor.nbytes for tensor in tensors.values()) + BUILT_BESIDE

    def registered(_: object, name: str, part: object) -> None:
        nonlocal parts, size
        if threading.get_ident() != thread:
            return
        parts -= 1
        size -= part.nbytes if isinstance(part, torch.Tensor) and not part.is_nested else 0
        if parts < 0 or size < 0:
            raise CheckpointError(
                f"{what} does not fit the model that it names, which is many times larger than the {len(tensors)} "
                f"tensors in it (at {name}); {_TOLD}"
            )

    handles = [
        nn_module.register_module_parameter_registration_hook(registered),
        nn_module.register_module_buffer_registration_hook(registered),
        nn_module.register_module_module_registration_hook(registered),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
