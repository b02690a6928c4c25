"""What is saved by a library's own means tells how it was rewired, and is heeded when it is loaded."""

import copy
import io
import json
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

import revwire
from revwire import checkpoint
from revwire.errors import CheckpointError, RewireError
from tests.helpers.checkpoints import convert
from tests.helpers.vits import small_vit

pytestmark = pytest.mark.filterwarnings("error:.*another function")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
WAYS = [
    {},
    {"coupling": "dr2net(alpha=0.6,beta=0.5)"},
    {"coupling": "momentum(gamma=0.5)", "exact": True},
    {"coupling": "bdia", "exclude": "*layers.0*"},
]


def of_transformers(kind=ViTForImageClassification):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    return kind(ViTConfig(image_size=32, patch_size=8, hidden_dropout_prob=0.0, **sizes))


def outcome(model, training):
    """Outputs and gradients."""
    model.train(training).zero_grad()
    torch.manual_seed(2)  # bdia draws signs
    out = model(IMAGES)
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_from_pretrained_and_rewire_give_the_same_network(tmp_path, way, training):
    model = revwire.rewire(of_transformers(), **way)
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    assert revwire.plan(again) == revwire.plan_of(model)
    revwire.rewire(again)
    torch.testing.assert_close(outcome(again, training), outcome(model, training), rtol=0, atol=0)
    assert revwire.plan_of(again) == revwire.plan_of(model)


def test_dials_are_free_and_the_function_is_not(tmp_path):
    revwire.rewire(of_transformers(), coupling="dr2net(alpha=0.6,beta=0.5)").save_pretrained(tmp_path)
    load = ViTForImageClassification.from_pretrained
    assert revwire.plan_of(revwire.rewire(load(tmp_path), keep=1)).coupling == "dr2net(alpha=0.6,beta=0.5)"
    assert (
        revwire.plan_of(revwire.rewire(load(tmp_path), budget="1GiB")).coupling
        == "dr2net(alpha=0.6,beta=0.5)"
    )
    for other in (
        {"coupling": "re2tal"},
        {"exact": True},
        {"exclude": "*layers.0*"},
        {"include": "*layers.[12]*"},
    ):
        with pytest.warns(UserWarning, match=r"config\.json says .* another function"):
            revwire.rewire(load(tmp_path), **other)


def test_what_is_asked_for_is_done_though_config_says_another(tmp_path):
    revwire.rewire(of_transformers(), coupling="bdia", exact=True).save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another function"):
        revwire.rewire(model, exact=False)
    assert revwire.plan_of(model).exact is False


def test_a_model_inside_another_is_rewired_as_it_was_there(tmp_path):
    revwire.rewire(of_transformers(), coupling="bdia").save_pretrained(tmp_path)
    inner = ViTModel.from_pretrained(tmp_path)
    assert revwire.plan_of(revwire.rewire(inner)).coupling == "bdia(gamma=0.5)"


def test_the_mark_goes_with_the_rewiring(tmp_path):
    model = of_transformers()
    before = json.loads(model.config.to_json_string()), dict(model.__dict__)
    revwire.rewire(model, coupling="bdia")
    revwire.unwire(model)
    assert json.loads(model.config.to_json_string()) == before[0]
    assert model.__dict__.keys() == before[1].keys()
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks
    model.save_pretrained(tmp_path)
    assert "revwire" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    "entry", ["re2tal", {}, {"plan": 3}, {"plan": {"model": "ViT", "coupling": "re2tal"}}, [1]]
)
def test_a_mark_that_is_none(tmp_path, entry):
    of_transformers().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "revwire": entry}))
    model = ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(RewireError, match="no mark of a rewired model"):
        revwire.rewire(model)
    with pytest.raises(CheckpointError, match="plan"):
        revwire.load(tmp_path)


def test_a_plan_that_no_longer_fits_names_the_way_out(tmp_path):
    revwire.rewire(of_transformers(), coupling="bdia").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["revwire"]["plan"]["chains"][0]["steps"][0]["module"] = "vit.of.an.older.version"
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(
        RewireError, match=r"no residual vit\.of\.an\.older.* pass coupling= to plan it afresh"
    ):
        revwire.rewire(model)
    with pytest.warns(UserWarning, match="another function"):
        revwire.rewire(model, coupling="bdia")


