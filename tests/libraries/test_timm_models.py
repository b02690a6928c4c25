"""What revwire knows about timm models: their input, their names, how they were built."""

import json

import pytest
import timm
import torch
from torch import nn

from revwire.errors import RevwireError
from revwire.libraries import Architecture, timm_models
from tests.helpers.vits import SMALL_VIT

SMALL = {**SMALL_VIT, "depth": 2}


def outline(name, **args):
    with torch.device("meta"):
        return timm.create_model(name, **args)


def unrecorded(name, **args):
    """A model as older versions of timm leave it, which note nothing on it."""
    model = outline(name, **args)
    vars(model).pop("_model_args", None)
    return model


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("vit_tiny_patch16_224", {**SMALL, "in_chans": 1}, (1, 32, 32)),
        ("vit_tiny_patch16_224", {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2}, (1, 8, 8)),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 2}, (3, 32, 64)),
        ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (1, 1, 1, 1)}, (3, 112, 112)),
        ("mixer_s16_224", {"img_size": 64}, (3, 64, 64)),
        ("resnet18", {"in_chans": 4}, (4, 224, 224)),
        ("resnet18", {"features_only": True}, (3, 224, 224)),
        ("botnet26t_256", {}, (3, 256, 256)),
    ],
)
def test_example_inputs_are_what_the_model_was_built_for(name, args, size):
    model = outline(name, **args)
    images = timm_models.example_inputs(model, batch=3)
    assert images.shape == (3, *size)
    assert images.device.type == "meta"
    model(images)


def test_example_inputs_without_what_recent_timm_notes_on_a_model():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, in_chans=1)
    for attribute in ("_traits", "_model_args", "in_chans"):
        vars(model).pop(attribute, None)
    assert timm_models.example_inputs(model).shape == (2, 1, 32, 32)


def test_example_inputs_leave_the_global_generator_alone_and_repeat():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).bfloat16()
    before = torch.get_rng_state()
    first, second = timm_models.example_inputs(model), timm_models.example_inputs(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16


def test_no_example_inputs_for_models_of_others():
    assert timm_models.example_inputs(nn.Linear(2, 2)) is None

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Module()
            self.patch_embed.img_size = (8, 8)

    assert timm_models.example_inputs(Foreign()) is None


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("vit_tny_patch16_224", "vit_tiny_patch16_224"),
        ("vit-base-patch16-224", "vit_base_patch16_224"),
        ("resnet5", "resnet50"),
        ("ResNet50", "resnet50"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("vit_base_patch16_244.augreg_in1k", "vit_base_patch16_224"),
    ],
)
def test_near_names(asked, meant):
    near = timm_models.near_names(asked)
    assert meant in near
    assert len(near) <= 3


def test_no_near_name_is_better_than_a_far_one():
    assert timm_models.near_names("my_own_network") == []
    assert "timm.list_models()" in timm_models.unknown_name("my_own_network")


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("vit_tny_patch16_224", {}, "did you mean vit_tiny_patch16_224"),
        ("hf-hub:timm/resnet18", {}, "timm has no model"),
        ("local-dir:/tmp", {}, "timm has no model"),
        ("resnet18", {"pretrained": True}, "may not hold 'pretrained'"),
        ("resnet18", {"checkpoint_path": "x.pth"}, "may not hold 'checkpoint_path'"),
        ("resnet18", {"depth": 3}, 'timm cannot build resnet18 {"depth": 3}: TypeError'),
    ],
)
def test_create_refuses(name, args, words):
    with pytest.raises(RevwireError) as caught:
        timm_models.create(name, args)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {**SMALL, "in_chans": 1, "num_classes": 10, "drop_path_rate": 0.1}),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 2, "global_pool": "avg"}),
        ("resnet18", {"features_only": True, "out_indices": (1, 2)}),
        ("convnext_atto", {}),
    ],
)
def test_describe_tells_how_timm_built_it(name, args):
    found = timm_models.describe(outline(name, **args))
    assert found == Architecture(name, json.loads(json.dumps(args)))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 10, "in_chans": 1, "img_size": [32, 32]}),
        ("swin_tiny_patch4_window7_224", {"img_size": [112, 112]}),
        ("resnet18", {"num_classes": 7, "in_chans": 1}),
        ("resnet18", {}),
    ],
)
def test_describe_without_timms_record(name, args):
    assert timm_models.describe(unrecorded(name, **args)) == Architecture(name, args)


def test_describe_follows_changes_made_after_building():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.reset_classifier(5)
    model.set_input_size((64, 64))
    found = timm_models.describe(model)
    assert found.model_args["num_classes"] == 5
    assert found.model_args["img_size"] == [64, 64]


def test_describe_goes_by_what_is_known():
    model = unrecorded("vit_tiny_patch16_224", **SMALL)
    model.reset_classifier(5)
    found = timm_models.describe(model, Architecture("vit_tiny_patch16_224", SMALL))
    assert found == Architecture("vit_tiny_patch16_224", {**SMALL, "num_classes": 5})


def test_describe_draws_no_random_numbers():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    before = torch.get_rng_state()
    timm_models.describe(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Linear(2, 2), "does not carry the name of a timm model"),
        (lambda: outline("vit_tiny_patch16_224", **SMALL, act_layer=nn.SiLU), "written as JSON"),
        (lambda: unrecorded("vit_tiny_patch16_224", **SMALL), "cls_token is (1, 1, 48), not (1, 1, 192)"),
        (
            lambda: unrecorded("vit_tiny_patch16_224", num_heads=6),
            "blocks.0.attn.num_heads is 6, not 3",
        ),  # of the same shapes
    ],
    ids=["not timm", "not JSON", "other shapes", "other settings"],
)
def test_describe_says_when_it_cannot_tell(build, words):
    with pytest.raises(RevwireError) as caught:
        timm_models.describe(build())
    assert words in str(caught.value)
    assert "pass arch=" in str(caught.value)


def test_from_config_takes_what_differs_from_the_named_model():
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": {"depth": 2},
        "pretrained_cfg": {"num_classes": 1000, "input_size": [1, 32, 32], "fixed_input_size": True},
    }
    args = {"num_classes": 10, "in_chans": 1, "img_size": [32, 32], "depth": 2}
    assert timm_models.from_config(config, {}) == Architecture("vit_tiny_patch16_224", args)


def test_from_config_of_the_old_layout():
    config = {"architecture": "resnet18", "num_classes": 1000, "input_size": [3, 224, 224]}
    assert timm_models.from_config(config, {}) == Architecture("resnet18", {})


def test_from_config_of_another_library():
    assert timm_models.from_config({"architectures": ["ViTForImageClassification"]}, {}) is None
