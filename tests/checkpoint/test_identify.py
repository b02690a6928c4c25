"""Architectures known by the names and shapes of their tensors."""

import gzip
import json
from importlib.resources import files
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from revwire import checkpoint
from revwire.checkpoint.fingerprint import index, index_name, packed
from revwire.checkpoint.identify import identify
from revwire.checkpoint.reader import read
from revwire.cli.app import app
from revwire.errors import CheckpointError
from revwire.libraries import Architecture
from revwire.libraries.comparison import settings, shapes_of
from tests.helpers.checkpoints import convert

SMALL = "test_vit"  # whose tensors no other has


def outline(name, **args):
    return Architecture(name, args).outline()


def found(name, **args):
    return identify(outline(name, **args).state_dict())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint that says nothing but its tensors, in any wrapping."""

    def save(name, wrap=lambda state: state, suffix="safetensors", **args):
        path = tmp_path / f"file.{suffix}"
        state = wrap(timm.create_model(name, **args).state_dict())
        torch.save(state, path) if suffix == "pth" else save_file(state, path)
        return path

    return save


def test_the_index_is_small_and_of_every_architecture():
    content = files("revwire.checkpoint").joinpath(index_name("timm")).read_bytes()
    assert len(content) < 200_000
    known = index("timm")
    assert len(known.architectures) > 1000
    missing = set(timm.list_models()) - known.architectures.keys()
    assert known.version != timm.__version__ or not missing
    data = json.loads(gzip.decompress(content))
    assert packed("x", {}) == packed("x", {})  # nothing of the moment in it
    assert data["version"] == known.version


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {}),
        ("resnet18", {"num_classes": 10, "in_chans": 1}),
        ("resnet18", {"num_classes": 0}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "img_size": 160}),
        ("convnext_atto", {"num_classes": 3}),
        pytest.param(
            "vit_small_patch14_dinov2", {"num_classes": 11, "img_size": 224}, marks=pytest.mark.slow
        ),
        pytest.param("beit_base_patch16_224", {"img_size": 384, "num_classes": 9}, marks=pytest.mark.slow),
        ("mixer_s32_224", {"num_classes": 2, "img_size": 320}),
        pytest.param("cait_xxs24_224", {"img_size": 384}, marks=pytest.mark.slow),
    ],
)
def test_classes_channels_and_size_are_read_off(name, args):
    expected = outline(name, **args)
    choices = found(name, **args).choices
    fitting = [each for group in choices for each in group if each.spec == name]
    assert [dict(each.model_args) for each in fitting] == [args]
    for group in choices:
        for each in group:
            assert shapes_of(each.outline()) == shapes_of(expected)


@pytest.mark.parametrize(
    ("name", "twin"), [("efficientnet_b0", "tf_efficientnet_b0"), ("resnet50", "resnet50_gn")]
)
def test_only_what_fits_is_a_choice(name, twin):
    names = found(name).names
    assert name in names
    assert (twin in names) == (shapes_of(outline(name)) == shapes_of(outline(twin)))


def test_other_names_of_the_same_function_are_no_tie():
    choices = found("vit_tiny_patch16_384").choices
    assert len(choices) == 1
    assert choices[0][0].name == "vit_tiny_patch16_384"  # which needs no arguments
    assert "vit_tiny_patch16_224" in [each.name for each in choices[0]]


def test_what_tensors_do_not_show_is_seen():
    plain, quick = (
        settings(outline(name))
        for name in ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224")
    )
    assert plain != quick
    assert settings(outline("resnet18")) == settings(outline("resnet18", drop_rate=0.3))


def test_a_file_without_a_word_is_converted(saved):
    path = saved("vit_tiny_patch16_224", num_classes=3)
    done = convert(path)
    assert done.architecture == Architecture("vit_tiny_patch16_224", {"num_classes": 3})
    assert checkpoint.load(done.out).num_classes == 3


@pytest.mark.slow
def test_a_tie_is_listed_and_chosen_from(saved):
    path = saved("efficientnet_b0", num_classes=4)
    with pytest.raises(CheckpointError, match=r"fits \d+ architectures") as caught:
        convert(path)
    assert 'efficientnet_b0 {"num_classes": 4}' in str(caught.value)
    assert "tf_efficientnet_b0" in str(caught.value)
    assert "--arch" in str(caught.value)
    assert list(path.parent.iterdir()) == [path]
    done = convert(path, arch="tf_efficientnet_b0")  # the name is enough, the classes are read off
    assert done.architecture == Architecture("tf_efficientnet_b0", {"num_classes": 4})
    result = CliRunner().invoke(app, ["convert", str(path)])
    assert result.exit_code == 1
    assert "tf_efficientnet_b0" in result.stderr


def test_a_model_of_no_index_says_what_is_near(saved):
    path = saved("vit_tiny_patch16_224", embed_dim=48)
    with pytest.raises(
        CheckpointError, match=r"none has tensors of these shapes; the names are those of .* and \d+ more"
    ) as caught:
        convert(path)
    assert "--model-args" in str(caught.value)
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="its tensors are not those of any of the"):
        convert(path)


def test_a_doubtful_index_is_never_believed(saved):
    path = saved("resnet18")
    liar = mock.Mock()
    liar.with_shapes.return_value = ["resnet34", "vit_tiny_patch16_224", "no_such_model"]
    liar.with_names.return_value = []
    liar.version, liar.architectures = "0", {}
    with (
        mock.patch("revwire.checkpoint.identify.index", return_value=liar),
        pytest.raises(CheckpointError, match="cannot tell the architecture"),
    ):
        convert(path)


def prefixed(*prefixes):
    return lambda state: {"".join(prefixes) + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "prefixes",
    [
        ("module.",),
        ("model.",),
        ("_orig_mod.",),
        ("module.", "_orig_mod."),
        ("_orig_mod.", "module.", "model."),
    ],
)
def test_wrappers_are_peeled_off_names(saved, prefixes, suffix):
    path = saved(SMALL, prefixed(*prefixes), suffix, num_classes=2)
    done = convert(path)
    assert done.architecture == Architecture(SMALL, {"num_classes": 2})
    assert "blocks.0.attn.qkv.weight" in load_file(done.out)


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (lambda state: {"state_dict": prefixed("model.")(state), "epoch": 3}, "state_dict"),
        (lambda state: {"ema": {"module": state, "updates": 3}, "model": {}}, "ema.module"),
        (lambda state: {"model_ema": state, "model": prefixed("x.")(state)}, "model_ema"),
        (lambda state: {"model": {"state_dict": state}}, "model.state_dict"),
    ],
)
def test_wrappers_are_peeled_off_files(saved, wrap, entry):
    done = convert(saved(SMALL, wrap, "pth"))
    assert done.entry == entry
    assert done.architecture.name == SMALL


def test_a_parameter_under_two_names_is_refused(saved):
    path = saved(SMALL, lambda state: {**state, "module.head.bias": state["head.bias"].clone()})
    with pytest.raises(CheckpointError, match="under several names"):
        read(path)
