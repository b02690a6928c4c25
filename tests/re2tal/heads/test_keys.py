"""Heads of other implementations are loaded, all of them and nothing else, and written back."""

import re

import pytest
import torch

from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.build import build_head
from examples.re2tal.heads.keys import LAYOUTS, from_layout, layout_of, load_head, to_layout

CHANNELS, STEM, LEVELS, CLASSES = 8, 1, 3, 2


def head(**options):
    own = {"channels": CHANNELS, "levels": LEVELS, "stem": STEM, "heads": 2, **options}
    return build_head("actionformer", in_channels=5, classes=CLASSES, **own)


def block(name, row):
    """The tensors of one transformer block, as both implementations name them; `row` is the shape of a norm."""
    c = CHANNELS
    shapes = {f"{name}.ln{i}.{kind}": row for i in (1, 2) for kind in ("weight", "bias")}
    for part in ("query", "key", "value"):
        shapes[f"{name}.attn.{part}_conv.conv.weight"] = (c, 1, 3)
        shapes |= {f"{name}.attn.{part}_norm.{kind}": row for kind in ("weight", "bias")}
        shapes |= {f"{name}.attn.{part}.weight": (c, c, 1), f"{name}.attn.{part}.bias": (c,)}
    shapes |= {f"{name}.attn.proj.weight": (c, c, 1), f"{name}.attn.proj.bias": (c,)}
    shapes |= {f"{name}.mlp.0.weight": (4 * c, c, 1), f"{name}.mlp.0.bias": (4 * c,)}
    shapes |= {f"{name}.mlp.3.weight": (c, 4 * c, 1), f"{name}.mlp.3.bias": (c,)}
    return shapes | {f"{name}.drop_path_{half}.scale": (1, c, 1) for half in ("attn", "mlp")}


def opentad():
    c, row = CHANNELS, (CHANNELS,)
    shapes = {f"projection.embed.{i}.conv.weight": (c, 5 if i == 0 else c, 3) for i in range(2)}
    for name in ("projection.embed", "rpn_head.cls_convs", "rpn_head.reg_convs"):
        shapes |= {f"{name}.{i}.norm.{kind}": row for i in range(2) for kind in ("weight", "bias")}
    for name in ("rpn_head.cls_convs", "rpn_head.reg_convs"):
        shapes |= {f"{name}.{i}.conv.weight": (c, c, 3) for i in range(2)}
    shapes |= block("projection.stem.0", row)
    for i in range(LEVELS - 1):
        shapes |= block(f"projection.branch.{i}", row)
    for i in range(LEVELS):
        shapes |= {f"neck.fpn_norms.{i}.{kind}": row for kind in ("weight", "bias")}
        shapes[f"rpn_head.scale.{i}.scale"] = ()
    shapes |= {"rpn_head.cls_head.weight": (CLASSES, c, 3), "rpn_head.cls_head.bias": (CLASSES,)}
    return shapes | {"rpn_head.reg_head.weight": (2, c, 3), "rpn_head.reg_head.bias": (2,)}


def actionformer():
    c, row = CHANNELS, (1, CHANNELS, 1)
    shapes = {f"backbone.embd.{i}.conv.weight": (c, 5 if i == 0 else c, 3) for i in range(2)}
    for name in ("backbone.embd_norm", "cls_head.norm", "reg_head.norm"):
        shapes |= {f"{name}.{i}.{kind}": row for i in range(2) for kind in ("weight", "bias")}
    for name in ("cls_head", "reg_head"):
        shapes |= {f"{name}.head.{i}.conv.weight": (c, c, 3) for i in range(2)}
    shapes |= block("backbone.stem.0", row)
    for i in range(LEVELS - 1):
        shapes |= block(f"backbone.branch.{i}", row)
    for i in range(LEVELS):
        shapes |= {f"neck.fpn_norms.{i}.{kind}": row for kind in ("weight", "bias")}
        shapes[f"reg_head.scale.{i}.scale"] = ()
    shapes |= {"cls_head.cls_head.conv.weight": (CLASSES, c, 3), "cls_head.cls_head.conv.bias": (CLASSES,)}
    return shapes | {"reg_head.offset_head.conv.weight": (2, c, 3), "reg_head.offset_head.conv.bias": (2,)}