def test_the_commands_read_what_save_pretrained_wrote(tmp_path):
    model = revwire.rewire(of_transformers(), coupling="momentum(gamma=0.5)", exact=True)
    model.save_pretrained(tmp_path / "hf")
    wanted = outcome(model, training=False)
    torch.testing.assert_close(outcome(revwire.load(tmp_path / "hf"), training=False), wanted, rtol=0, atol=0)
    done = convert(tmp_path / "hf", tmp_path / "again.safetensors")
    assert done.plan == revwire.plan_of(model)
    torch.testing.assert_close(
        outcome(revwire.load(tmp_path / "again.safetensors"), training=False), wanted, rtol=0, atol=0
    )
    with pytest.warns(UserWarning, match="another function"):
        convert(tmp_path / "again.safetensors", tmp_path / "other.safetensors", coupling="bdia")
    checkpoint.to_original(tmp_path / "hf", tmp_path / "back")
    assert "revwire" not in json.loads((tmp_path / "back" / "config.json").read_text())
    plain = ViTForImageClassification.from_pretrained(tmp_path / "back")
    assert revwire.plan(plain).coupling == "re2tal"


class Wrapped(nn.Module):
    """As Lightning's modules hold a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    "around", [lambda model: model, Wrapped, nn.DataParallel], ids=["alone", "held", "parallel"]
)
def test_a_state_dict_tells_whoever_is_rewired_another_way(around):
    def model(**way):
        return around(revwire.rewire(small_vit(), **way))

    saved = model(coupling="dr2net(alpha=0.6,beta=0.5)").state_dict()
    assert saved.keys() == around(small_vit()).state_dict().keys()
    state = through_a_file({"state_dict": saved, "epoch": 3})["state_dict"]
    model(coupling="dr2net(alpha=0.6,beta=0.5)").load_state_dict(state)
    model(coupling="dr2net(alpha=0.6,beta=0.5)", keep=2).load_state_dict(state)
    around(small_vit()).load_state_dict(state)
    model().load_state_dict(around(small_vit()).state_dict())
    for other in (
        {"coupling": "dr2net(alpha=0.5,beta=0.5)"},
        {"coupling": "dr2net(alpha=0.6,beta=0.5)", "exact": True},
        {"coupling": "dr2net(alpha=0.6,beta=0.5)", "exclude": "blocks.0"},
    ):
        with pytest.warns(UserWarning, match="the weights that are loaded .* another function"):
            model(**other).load_state_dict(state)


def test_the_same_lengths_of_other_blocks_are_another_function():
    state = revwire.rewire(small_vit(), exclude="blocks.0").state_dict()
    with pytest.warns(UserWarning, match="in chains of other blocks"):
        revwire.rewire(small_vit(), exclude="blocks.2").load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_marked_and_heed(copied):
    model = copied(revwire.rewire(small_vit(), coupling="bdia"))
    with pytest.warns(UserWarning, match="another function"):
        revwire.rewire(small_vit()).load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="another function"):
        model.load_state_dict(revwire.rewire(small_vit()).state_dict())
    revwire.unwire(model)
    assert not model._state_dict_hooks
    model.load_state_dict(revwire.rewire(small_vit()).state_dict())


class Composed(PreTrainedModel):
    """A model of transformers that holds another one."""

    config_class = ViTConfig

    def __init__(self, inner):
        super().__init__(ViTConfig(attn_implementation="eager"))
        self.inner = inner


@pytest.mark.parametrize(
    "around", [lambda model: model, Wrapped, Composed], ids=["alone", "held", "composed"]
)
def test_a_schedule_moves_the_mark(tmp_path, around):
    model = revwire.rewire(of_transformers(), coupling="dr2net(alpha=0.6,beta=0.5)")
    schedule = revwire.Dr2NetSchedule(around(model), 2, start=(0.6, 0.5), end=(0.5, 0.6))
    schedule.step()
    schedule.step()
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(
        outcome(revwire.rewire(again), training=True), outcome(model, training=True), rtol=0, atol=0
    )
    again.load_state_dict(model.state_dict())


def test_what_a_later_version_left_is_not_read():
    state = revwire.rewire(small_vit()).state_dict()
    state._metadata[""]["revwire"] = json.dumps({"of": "another form"})
    revwire.rewire(small_vit(), coupling="bdia").load_state_dict(state)


@pytest.mark.parametrize("around", [lambda model: model, Wrapped], ids=["alone", "held"])
def test_a_training_checkpoint_loads_as_it_was_rewired(tmp_path, around):
    torch.manual_seed(0)
    model = revwire.rewire(timm.create_model("seresnet18", num_classes=3), coupling="bdia")
    torch.save({"state_dict": around(model).state_dict(), "epoch": 1}, tmp_path / "last.ckpt")
    again = revwire.load(tmp_path / "last.ckpt")
    assert revwire.plan_of(again) == revwire.plan_of(model)
    model.eval()
    assert torch.equal(again.eval()(IMAGES), model(IMAGES))
    # the tensors of averaged weights have no metadata of their own: nothing is said, nothing is refused
    torch.save({"state_dict": dict(model.state_dict())}, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="not a rewired checkpoint"):
        revwire.load(tmp_path / "plain.ckpt")


def test_a_plan_brings_its_coupling():
    model = revwire.rewire(small_vit(), coupling="bdia", exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = revwire.rewire(small_vit(), plan=revwire.plan_of(model))
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
