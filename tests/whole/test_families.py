"""Every family that the plan promises to rewire, at the smallest size it allows: verified, tapped, autocast."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock

import revwire
from tests.helpers.nets import stir
from tests.helpers.steps import kept
from tests.helpers.vits import SMALL_VIT

pytestmark = pytest.mark.slow

# name -> (arguments that make it small, input size, steps its plan must have)
FAMILIES = {
    "vit_tiny_patch16_224": (SMALL_VIT, 32, 6),
    "deit_tiny_patch16_224": (SMALL_VIT, 32, 6),
    "deit3_small_patch16_224": (SMALL_VIT, 32, 6),
    "eva02_tiny_patch14_224": ({**SMALL_VIT, "img_size": 28}, 28, 6),
    "beit_base_patch16_224": (SMALL_VIT, 32, 6),
    "cait_xxs24_224": ({**SMALL_VIT, "depth": 2}, 32, 8),
    "mixer_s32_224": ({"img_size": 64}, 64, 16),
    "convnext_atto": ({}, 64, 12),
    "convnextv2_atto": ({}, 64, 12),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56},
        56,
        24,
    ),
    "swinv2_tiny_window8_256": (
        {"img_size": 64},
        64,
        24,
    ),
    "resnet50": ({}, 64, 12),
    "resnetv2_50": ({}, 64, 12),
    "regnety_002": ({}, 64, 9),
    "regnetx_002": ({}, 64, 9),
    "efficientnet_b0": ({}, 64, 7),
}
PARALLEL = {
    "scaling": ({**SMALL_VIT, "block_fn": ParallelScalingBlock}, 3),
    "things": ({**SMALL_VIT, "block_fn": ParallelThingsBlock}, 6),
}
NO_DROP_PATH = {"mixer_s32_224"}


def build(name, **more):
    arguments, size, steps = FAMILIES[name]
    if name not in NO_DROP_PATH:
        more = {"drop_path_rate": 0.3, **more}
    return timm.create_model(name, **arguments, **more), torch.randn(2, 3, size, size), steps


@pytest.mark.parametrize("name", FAMILIES)
def test_verified_in_train_and_eval_mode(name):
    model, x, steps = build(name)
    assert sum(1 for _ in revwire.plan(model, x).steps) == steps
    report = revwire.verify(model, x)
    assert report.ok, report.to_dict()


@pytest.mark.parametrize("kind", PARALLEL)
def test_parallel_blocks_are_one_step(kind):
    arguments, steps = PARALLEL[kind]
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    x = torch.randn(2, 3, 32, 32)
    assert sum(1 for _ in revwire.plan(model, x).steps) == steps
    report = revwire.verify(model, x)
    assert report.ok, report.to_dict()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_autocast(name, training):
    """Gradients under autocast are as far from float32's as those of plain autograd through the same streams."""
    model, x, _ = build(name, drop_path_rate=0.0) if name not in NO_DROP_PATH else build(name)
    stir(model)
    revwire.rewire(model, x).train(training)
    gradients = []
    for net, cast in ((model, False), (kept(model), True), (model, True)):
        net.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            loss = net(x).float().square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    exact, plain, replayed = gradients
    assert exact.norm() > 0
    assert (replayed - plain).norm() <= 0.5 * (plain - exact).norm()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]
)
def test_intermediates_are_the_same_asked_for_alone_or_together(name):
    model, x, _ = build(name)
    stir(model)
    revwire.rewire(model, x).eval()
    final, everything = model.forward_intermediates(x)
    assert all(type(t) is torch.Tensor for t in everything)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    for index, wanted in enumerate(everything):
        for stop_early in (False, True):
            found = model.forward_intermediates(
                x, indices=[index], intermediates_only=True, stop_early=stop_early
            )
            torch.testing.assert_close(found[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet50", "convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_features_only_models_train_as_with_plain_autograd(name):
    arguments, size, _ = FAMILIES[name]
    x = torch.randn(2, 3, size, size)
    model = timm.create_model(name, features_only=True, **arguments).double()
    stir(model)
    revwire.rewire(model, x.double())
    gradients = []
    for net in (kept(model), model):
        torch.manual_seed(0)
        levels = net(x.double())
        assert all(type(level) is torch.Tensor for level in levels)
        sum(level.square().mean() for level in levels).backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for plain, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-9, atol=1e-12)
