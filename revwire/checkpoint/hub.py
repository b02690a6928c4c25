"""Checkpoints of the Hugging Face hub by name, `hf-hub:timm/resnet50.a1_in1k`: fetched into the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from revwire.errors import CheckpointError

PREFIX = "hf-hub:"
# What is fetched: the pickle only where there is nothing better.
_SAFE = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["config.json", "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def is_hub(path: str | Path) -> bool:
    """Whether a checkpoint is named on the hub."""
    return str(path).startswith(PREFIX)


def located(path: str | Path) -> Path:
    """The checkpoint on this machine: fetched, where it is named on the hub.

    Args:
        path: A path, or `hf-hub:NAME`, with `@REVISION` where it is not the newest.

    Raises:
        CheckpointError: The hub has no such model, has no weights of it, or can't be reached.
    """
    if not is_hub(path):
        return Path(path)
    folder = _fetched(str(path), _SAFE)
    if not any(folder.glob("*.safetensors")):
        folder = _fetched(str(path), _PICKLES)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{path} has neither model.safetensors nor pytorch_model.bin; download its checkpoint and name the file"
        )
    return folder


def default_out(path: str | Path) -> Path:
    """Where a checkpoint of the hub is converted to: the current folder."""
    name = str(path).removeprefix(PREFIX).partition("@")[0].rpartition("/")[2]
    return Path(f"{name}.revwire.safetensors")


def _fetched(path: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = path.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{path} is gated: accept its licence on huggingface.co and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"the hub has no {path}: check the name, and log in with `hf auth login` if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{path} is no name on the hub, which are of the form {PREFIX}OWNER/NAME"
        ) from error
    except Exception as error:  # of the hub's library or of the HTTP library that it happens to use
        raise CheckpointError(
            f"cannot fetch {path}: the hub is out of reach ({type(error).__name__}) and it is not in the cache; "
            f"download the folder where there is a network, and name it here"
        ) from error
