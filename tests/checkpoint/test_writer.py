"""Writing: whole or not at all, never over the input, byte for byte as safetensors does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from revwire.checkpoint import disk, writer
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import convert, same_bits


def test_the_input_is_never_overwritten(weights):
    link = weights.with_name("link.safetensors")
    link.symlink_to(weights)
    before = weights.read_bytes()
    for out in (weights, link, weights.parent / "." / weights.name):
        with pytest.raises(CheckpointError, match="is the input itself"):
            convert(weights, out)
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("nowhere/model.safetensors", "does not exist"),
        (".", "it is a folder"),
        ("model.pth", r"name it \*.safetensors"),
        ("\0.safetensors", "cannot write"),
        ("x" * 300 + ".safetensors", "cannot write"),
    ],
)
def test_outputs_that_cannot_be(weights, out, words):
    with pytest.raises(CheckpointError, match=words):
        convert(weights, weights.parent / out)


INTERRUPTIONS = [OSError("no space left on device"), KeyboardInterrupt()]


def failing(interruption):
    def fail(*_):
        raise interruption

    return fail


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(weights, monkeypatch, interruption):
    out = weights.with_name("out.safetensors")
    out.write_bytes(b"the old file")
    before = set(weights.parent.iterdir())
    # all bytes are written by then, into another place
    monkeypatch.setattr(disk.os, "fsync", failing(interruption))
    expected = CheckpointError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="no space left on device" if expected is CheckpointError else None):
        convert(weights, out)
    assert set(weights.parent.iterdir()) == before
    assert out.read_bytes() == b"the old file"


class Interrupted(dict):
    """Tensors that are read from a file as they are asked for, of which the last one cannot be."""

    def __init__(self, tensors, interruption):
        super().__init__(tensors)
        self.asked, self.interruption = 0, interruption

    def __getitem__(self, name):
        self.asked += 1
        if self.asked == 2 * len(self):  # the sizes of all are asked for first
            raise self.interruption
        return super().__getitem__(name)


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_a_write_that_fails_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, interruption):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"the old file")
    tensors = Interrupted({"a": torch.ones(3), "b": torch.ones(2)}, interruption)
    expected = CheckpointError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="no space left on device" if expected is CheckpointError else None):
        writer.write(out, tensors, {})
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"the old file"


def test_shared_views_and_scalars_are_written_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "tied": base,
        "transposed": base.T,
        "row": base[1],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
    }
    writer.write(tmp_path / "x.safetensors", tensors, {"k": "v"})
    assert same_bits(load_file(tmp_path / "x.safetensors"), tensors)


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()])
def test_tensors_without_bytes_are_refused(tmp_path, tensor):
    with pytest.raises(CheckpointError, match="cannot write w"):
        writer.write(tmp_path / "x.safetensors", {"w": tensor}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_those_that_safetensors_writes(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5).half(),
        "a.weight": torch.randn(7),
        "ü": torch.randn(2, dtype=torch.float64),
        "c": torch.randn(2, dtype=torch.complex64),
        "d": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "flag": torch.tensor([True]),
        "n": torch.tensor(7),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    writer.write(ours, tensors, {"k": "v"})
    save_file(tensors, theirs, {"k": "v"})
    assert ours.read_bytes() == theirs.read_bytes()
