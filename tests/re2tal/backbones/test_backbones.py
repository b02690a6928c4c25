import copy

import pytest
import torch
from safetensors.torch import save_file

import revwire
from examples.re2tal.backbones.base import Backbone, pieces, rejoined
from examples.re2tal.backbones.build import NAMES, build_backbone
from examples.re2tal.detector import Detector
from examples.re2tal.errors import Re2TALError
from examples.re2tal.training.strategy import lay_out

TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}

SMALL = {
    "convnet": ({"width": 4, "center": True}, 16, 32, 8),
    "swin3d_t": ({}, 8, 32, 4),
    "videomae_b": ({"size": 32, "intermediate_size": 64, **TOKENS}, 32, 32, 16),
    "vjepa2_l": (
        {
            "size": 32,
            **TOKENS,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 1,
        },
        8,
        32,
        4,
    ),
}
"""Arguments, pictures, side and steps of a small one of each."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(name):
    options, frames, side, steps = SMALL[name]
    backbone = build_backbone(name, **options)
    for parameter in backbone.parameters():
        if parameter.ndim == 1:  # norms that are all ones hide mistakes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return backbone, torch.randn(2, 3, frames, side, side), steps


@pytest.mark.parametrize("name", SMALL)
def test_features_over_time(name):
    backbone, clip, steps = small(name)
    assert isinstance(backbone, Backbone)
    assert backbone(clip).shape == (2, backbone.channels, steps)


@pytest.mark.parametrize("name", ["convnet", "swin3d_t"])
@pytest.mark.parametrize("frames", [8, 24])
def test_any_number_of_pictures(name, frames):
    backbone, *_ = small(name)
    assert backbone(torch.randn(1, 3, frames, 32, 32)).shape[2] == frames // 2


@pytest.mark.parametrize("name", SMALL)
def test_rewired_gradients_are_right(name):
    backbone, clip, _ = small(name)
    report = revwire.verify(backbone, (clip,))
    assert report.ok, report.to_dict()
    assert len(revwire.plan(backbone, (clip,)).chains) > 0


@pytest.mark.parametrize("strategy", ["plain", "checkpoint", "frozen"])
@pytest.mark.parametrize("name", ["convnet", "videomae_b"])
def test_ways_that_change_no_function_change_none(name, strategy):
    backbone, clip, _ = small(name)
    backbone.eval()
    wanted = backbone(clip)
    own = lay_out(copy.deepcopy(backbone), clip, strategy=strategy).eval()
    assert torch.equal(own(clip), wanted)


def test_checkpointed_gradients_are_plain_ones():
    backbone, clip, _ = small("convnet")
    other = lay_out(copy.deepcopy(backbone), clip, strategy="checkpoint")
    for model in (backbone, other):
        model(clip).square().mean().backward()
    for one, two in zip(backbone.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-6)


def test_a_frozen_backbone_learns_nothing_and_moves_no_statistics():
    backbone, clip, _ = small("convnet")
    frozen = lay_out(backbone, clip, strategy="frozen")
    detector = Detector(
        frozen, torch.nn.Identity(), positions=8, mean=backbone.mean, std=backbone.std
    ).train()
    before = copy.deepcopy(frozen.state_dict())
    assert not detector.features((clip * 50 + 100).transpose(1, 2).to(torch.uint8)).requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("strategy", ["plain", "checkpoint", "rewired", "frozen"])
def test_weights_have_the_same_names_in_every_way(strategy):
    """So a run of one way starts from a run of another."""
    backbone, clip, _ = small("convnet")
    names = list(backbone.state_dict())
    assert list(lay_out(backbone, clip, strategy=strategy).state_dict()) == names


def test_rewired_statistics_move_once_a_step():
    backbone, clip, _ = small("convnet")
    rewired = lay_out(copy.deepcopy(backbone), clip, strategy="rewired").train()
    rewired(clip).square().mean().backward()
    counts = {int(b) for name, b in rewired.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {1}


def test_dials_reach_rewire_and_are_refused_elsewhere():
    backbone, clip, _ = small("videomae_b")
    rewired = lay_out(backbone, clip, strategy="rewired", chunks=2)
    assert any(step.slices == 2 for step in revwire.plan_of(rewired).steps)
    with pytest.raises(Re2TALError, match=r"memory\.chunks is for memory\.strategy=rewired"):
        lay_out(small("convnet")[0], clip, strategy="plain", chunks=2)
    with pytest.raises(Re2TALError, match="choose one of plain"):
        lay_out(small("convnet")[0], clip, strategy="offload")


def test_pieces_come_back_in_their_order():
    clip = torch.arange(2 * 3 * 8 * 2 * 2.0).reshape(2, 3, 8, 2, 2)
    cut = pieces(clip, 4, [2, 2])
    assert cut.shape == (4, 3, 4, 2, 2)
    assert torch.equal(rejoined(cut.mean(dim=(3, 4)), 2), clip.mean(dim=(3, 4)))
    with pytest.raises(Re2TALError, match="takes 3 pictures, or a multiple of them, not 8"):
        pieces(clip, 3, [2, 2])
    with pytest.raises(Re2TALError, match="takes pictures of 4 x 4, not 2 x 2"):
        pieces(clip, 4, [4, 4])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_from_a_file(tmp_path, suffix):
    backbone, clip, _ = small("convnet")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(backbone.state_dict(), path)
    else:
        save_file(backbone.state_dict(), path)
    loaded = build_backbone("convnet", weights=path, width=4, center=True)
    assert torch.equal(loaded.eval()(clip), backbone.eval()(clip))
    with pytest.raises(Re2TALError, match="does not fit the backbone"):
        build_backbone("convnet", weights=path, width=8)
    with pytest.raises(Re2TALError, match="No such file"):
        build_backbone("convnet", weights=tmp_path / f"none{suffix}")


def test_errors_name_what_there_is():
    with pytest.raises(Re2TALError, match="choose one of convnet, swin3d_t"):
        build_backbone("i3d")
    with pytest.raises(Re2TALError, match=r"backbone convnet: .*widht"):
        build_backbone("convnet", widht=3)
    with pytest.raises(Re2TALError, match="no pretrained weights 'KINETICS'"):
        build_backbone("convnet", weights="KINETICS")
    assert set(NAMES) >= {"mvit_v2_s", "slowfast_r101", "swin3d_b", "videomae_l"}


def test_videomae_interpolates_its_table_of_positions():
    """Bicubic over height and width, each time on its own; not the table that another picture size would compute."""
    backbone, *_ = small("videomae_b")
    backbone = backbone.double().eval()
    clip = torch.randn(1, 3, 16, 64, 48, dtype=torch.float64)
    model = backbone.model
    table = model.embeddings.position_embeddings.unflatten(1, (8, 2, 2))[0]  # (time, height, width, channels)
    planes = [
        torch.nn.functional.interpolate(plane.permute(2, 0, 1)[None], (4, 3), mode="bicubic")
        for plane in table
    ]
    patches = model.embeddings.patch_embeddings.projection(clip)
    tokens = (patches + torch.cat(planes).transpose(0, 1)[None]).flatten(2).transpose(1, 2)
    wanted = model.encoder(tokens).last_hidden_state.transpose(1, 2).reshape(patches.shape)
    torch.testing.assert_close(backbone.map(clip), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(backbone(clip), wanted.mean(dim=(3, 4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooled", [True, False])
def test_videomae_is_transformers_network_at_its_own_size(pooled):
    options, frames, side, _ = SMALL["videomae_b"]
    backbone, clip = (
        build_backbone("videomae_b", **options, use_mean_pooling=pooled),
        torch.randn(2, 3, frames, side, side),
    )
    assert (backbone.model.layernorm is None) == pooled
    parts = clip.unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 1).transpose(1, 2)
    tokens = backbone.model(parts).last_hidden_state
    wanted = tokens.unflatten(1, (8, 4)).mean(dim=2).unflatten(0, (2, 2)).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(backbone(clip), wanted)
    epsilons = {m.eps for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert epsilons == {1e-6}


@pytest.mark.parametrize("pooled", [True, False])
def test_videomae_from_the_hub_is_the_network_that_a_run_builds_without_it(pooled, tmp_path):
    """Whatever norm the hub's model has at its end, so that a run goes on without asking the hub."""
    options, *_ = SMALL["videomae_b"]
    original = build_backbone("videomae_b", **options, use_mean_pooling=pooled)
    original.model.save_pretrained(tmp_path)
    loaded, fresh = build_backbone("videomae_b", weights=tmp_path), build_backbone("videomae_b", **options)
    fresh.load_state_dict(loaded.state_dict())
    clip = torch.randn(1, 3, 16, 32, 32)
    assert torch.equal(loaded.eval()(clip), fresh.eval()(clip))
    assert {m.eps for m in loaded.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_mvit_takes_pieces_of_sixteen_pictures():
    backbone = build_backbone("mvit_v2_s").eval()
    clip = torch.randn(1, 3, 32, 224, 224)
    with torch.no_grad():
        features = backbone(clip)
        halves = [backbone(clip[:, :, :16]), backbone(clip[:, :, 16:])]
    assert features.shape == (1, 768, 16)
    assert torch.allclose(features, torch.cat(halves, dim=2), atol=1e-4)


def two_streams(x, branches):
    """Re2TAL's rule for the blocks of a stage: the mean of both streams goes on."""
    before, now = x, x
    for branch in branches:
        before, now = now, before + branch(now)
    return (before + now) / 2


def same_function_and_gradients(rewired, literal, original, clip):
    """`rewired`, a copy of `original`, against `literal`, which runs the blocks of `original` by plain autograd."""
    outputs = rewired(clip), literal(clip)
    assert torch.allclose(*outputs, atol=1e-9)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    own = dict(rewired.named_parameters())
    for name, parameter in original.named_parameters():
        assert torch.allclose(own[name].grad, parameter.grad, rtol=1e-7, atol=1e-9), name


def test_stages_are_chains_that_end_in_the_mean_of_their_streams():
    backbone, clip, _ = small("convnet")
    backbone, clip = backbone.double().eval(), clip.double()

    def literal(clip):
        x = backbone.stem(clip - clip.mean(dim=2, keepdim=True))
        for stage in backbone.stages:
            blocks = [block for block in stage if hasattr(block, "branch")]
            # a stage of one block stays as it is: there is nothing to reconstruct
            x = two_streams(x, [block.branch for block in blocks]) if len(blocks) > 1 else stage(x)
        return backbone.norm(x).mean(dim=(3, 4))

    rewired = lay_out(copy.deepcopy(backbone), clip, strategy="rewired").eval()
    same_function_and_gradients(rewired, literal, backbone, clip)
