"""Files that are not what they should be: refused in one line, and nothing in them is run."""

import argparse

import pytest
import torch
from safetensors.torch import load_file, save_file

from revwire.checkpoint.reader import read
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import ARGS, Trap, convert, same_bits, vit
from tests.helpers.vits import NAME


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "model.pth"
    torch.save({"state_dict": vit().state_dict(), "x": Trap(trap)}, path)
    with pytest.raises(CheckpointError, match="unpickling that could run code") as caught:
        convert(path)
    assert "weights_only" not in str(caught.value)  # torch's own message tells how to run it
    assert not trap.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files_of_tensors(tmp_path, legacy):
    state = vit().state_dict()
    path = tmp_path / "model.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    done = convert(path, arch=NAME, model_args=ARGS)
    assert done.out == tmp_path / "model.revwire.safetensors"
    assert same_bits(load_file(done.out), dict(state))


def test_a_training_checkpoint_of_timm(tmp_path):
    averaged = {f"module.{k}": v for k, v in vit().state_dict().items()}
    arguments = argparse.Namespace(
        model=NAME,
        num_classes=10,
        in_chans=None,
        model_kwargs={k: v for k, v in ARGS.items() if k != "num_classes"},
    )
    state = {k: torch.zeros_like(v) for k, v in averaged.items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        {"arch": NAME, "args": arguments, "epoch": 3, "state_dict": state, "state_dict_ema": averaged}, path
    )
    done = convert(path, tmp_path / "out.safetensors")
    assert done.entry == "state_dict_ema"
    assert same_bits(load_file(done.out), dict(vit().state_dict()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "is no state dict"),
        ({"epoch": 3}, "its entry 'epoch' is a int"),
        ({}, "is no state dict"),
        ([torch.ones(3)], "is no state dict"),
        ({"w": torch.eye(3).to_sparse()}, "is not a state dict"),
    ],
)
def test_torch_files_of_something_else(tmp_path, content, words):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"\x01", "not a whole safetensors file"),
        ("model.safetensors", b"garbage" * 100, "not a whole safetensors file"),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}" * 40, "not a whole safetensors file"),
        ("model.safetensors", b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("model.safetensors", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        ("model.safetensors", b"PK\x03\x04" + bytes(100), "not a whole torch checkpoint"),
        ("model.pth", b"garbage" * 100, "not a whole torch checkpoint"),
        ("model.bin", b"\x80\x02garbage", "not a whole torch checkpoint"),
        ("model.pth", b"<html>", "a web page"),
    ],
)
def test_files_of_other_formats(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="cannot open"):
        read("\0")


@pytest.mark.parametrize("legacy", [None, False, True], ids=["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.999])
def test_truncated_files(tmp_path, legacy, part):
    path = tmp_path / "model"
    if legacy is None:
        save_file(vit().state_dict(), path)
    else:
        torch.save(vit().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=r"truncated, damaged or of another format"):
        read(path)
