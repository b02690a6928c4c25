"""Real files, cut and changed: nothing but revwire's own error, and nothing in a file is run."""

import contextlib
import os

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from revwire import checkpoint
from revwire.checkpoint.architecture import resolve
from revwire.checkpoint.fit import check_fit
from revwire.checkpoint.reader import read
from revwire.errors import CheckpointError

KINDS = ["safetensors", "zip", "legacy", "trap", "legacy-trap"]
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The bytes of a real checkpoint in every format, and the folder that those with code in them would make."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=2).state_dict()
    trap = folder / "trap"
    path = folder / "file"
    contents = {}
    for kind in KINDS:
        if kind == "safetensors":
            save_file(state, path, {"architecture": "test_vit", "model_args": '{"num_classes": 2}'})
        else:
            content = {"state_dict": state, "x": Trap(trap)} if "trap" in kind else {"state_dict": state}
            torch.save(content, path, _use_new_zipfile_serialization="legacy" not in kind)
        contents[kind] = path.read_bytes()
    return contents, trap


def examine(path):
    """What `convert` does with a file before it builds a model; and reading every byte."""
    source = read(path)
    for tensor in source.tensors.values():
        tensor.view(-1).sum()
    check_fit(resolve(source), source.tensors, str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_what_the_fuzzing_takes_them_for(tmp_path, real, kind):
    contents, trap = real
    path = tmp_path / "file"
    path.write_bytes(contents[kind])
    if "trap" in kind:
        with pytest.raises(CheckpointError, match="could run code"):
            examine(path)
        torch.load(path, weights_only=False)  # it does run code, where it is let
        trap.rmdir()
    else:
        examine(path)


@FUZZ
@given(part=st.floats(0, 1, exclude_max=True))
@pytest.mark.parametrize("kind", KINDS)
def test_cut_files(tmp_path, real, kind, part):
    contents, trap = real
    content = contents[kind]
    path = tmp_path / "file"
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError):
        examine(path)
    assert not trap.exists()


@FUZZ
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
    near_the_end=st.booleans(),
)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_bytes(tmp_path, real, kind, changes, near_the_end):
    contents, trap = real
    content = bytearray(contents[kind])
    span = min(4096, len(content))  # where headers, pickles and directories are
    for place, byte in changes:
        start = len(content) - span if near_the_end else 0
        content[start + int(place * span)] = byte
    path = tmp_path / "file"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        examine(path)
    assert not trap.exists()


def test_a_load_of_a_changed_file_is_no_crash(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.ones(2)}, path, {"revwire.plan": "{}", "architecture": "test_vit"})
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
