"""What only a CUDA device shows: its random state, its autocast, its allocator."""

import copy

import pytest
import timm
import torch

import revwire
from revwire.measure.step import measure_step
from tests.helpers.nets import stir
from tests.helpers.steps import kept

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SMALL_VIT = {"img_size": 64, "depth": 4, "embed_dim": 96, "num_heads": 3}
MODELS = {
    "vit_tiny_patch16_224": ({**SMALL_VIT, "drop_path_rate": 0.3, "proj_drop_rate": 0.2}, 64),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "drop_path_rate": 0.3}, 56),
    "convnext_atto": ({"drop_path_rate": 0.3}, 64),
    "resnet50": ({"drop_path_rate": 0.3}, 64),
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    # bit-equality of two runs can only be asked of kernels that are the same in both
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def build(name, **more):
    arguments, size = MODELS[name]
    model = timm.create_model(name, **{**arguments, **more}).cuda()
    return model, torch.randn(2, 3, size, size, device="cuda")


@pytest.mark.parametrize("name", MODELS)
def test_verified(name):
    model, x = build(name)
    report = revwire.verify(model, x)
    assert report.ok, report.to_dict()


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last(channels_last):
    model, x = build("resnet50")
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    report = revwire.verify(model, x)
    assert report.ok, report.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_with_gradient_scaling(name, dtype):
    model, x = build(name)
    revwire.rewire(stir(model), x).train()
    gradients = []
    for net, cast in ((model, False), (kept(model), True), (model, True)):
        net.zero_grad()
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=dtype, enabled=cast):
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        assert torch.isfinite(loss)
        flat = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        gradients.append(flat / 2.0**8)
    exact, plain, replayed = gradients
    assert (replayed - plain).norm() <= 0.5 * (plain - exact).norm()


def test_held_bytes_do_not_grow_with_depth():
    held = []
    for depth in (4, 8):
        model, x = build("vit_tiny_patch16_224", depth=depth)
        revwire.rewire(model, x)
        measure_step(model, x)
        held.append(measure_step(model, x).held)
    assert held[0] == held[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_overlap_gives_the_same_gradients(compiled):
    model, x = build("vit_tiny_patch16_224", drop_path_rate=0.0, proj_drop_rate=0.0, depth=8)
    gradients = []
    for overlap in (False, True):
        own = revwire.rewire(copy.deepcopy(model), x, overlap=overlap, compile=compiled)
        for _ in range(3):  # a race need not show the first time
            own.zero_grad(set_to_none=True)
            own(x).square().mean().backward()
            gradients.append([p.grad for p in own.parameters()])
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_compiled_model_gives_the_same_numbers():
    model, x = build("vit_tiny_patch16_224", drop_path_rate=0.0, proj_drop_rate=0.0)
    revwire.rewire(model, x)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model)(x), wanted, rtol=1e-3, atol=1e-4)
