"""Folders and files of several parts, as the Hugging Face hub has them."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from revwire.checkpoint.reader import read
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import convert


@pytest.fixture
def sharded(tmp_path):
    """A ViT in two files and an index."""
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, tmp_path / file, {"format": "pt"})
    where = {name: file for file, own in parts.items() for name in own}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index, state


@pytest.mark.parametrize("folder", [True, False])
def test_weights_in_several_files(sharded, folder):
    index, state = sharded
    done = convert(index.parent if folder else index)
    assert done.out == index.with_name("model.revwire.safetensors")
    assert (done.architecture.name, done.architecture.model_args) == ("test_vit", {"num_classes": 3})
    assert done.source_bytes == sum(path.stat().st_size for path in index.parent.glob("model-*"))
    written = load_file(done.out)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


def test_a_part_is_never_overwritten(sharded):
    index, _ = sharded
    with pytest.raises(CheckpointError, match="is the input itself"):
        convert(index, out=index.with_name("model-00002-of-00002.safetensors"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "No such file"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "has no 'a'"),
    ],
)
def test_an_index_that_is_wrong(sharded, text, words):
    index, _ = sharded
    index.write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read(index)


def test_a_folder_of_timm(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=4), tmp_path, safe_serialization=True)
    done = convert(tmp_path)
    assert done.source == tmp_path
    assert done.architecture.model_args["num_classes"] == 4
    assert done.out == tmp_path / "model.revwire.safetensors"


def test_a_wrapper_of_transformers_around_timm(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    save_file(
        {f"timm_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors"
    )
    config = {"architecture": "resnet18", "model_type": "timm_wrapper"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path).architecture.name == "resnet18"


def test_an_architecture_by_name_goes_before_the_config(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="does not fit resnet18"):
        convert(tmp_path, arch="resnet18")


def test_a_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    tensors = read(path).tensors
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        tensors["a"]
