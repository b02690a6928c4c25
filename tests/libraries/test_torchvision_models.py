"""torchvision's models: known by their tensors, converted, loaded again, and given back to torchvision."""

import pytest
import torch
import torchvision
from safetensors.torch import load_file

import revwire
from revwire import checkpoint, libraries
from revwire.checkpoint.fingerprint import index
from revwire.checkpoint.identify import identify
from revwire.checkpoint.same_function import same_operations
from revwire.errors import CheckpointError, RevwireError
from revwire.libraries import Architecture, torchvision_models
from tests.helpers.checkpoints import convert


def outline(name, **args):
    return Architecture(name, args, "torchvision").outline()


@pytest.fixture
def saved(tmp_path):
    """A `.pth` as training scripts of torchvision leave it."""

    def save(name, **args):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **args)
        path = tmp_path / "checkpoint.pth"
        torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, path)
        return model, path

    return save


def test_the_index_has_every_model_of_this_version():
    known = index("torchvision")
    missing = set(torchvision_models.names()) - known.architectures.keys()
    assert known.version != torchvision.__version__.partition("+")[0] or not missing
    assert {
        "vit_b_16",
        "swin3d_t",
        "mvit_v2_s",
        "convnext_tiny",
        "fcn_resnet50",
    } <= known.architectures.keys()
    assert "fasterrcnn_resnet50_fpn" not in known.architectures


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_t", {"num_classes": 10}),
        ("swin_v2_t", {}),
        ("vit_b_32", {"num_classes": 3, "image_size": 384}),
        ("convnext_tiny", {"num_classes": 5}),
        ("regnet_x_400mf", {"num_classes": 7}),
        ("mnasnet0_5", {}),
        ("mc3_18", {"num_classes": 11}),
        ("swin3d_t", {"num_classes": 11}),
        ("mvit_v2_s", {"num_classes": 11}),
        ("fcn_resnet50", {"num_classes": 4, "aux_loss": True}),
    ],
)
def test_known_by_tensors(name, args):
    found = identify(outline(name, **args).state_dict())
    assert found.only == Architecture(name, args, "torchvision")


def test_what_timm_computes_alike_is_one_function():
    found = identify(outline("resnet34", num_classes=3).state_dict())
    assert found.only == Architecture("resnet34", {"num_classes": 3})
    assert found.names == ["resnet34", "torchvision/resnet34"]


def test_sameness_is_of_operations():
    timm_s = Architecture("resnet18").outline()
    assert same_operations(timm_s, outline("resnet18"))
    assert not same_operations(Architecture("resnetblur18").outline(), outline("resnet18"))
    changed = outline("resnet18")
    changed.layer1[0].bn1.eps = 1e-3
    assert not same_operations(timm_s, changed)
    assert changed.training


def test_there_and_back(saved):
    model, path = saved("regnet_x_400mf", num_classes=3)
    done = convert(path)
    assert str(done.architecture) == 'torchvision/regnet_x_400mf {"num_classes": 3}'
    assert done.to_dict()["architecture"] == "torchvision/regnet_x_400mf"
    rewired = revwire.load(done.out)
    assert revwire.plan_of(rewired) == done.plan
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(revwire.unwire(rewired).eval()(images), model.eval()(images))
    back = checkpoint.to_original(done.out)
    again = torchvision.models.get_model("regnet_x_400mf", num_classes=3)
    again.load_state_dict(load_file(back.out))
    assert torch.equal(again.eval()(images), model(images))
    assert "torchvision.models.get_model('regnet_x_400mf', num_classes=3)" in back.architecture.recipe(
        back.out, back.fit
    )


@pytest.mark.slow
def test_verified(saved, monkeypatch):
    monkeypatch.setattr(torchvision_models, "_SIDE", 64)
    _, path = saved("resnet18", num_classes=2)
    done = convert(path, arch="torchvision/resnet18", verify=True)
    assert done.report.ok
    assert done.architecture == Architecture("resnet18", {"num_classes": 2}, "torchvision")


@pytest.mark.slow
def test_a_video_model(saved):
    _, path = saved("mc3_18", num_classes=2)
    done = convert(path)
    assert done.architecture.spec == "torchvision/mc3_18"
    assert done.plan.steps[0].trunk[2:] == (16, 56, 56)


def test_a_tie_is_chosen_from_by_name(saved):
    _, path = saved("resnet18", num_classes=2)
    with pytest.raises(
        CheckpointError, match=r"resnet18 .* \(= torchvision/resnet18\), resnetblur18.*--arch"
    ):
        convert(path)


@pytest.mark.slow
def test_a_head_that_was_changed_is_saved(tmp_path):
    model = torchvision.models.regnet_x_400mf(num_classes=3)
    model.fc = torch.nn.Linear(model.fc.in_features, 5)
    revwire.rewire(model)
    revwire.save(model, tmp_path / "m.safetensors")
    assert revwire.load(tmp_path / "m.safetensors").fc.out_features == 5
    other = revwire.rewire(torchvision.models.regnet_x_400mf())
    other.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 5, stride=2, padding=2))
    with pytest.raises(CheckpointError, match=r"cannot tell how this RegNet was built.*torchvision/NAME"):
        revwire.save(other, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("swin_tt", {}, "did you mean torchvision/swin_t"),
        ("fasterrcnn_resnet50_fpn", {}, "no image, video or segmentation model"),
        ("resnet18", {"weights": "DEFAULT"}, "may not hold 'weights'"),
        ("resnet18", {"wings": 2}, 'torchvision cannot build torchvision/resnet18 {"wings": 2}: TypeError'),
    ],
)
def test_what_is_refused(name, args, words):
    with pytest.raises(RevwireError) as caught:
        Architecture(name, args, "torchvision").build()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_b_32", (3, 224, 224)),
        ("swin3d_t", (3, 16, 112, 112)),
        ("mvit_v2_s", (3, 16, 224, 224)),
        ("inception_v3", (3, 299, 299)),
    ],
)
def test_example_inputs_are_taken(name, size):
    model = outline(name)
    inputs = libraries.example_inputs(model, batch=2)
    assert inputs.shape == (2, *size)
    model(inputs)


def test_spellings():
    assert Architecture.of("resnet18") == Architecture("resnet18")
    assert Architecture.of("torchvision/resnet18").spec == "torchvision/resnet18"
    assert Architecture.of("other/resnet18") == Architecture("other/resnet18")  # which timm does not know
    with pytest.raises(RevwireError, match="there is no library 'other'"):
        libraries.library("other")
