"""Which architecture a checkpoint is of, by what it says or is told, and whether its tensors fit it."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from revwire import checkpoint
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import ARGS, convert, same_bits, vit
from tests.helpers.vits import NAME


def bare(tmp_path, **args):
    path = tmp_path / "model.safetensors"
    save_file(vit(**args).state_dict(), path)
    return path


def test_the_architecture_passed_goes_before_the_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(vit().state_dict(), path, {"architecture": "resnet18"})
    assert convert(path, arch=NAME, model_args=ARGS).architecture.name == NAME


def test_arguments_alone_go_over_those_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    without = {k: v for k, v in ARGS.items() if k != "num_classes"}
    save_file(vit().state_dict(), path, {"architecture": NAME, "model_args": json.dumps(without)})
    assert convert(path, model_args={"num_classes": 10}).architecture.model_args == ARGS


def test_the_config_that_timm_writes_beside_the_file(tmp_path):
    timm.models.save_for_hf(vit(), tmp_path, safe_serialization=True)
    done = convert(tmp_path / "model.safetensors")
    assert done.architecture.name == NAME
    assert done.architecture.model_args["embed_dim"] == 48


def test_the_metadata_goes_before_the_config(weights):
    weights.with_name("config.json").write_text('{"architecture": "resnet18"}')
    assert convert(weights).architecture.name == NAME


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "neither its metadata nor a config.json"),
        (
            '{"architectures": ["ViTForImageClassification"]}',
            "does not fit transformers/ViTForImageClassification",
        ),
        ('{"vocab_size": 9}', "neither its metadata nor a config.json"),
        ('{"architecture": "vit_tny_patch16_224"}', "did you mean vit_tiny_patch16_224"),
        ('{"architecture": "resnet18", "model_args": 3}', "must be JSON objects"),
        ("not json", "config.json is not JSON"),
        ("[1]", "config.json is a JSON list, not an object"),
        ('{"a":' * 100_000, "config.json is not JSON"),
    ],
)
def test_an_unknown_architecture(tmp_path, config, words):
    path = bare(tmp_path)
    if config is not None:
        path.with_name("config.json").write_text(config)
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"model_args": "{"}, "model_args in its metadata is not JSON"),
        ({"model_args": '{"pretrained": true}'}, "may not hold 'pretrained'"),
        ({"model_args": '{"checkpoint_path": "/etc/passwd"}'}, "may not hold 'checkpoint_path'"),
        ({"model_args": '{"wings": 2}'}, "timm cannot build"),
        ({"model_args": " " * 2**24 + "{}"}, "characters long"),
        ({"architecture": "hf-hub:timm/resnet18"}, "timm has no model"),
    ],
)
def test_hostile_metadata(tmp_path, metadata, words):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path, {"architecture": NAME, **metadata})
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert words in str(caught.value)


def test_misfits_are_named_with_found_and_wanted_shapes(tmp_path):
    state = vit(num_classes=7).state_dict()
    del state["norm.weight"]
    state["extra.weight"] = torch.ones(2, 3)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        convert(path, arch=NAME, model_args=ARGS)
    text = str(caught.value)
    assert "missing: norm.weight (48)" in text
    assert "not in the architecture: extra.weight (2x3)" in text
    assert "of another shape: head.bias (found 7, wanted 10), head.weight (found 7x48, wanted 10x48)" in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_first_few_misfits_are_named(tmp_path):
    path = bare(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"missing: (\S+ \S+ ){2}\S+ \S+ and \d+ more; of another shape"
    ):
        convert(path, arch=NAME)


def test_a_wrong_architecture_costs_no_memory(tmp_path):
    path = bare(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):  # 4 TB, were it built to be compared
        convert(path, arch=NAME, model_args={"embed_dim": 300_000, "num_heads": 3, "depth": 1})


def test_a_number_of_another_kind_does_not_fit(tmp_path):
    state = vit().state_dict()
    state["norm.weight"] = state["norm.weight"].to(torch.int32)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"norm.weight \(found 48 int32, wanted 48\)"):
        convert(path, arch=NAME, model_args=ARGS)


def test_batch_counters_may_be_missing(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / "old.safetensors"
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    model, _ = checkpoint.load_plain(path, arch="resnet18")
    assert same_bits(model.state_dict(), state)