def tensors(layout):
    torch.manual_seed(0)
    made = {
        name: torch.randn(shape)
        for name, shape in {"opentad": opentad, "actionformer": actionformer}[layout]().items()
    }
    if layout == "opentad":
        made["rpn_head.loss_normalizer"] = torch.tensor(57)
    return made


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_is_loaded_and_written_back(layout, prefix):
    made, own = tensors(layout), head(dialect=layout)
    beside = (
        {"backbone.model.backbone.norm.weight": torch.ones(3)}
        if layout == "opentad"
        else {"point_generator.buffer_points": torch.ones(3)}
    )
    assert load_head(own, {prefix + name: tensor for name, tensor in {**made, **beside}.items()}) == layout
    back = to_layout(own.state_dict(), layout)
    assert back.keys() == made.keys()
    for name, tensor in made.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor.to(back[name].dtype)), name
    assert float(own.normalizer) == (57 if layout == "opentad" else 100)


def test_each_tensor_has_the_place_that_its_name_says():
    made, own = tensors("opentad"), head()
    load_head(own, made)
    block = own.pyramid.down[1]
    assert torch.equal(
        block.attention.before[2].conv.weight, made["projection.branch.1.attn.value_conv.conv.weight"]
    )
    assert torch.equal(block.attention.inward[1].bias, made["projection.branch.1.attn.key.bias"])
    assert torch.equal(block.mlp[2].weight, made["projection.branch.1.mlp.3.weight"])
    assert torch.equal(block.scales[1][:, 0], made["projection.branch.1.drop_path_mlp.scale"][0, :, 0])
    assert torch.equal(own.regress.body.norms[1].weight, made["rpn_head.reg_convs.1.norm.weight"])
    assert torch.equal(own.scales, torch.stack([made[f"rpn_head.scale.{i}.scale"] for i in range(LEVELS)]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_fit_is_listed(layout):
    made = tensors(layout)
    norm = "neck.fpn_norms.0.weight"
    with pytest.raises(Re2TALError, match=rf"missing: {re.escape('pyramid.norms.0.weight')}$"):
        load_head(head(), {name: tensor for name, tensor in made.items() if name != norm})
    with pytest.raises(Re2TALError, match=r"pyramid\.norms\.0\.weight \(9,\) for \(8,\)"):
        load_head(head(), {**made, norm: torch.ones(9)})
    with pytest.raises(Re2TALError, match=r"unknown: neck\.extra$"):
        load_head(head(), {**made, "neck.extra": torch.ones(2)})
    with pytest.raises(
        Re2TALError, match=r"not in this head: .*and \d+ more; of another shape: scales \(3,\) for \(2,\)"
    ):
        load_head(head(levels=2), made)
    with pytest.raises(Re2TALError, match=r"not in this head: pyramid\.\w+\.0\.scales"):
        load_head(head(scale=None), made)


def test_other_heads_are_told():
    tridet = {
        "cls_head.cls_head.conv.weight": torch.ones(2, 8, 3),
        "backbone.stem.0.psi.weight": torch.ones(8, 1, 3),
    }
    assert from_layout(tridet)[1] == ["backbone.stem.0.psi.weight"]
    with pytest.raises(Re2TALError, match=r"TriDet.*has no counterpart"):
        load_head(head(), tridet)
    with pytest.raises(
        Re2TALError, match="no head of opentad or actionformer; give the tensors below state_dict_ema"
    ):
        layout_of(["features.0.weight"])
    with pytest.raises(Re2TALError, match="choose one of opentad, actionformer"):
        to_layout({}, "tridet")
