"""What only a CUDA device shows: its random state, its autocast, its allocator."""

import copy
import warnings

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import revwire
from revwire.measure.step import measure_step
from tests.helpers.nets import stir
from tests.helpers.steps import kept

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:overlap=True is experimental"),
    # of torch.compile and of what it imports
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # a graph is captured on a stream of its own
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
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
    assert report.ok, [check for check in report.checks if not check.ok]


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last(channels_last):
    model, x = build("resnet50")
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    report = revwire.verify(model, x)
    assert report.ok, [check for check in report.checks if not check.ok]


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


@pytest.mark.parametrize(("check", "of_branch"), [(True, 512), (False, 0)])
def test_held_bytes_do_not_grow_with_depth(check, of_branch):
    held = []
    for depth in (4, 8):
        model, x = build("vit_tiny_patch16_224", depth=depth)
        revwire.rewire(model, x, check=check)
        measure_step(model, x)
        held.append(measure_step(model, x).held)
    # the allocator's smallest block, for the numbers that a second run is compared with
    assert held[1] - held[0] == 4 * 2 * of_branch


def synchronisations(run):
    """How often the host waited for the device, and what `run` returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in caught if "called a synchronizing" in str(w.message)], result


@pytest.mark.parametrize("name", MODELS)
def test_the_check_waits_for_the_device_once_a_chain_when_backward_is_over(name):
    model, x = build(name)
    revwire.rewire(model, x)
    model(x).square().mean().backward()
    in_forward, loss = synchronisations(lambda: model(x).square().mean())
    in_backward, _ = synchronisations(loss.backward)
    assert not in_forward
    assert len(in_backward) == len(revwire.plan_of(model).chains)
    other = revwire.rewire(build(name)[0], x, check=False)
    other(x).square().mean().backward()
    assert not synchronisations(lambda: other(x).square().mean().backward())[0]


def test_a_weight_changed_without_a_mark_is_found_on_the_device():
    model, x = build("vit_tiny_patch16_224")
    revwire.rewire(model, x)
    loss = model(x).square().mean()
    model.blocks[1].mlp.fc1.weight.data.mul_(1.5)
    with pytest.raises(revwire.ReplayError, match=r"blocks\.1"):
        loss.backward()


KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_drops_the_same_again(kernel):
    model, x = build("vit_tiny_patch16_224", attn_drop_rate=0.3)
    revwire.rewire(stir(model), x).train()
    found = []
    for net in (kept(model), model):
        net.zero_grad()
        torch.manual_seed(0)
        with sdpa_kernel(kernel), torch.autocast("cuda", torch.bfloat16):
            loss = net(x).float().square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    plain, replayed = found
    assert (replayed - plain).norm() <= 0.01 * plain.norm()


def captured(model, x):
    """A training step of a model in a CUDA graph."""

    def step():
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_step_in_a_cuda_graph(rate):
    model, x = build("vit_tiny_patch16_224", drop_path_rate=rate, proj_drop_rate=rate)
    revwire.rewire(model, x)
    found = []
    for net in (kept(model), model):
        graph = captured(net, x)
        x.copy_(torch.ones_like(x))
        for seed in (1, 2):  # the second replay draws other numbers, or the same where nothing is dropped
            torch.manual_seed(seed)
            graph.replay()
        found.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_graphed_callables():
    model, x = build("vit_tiny_patch16_224", drop_path_rate=0.0, proj_drop_rate=0.0)
    revwire.rewire(model, x)
    plain = kept(model)
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    found = []
    for net in (plain, graphed):
        net.zero_grad()
        net(x).square().mean().backward()
        found.append([p.grad.clone() for p in plain.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


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
    # convolutions in tf32, by other kernels
    torch.testing.assert_close(torch.compile(model)(x), wanted, rtol=1e-2, atol=1e-3)
