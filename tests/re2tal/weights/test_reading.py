"""What is read of a file, and what is refused: nothing in a file is run."""

import argparse
import fractions
import os
import sys
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples.re2tal.errors import Re2TALError
from examples.re2tal.weights import reading
from examples.re2tal.weights.reading import read

WEIGHTS = {"a": torch.ones(2)}


def saved(tmp_path, content, **how):
    path = tmp_path / "weights.pth"
    torch.save(content, path, **how)
    return path


@pytest.fixture
def log_buffer(monkeypatch):
    """A class as mmengine's `HistoryBuffer`: it pickles arrays, and the functions that evaluate them."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.log = np.array([0.5, 0.25])
            self.last, self.counts = np.float64(0.25), np.array([1, 2])

        def mean(self):
            return self.log.mean()

        def __getstate__(self):
            return {**vars(self), "statistics_methods": {"mean": HistoryBuffer.mean}}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (WEIGHTS, ""),
        ({"state_dict": WEIGHTS, "meta": {"epoch": 3}}, "state_dict"),
        ({"state_dict": {"a": torch.zeros(2)}, "state_dict_ema": WEIGHTS}, "state_dict_ema"),
        ({"state_dict": WEIGHTS, "state_dict_ema": None}, "state_dict"),
        ({"model_state": WEIGHTS, "epoch": 1}, "model_state"),
        ({"module": {"module.a": WEIGHTS["a"]}, "args": argparse.Namespace(lr=1.0)}, "module"),
        ({"model_ema": {"module": WEIGHTS}}, "model_ema.module"),
        ({"state_dict": {"module._orig_mod.a": torch.nn.Parameter(WEIGHTS["a"])}}, "state_dict"),
    ],
)
def test_weights_are_found_averaged_ones_first(content, entry, zipped, tmp_path):
    stored = read(saved(tmp_path, content, _use_new_zipfile_serialization=zipped))
    assert stored.entry == entry
    assert torch.equal(stored.tensors["a"], WEIGHTS["a"])
    assert len(stored.tensors) == 1
    assert not stored.tensors["a"].requires_grad


def test_log_buffers_of_mmengine_are_passed_over(log_buffer, tmp_path, monkeypatch):
    hub = {"log_scalars": OrderedDict(loss=log_buffer)}
    path = saved(tmp_path, {"state_dict": WEIGHTS, "message_hub": hub})
    for name in list(sys.modules):
        if name.startswith("mmengine"):
            monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read(path).tensors["a"], WEIGHTS["a"])


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (Runs(os.system, "touch OWNED"), f"{os.system.__module__}.system"),
        (Runs(print, "owned"), "print"),
        (fractions.Fraction(1, 2), "fractions.Fraction"),
    ],
)
def test_other_objects_are_named_and_not_read(beside, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"state_dict": WEIGHTS, "beside": beside})
    with pytest.raises(
        Re2TALError, match=rf"pickles {named} beside its weights.*save the weights alone"
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "OWNED").exists()


def test_a_name_that_stands_for_a_function_calls_none(tmp_path):
    """`getattr` is allowed, for the names in mmengine's buffers, and does nothing."""
    path = saved(tmp_path, {"state_dict": WEIGHTS, "beside": Runs(getattr, torch.Tensor, "numel")})
    assert list(read(path).tensors) == ["a"]
    with torch.serialization.safe_globals(reading.DATA):
        assert torch.load(path, weights_only=True)["beside"] is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "there are no tensors"),
        ({"epoch": 3}, "'epoch' is a int, no tensor"),
        ({"state_dict": {"a": [1.0]}}, "'a' is a list, no tensor"),
        ({"state_dict": {}}, "there are no tensors"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "weights of several models"),
    ],
)
def test_files_without_weights_are_told(content, told, tmp_path):
    with pytest.raises(Re2TALError, match=told):
        read(saved(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"<html>not found</html>", b"\x09\0\0\0\0\0\0\0{", b"PK\x03\x04 and then nothing"],
)
def test_files_that_are_none_are_told_in_one_line(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with (
        warnings.catch_warnings(),
        pytest.raises(Re2TALError, match=r"is (no|not a) whole .*download or save it again") as caught,
    ):
        read(path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    for write in (save_file, torch.save):
        write({"a": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(Re2TALError, match=r"is (no|not a) whole"):
            read(path)
    with pytest.raises(Re2TALError, match="it is a folder"):
        read(tmp_path)
    with pytest.raises(Re2TALError, match="No such file"):
        read(tmp_path / "none.pth")


def test_a_state_dict_that_holds_itself(tmp_path):
    own: dict = {}
    own["state_dict"] = own
    torch.save(own, tmp_path / "own.pth")
    with pytest.raises(Re2TALError, match="there are no tensors"):
        read(tmp_path / "own.pth")
