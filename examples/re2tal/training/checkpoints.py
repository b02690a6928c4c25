"""Checkpoints of a run: whole or not there, so that a run which is killed at any moment goes on from the last one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from examples.re2tal.errors import Re2TALError
from revwire.checkpoint.disk import written_whole

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

# the same file whatever the number of processes, and whether weights are sharded
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_NAME = re.compile(r"step-(\d+)\.pt")


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state, whole, on the CPU; every process has to call this."""
    return {
        "model": get_model_state_dict(model, options=_WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_WHOLE),
    }


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Weights, whole, on the CPU; every process has to call this."""
    return get_model_state_dict(model, options=_WHOLE)


def restore(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take up what `state_of` gave."""
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=whole)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, and remove all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    try:
        with written_whole(path) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's writer names its own place instead of what the disk said
        raise Re2TALError(f"cannot write {path}: {_said_by_disk(error)}") from error
    for old in _all(folder)[:-keep]:
        old.unlink()


def _said_by_disk(error: BaseException) -> str:
    """What the operating system said, where an error came of that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__context__
    return f"the disk is full or refuses ({str(error).splitlines()[0]})"


def latest(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, None if there is none.

    Raises:
        Re2TALError: it cannot be read.
    """
    paths = _all(folder)
    if not paths:
        return None
    try:
        state: dict[str, Any] = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # a torn file fails in any way
        raise Re2TALError(
            f"{paths[-1]} cannot be read ({error}); remove it to go on from the one before"
        ) from None
    return state


def trained_weights(run: Path) -> dict[str, Any]:
    """The model of a run's last checkpoint, with its averaged weights where it has them.

    Raises:
        Re2TALError: the folder holds none.
    """
    state = latest(run / "checkpoints")
    if state is None:
        raise Re2TALError(f"{run} holds no trained run; give the output folder of examples.re2tal.train")
    return {**state["model"], **(state["average"] or {})}


def _all(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
