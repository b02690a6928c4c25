"""Files of each layout are loaded whole, or what does not fit is told."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.re2tal.backbones.build import build_backbone, is_file, named
from examples.re2tal.errors import Re2TALError
from examples.re2tal.weights.families import SIZES, found_in
from examples.re2tal.weights.layouts import written
from tests.re2tal.weights.made import CASES, SLOWFAST, SWIN, VIDEOMAE, stored


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_each_layout_is_loaded_whole(case, tmp_path):
    path = tmp_path / "weights.safetensors"
    backbone, _ = stored(case, path)
    name, options = CASES[case][0]
    loaded = build_backbone(name, weights=path, **options)
    assert loaded.state_dict().keys() == backbone.state_dict().keys()
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert (loaded.mean, loaded.std) == (backbone.mean, backbone.std)
    clip = torch.randn(1, 3, 16, 64, 32)
    outputs = [network.eval()(clip) for network in (loaded, backbone)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_writes_the_files_own_names(case, tmp_path):
    path = tmp_path / "weights.safetensors"
    backbone, tensors = stored(case, path)
    _, found = found_in(path)
    back = written(found, backbone.state_dict())
    wanted = {re.sub("^module.", "", key): tensor for key, tensor in tensors.items()}
    wanted = {
        key: tensor for key, tensor in wanted.items() if "pos_embed" not in key and "fc_norm" not in key
    }
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_from_the_tensors(case, tmp_path):
    path = tmp_path / "weights.safetensors"
    stored(case, path)
    name, options = CASES[case][0]
    family, found = found_in(path)
    sizes = SIZES[family](found.get)
    told = {key: value for key, value in options.items() if key not in {"size", "num_attention_heads"}}
    assert told.items() <= sizes.items()
    assert name.partition("_")[0] == named(family, sizes)[0].partition("_")[0]


def test_windows_without_their_index_are_taken_to_be_as_high_as_wide(tmp_path):
    path = tmp_path / "weights.safetensors"
    backbone = build_backbone("swin3d_t", **{**SWIN[1], "window_size": (4, 3, 3)})
    tensors = {n: t for n, t in backbone.state_dict().items() if not n.endswith("relative_position_index")}
    save_file(tensors, path)
    family, found = found_in(path)
    assert SIZES[family](found.get)["window_size"] == [4, 3, 3]
    build_backbone("swin3d_t", weights=path, **{**SWIN[1], "window_size": (4, 3, 3)})


@pytest.mark.parametrize("name", ["swin3d_t", "slowfast_r101", "videomae_l"])
def test_published_sizes_have_their_name(name):
    with torch.device("cpu" if name == "swin3d_t" else "meta"):  # windows are read from numbers
        backbone = build_backbone(name)
    family = {"sw": "video_swin", "sl": "slowfast", "vi": "videomae"}[name[:2]]
    assert named(family, SIZES[family](backbone.state_dict().get)) == (name, {})


def spoiled(tmp_path, change, case="mmaction2 Video Swin"):
    path = tmp_path / "weights.safetensors"
    stored(case, path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    name, options = CASES[case][0]
    with pytest.raises(Re2TALError) as caught:
        build_backbone(name, weights=path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_listed_by_name_and_shape(tmp_path):
    def change(tensors):
        del tensors["backbone.layers.0.blocks.0.norm1.bias"]
        tensors["backbone.layers.0.blocks.0.adapter.weight"] = torch.zeros(3, 4)
        tensors["backbone.layers.1.blocks.0.attn.qkv.weight"] = torch.zeros(48, 15)

    message = spoiled(tmp_path, change)
    assert "missing: backbone.layers.0.blocks.0.norm1.bias (8)" in message
    assert "left over: backbone.layers.0.blocks.0.adapter.weight (3x4)" in message
    assert "of another shape: backbone.layers.1.blocks.0.attn.qkv.weight (48x15, not 48x16)" in message
    assert "examples.re2tal.convert" in message


def test_numbers_that_the_network_computes_have_to_be_the_same(tmp_path):
    def other_index(tensors):
        tensors["backbone.layers.0.blocks.0.attn.relative_position_index"] += 1

    assert "other numbers than the network computes: backbone.layers.0" in spoiled(tmp_path, other_index)

    def learned(tensors):
        tensors["backbone.pos_embed"] += 1

    assert "other numbers than the network computes: backbone.pos_embed (1x32x12)" in spoiled(
        tmp_path, learned, "mmaction2 VideoMAE"
    )


def test_a_long_list_is_cut(tmp_path):
    def change(tensors):
        for i in range(30):
            tensors[f"backbone.more.{i}"] = torch.zeros(1)

    assert "and 10 more" in spoiled(tmp_path, change)


def test_a_file_of_another_family_is_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    stored("mmaction2 Video Swin", path)
    with pytest.raises(
        Re2TALError, match=r"it holds Video Swin of mmaction2; choose a backbone\.name of that"
    ):
        build_backbone("slowfast_r50", weights=path)
    save_file({"layer1.0.conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(
        Re2TALError, match=r"\(layer1.0.conv1.weight, ...\) are of no layout known here: SlowFast of"
    ):
        build_backbone("slowfast_r50", weights=path)
    with pytest.raises(Re2TALError, match="Video Swin of mmaction2, Video Swin, rewired by Re2TAL"):
        found_in(path)


def test_an_option_has_its_way_against_the_file(tmp_path):
    """The plain weights of mmaction2 begin a network of Re2TAL's wiring, as in the paper."""
    path = tmp_path / "weights.safetensors"
    stored("mmaction2 SlowFast", path)
    clip = torch.randn(1, 3, 16, 32, 32)
    plain, other = (
        build_backbone("slowfast_r50", weights=path, **SLOWFAST[1], **more).eval()
        for more in ({}, {"wiring": "re2tal"})
    )
    assert not torch.allclose(plain(clip)[0], other(clip)[0])


def test_a_wiring_that_the_file_has_no_tensors_for_is_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    stored("rewired SlowFast", path)
    with pytest.raises(Re2TALError, match=r"missing: backbone\.slow_path\.conv1_lateral\.bn\.weight \(2\)"):
        build_backbone("slowfast_r50", weights=path, **SLOWFAST[1], wiring="pytorchvideo")


def test_videomae_keeps_its_table_for_pictures_of_another_size(tmp_path):
    path = tmp_path / "weights.safetensors"
    backbone, _ = stored("mmaction2 VideoMAE", path)
    loaded = build_backbone("videomae_b", weights=path, **{**VIDEOMAE[1], "size": 64})
    clip = torch.randn(1, 3, 16, 64, 64)
    assert torch.equal(loaded.eval()(clip), backbone.eval()(clip))


def test_what_is_a_file():
    assert is_file("epoch_54.pth.tar")
    assert is_file("SLOWFAST_8x8_R101.pyth")
    assert not is_file("KINETICS400_V1")
    assert not is_file("MCG-NJU/videomae-base")
    assert not is_file(None)
