"""Rewired models from files and into files: with their plan, coupling and grid, in training or not."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import revwire
from revwire import checkpoint
from revwire.errors import CheckpointError
from revwire.rewrite.wired import options_of
from tests.helpers.checkpoints import ARGS, metadata_of, same_bits, vit
from tests.helpers.vits import NAME


def test_load_gives_the_rewired_model_ready_to_train(rewired):
    model = checkpoint.load(rewired)
    assert model.training
    assert isinstance(model, type(vit()))
    assert revwire.plan_of(model).to_json() == metadata_of(rewired)["revwire.plan"]
    assert same_bits(dict(model.state_dict()), load_file(rewired))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_load_computes_what_rewiring_the_original_computes(rewired):
    images = torch.randn(2, 3, 32, 32)
    expected = revwire.rewire(vit())(images)
    assert torch.equal(checkpoint.load(rewired)(images), expected)


def test_load_leaves_the_global_generator_alone(rewired):
    before = torch.get_rng_state()
    checkpoint.load(rewired)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_plain_undoes_a_conversion(rewired):
    model, plan = checkpoint.load_plain(rewired)
    assert plan.coupling == "re2tal"
    assert revwire.plan_of(model) is None
    assert same_bits(dict(model.state_dict()), dict(vit().state_dict()))


def test_load_asks_for_a_conversion_first(weights):
    with pytest.raises(CheckpointError, match=f"revwire convert {weights}"):
        checkpoint.load(weights)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"revwire.plan": "[]"}, "plan in its metadata is a JSON list"),
        ({"revwire.plan": '{"model": "X"}'}, "convert the original again (written by revwire"),
        ({"revwire.coupling": "other"}, "names two couplings, 're2tal' and 'other'"),
        ({"model_args": json.dumps({**ARGS, "depth": 1})}, "not in the architecture: blocks.1"),
    ],
)
def test_load_refuses_metadata_that_does_not_fit(rewired, tmp_path, changed, words):
    path = tmp_path / "changed.safetensors"
    save_file(load_file(rewired), path, {**metadata_of(rewired), **changed})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert words in str(caught.value)


def test_load_refuses_a_plan_of_another_model(rewired, tmp_path):
    plan = json.loads(metadata_of(rewired)["revwire.plan"])
    plan["chains"][0]["steps"][0]["module"] = "blocks.17"
    path = tmp_path / "changed.safetensors"
    save_file(load_file(rewired), path, {**metadata_of(rewired), "revwire.plan": json.dumps(plan)})
    with pytest.raises(CheckpointError, match="its plan does not fit"):
        checkpoint.load(path)


def test_save_and_load_a_model_in_training(rewired, tmp_path):
    model = checkpoint.load(rewired)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    path = tmp_path / "trained.safetensors"
    checkpoint.save(model, path)
    again = checkpoint.load(path)
    assert same_bits(dict(again.state_dict()), dict(model.state_dict()))
    assert not same_bits(dict(again.state_dict()), load_file(rewired))
    assert revwire.plan_of(again) == revwire.plan_of(model)
    assert model.training


def test_save_remembers_the_architecture_through_deepcopy(rewired, tmp_path):
    model = copy.deepcopy(checkpoint.load(rewired))
    vars(model).pop("_model_args", None)  # nothing of timm's to go by
    model.pretrained_cfg = model.default_cfg = {}
    checkpoint.save(model, tmp_path / "copy.safetensors")
    assert metadata_of(tmp_path / "copy.safetensors")["architecture"] == NAME
    assert not any("revwire" in key for key in model.state_dict())


def test_save_sees_that_the_model_was_changed(rewired, tmp_path):
    model = checkpoint.load(rewired)
    model.reset_classifier(3)
    checkpoint.save(model, tmp_path / "three.safetensors")
    assert checkpoint.load(tmp_path / "three.safetensors").num_classes == 3


def test_save_a_model_that_never_was_a_file(tmp_path):
    model = revwire.rewire(vit())
    before = torch.get_rng_state()
    checkpoint.save(model, tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert checkpoint.load(tmp_path / "model.safetensors").num_classes == 10


def test_save_asks_for_an_architecture_it_cannot_tell(tmp_path):
    model = revwire.rewire(vit(act_layer=torch.nn.SiLU))
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="pass arch="):
        checkpoint.save(model, path)
    checkpoint.save(model, path, arch=NAME, model_args={**ARGS, "act_layer": "silu"})
    assert isinstance(checkpoint.load(path).blocks[0].mlp.act, torch.nn.SiLU)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "resnet18"}, "does not fit resnet18"),
        ({"arch": "vit_tny_patch16_224"}, "did you mean vit_tiny"),
        ({"model_args": ARGS}, "belongs to arch="),
    ],
)
def test_save_refuses_a_wrong_architecture(rewired, tmp_path, options, words):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(checkpoint.load(rewired), tmp_path / "model.safetensors", **options)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_model_that_is_not_rewired(tmp_path):
    with pytest.raises(CheckpointError, match="not rewired: call revwire"):
        checkpoint.save(vit(), tmp_path / "model.safetensors")


def test_coupling_and_grid_are_kept_in_a_checkpoint(tmp_path):
    model = revwire.rewire(vit(), coupling="dr2net", exact=12)
    revwire.Dr2NetSchedule(model, 2, end=(0.5, 0.5)).step()
    moved = options_of(model)
    assert moved.coupling != revwire.Dr2Net()
    checkpoint.save(model, tmp_path / "m.safetensors")
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert options_of(loaded) == moved
    assert options_of(loaded).exact == revwire.Grid(12)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


class Own(revwire.Coupling):
    """Not among the named ones."""


def test_a_coupling_that_no_file_can_name_is_not_saved(tmp_path):
    model = revwire.rewire(vit(), coupling=Own(1, 0, 1))
    with pytest.raises(CheckpointError, match=r"use revwire.Coupling\(1, 0, 1\)"):
        checkpoint.save(model, tmp_path / "m.safetensors")
