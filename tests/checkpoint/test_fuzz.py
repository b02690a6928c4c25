"""Real files, cut and changed: nothing but revwire's own error, and nothing in a file is run."""

import contextlib
import json
import re

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from revwire import checkpoint
from revwire.checkpoint.architecture import check_fit, resolve
from revwire.checkpoint.reader import read
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import FUZZ, Trap
from tests.helpers.vits import NAME

KINDS = ["safetensors", "zip", "legacy", "trap", "legacy-trap"]


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
    architecture = resolve(source)
    check_fit(architecture, source.tensors_for(architecture.library), str(path))


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
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        examine(path)
    assert not trap.exists()


@pytest.mark.slow
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
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.* metadata"):
        checkpoint.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of transformers, and its configuration."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("folder")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8))
    save_file(model.state_dict(), path / "model.safetensors")
    config = json.loads(model.config.to_json_string(use_diff=False))
    return path, {**config, "architectures": ["ViTModel"]}


WORDS = ["", "vit", "bert", "ViTModel", "BertModel", "auto", "gelu", "float16", "../x", "__class__"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "model_type", "architectures", "auto_map", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps", "qkv_bias", "num_labels",
    "id2label", "dtype", "initializer_range", "quantization_config", "_attn_implementation", "pooler_act",
    "return_dict", "problem_type", "vision_config", "text_config", "to_dict", "__class__", "intermediate_size",
]  # fmt: skip


@pytest.mark.slow
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_changed_configurations_of_transformers(folder, changes):
    path, config = folder
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with contextlib.suppress(CheckpointError):
        examine(path)


@pytest.mark.slow
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_changed_configurations_in_metadata(folder, tmp_path, changes):
    path, config = folder
    file = tmp_path / "file.safetensors"
    text = json.dumps({**config, **changes})
    state = load_file(path / "model.safetensors")
    save_file(
        state, file, {"architecture": "transformers/ViTModel", "model_args": text, "revwire.plan": "{}"}
    )
    with contextlib.suppress(CheckpointError):
        examine(file)
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        checkpoint.load(file)


@FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4)
)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_bits_in_a_file_raise_only_checkpoint_errors(tmp_path, kind, flips):
    path = tmp_path / "model"
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}
    if kind == "safetensors":
        save_file(tensors, path, {"architecture": NAME})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        source = read(path)
    except CheckpointError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in source.tensors.values())


@FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=2)
)
def test_flipped_bits_in_a_header_raise_only_checkpoint_errors(rewired, tmp_path, flips):
    content = bytearray(rewired.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for place, bit in flips:
        content[int(place * length)] ^= 1 << bit
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        checkpoint.load(path)


@FUZZ
@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x10" + bytes(7) + b"{"]),
)
def test_any_bytes_raise_only_checkpoint_errors(tmp_path, content, head):
    path = tmp_path / "model"
    path.write_bytes(head + content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read(path)
