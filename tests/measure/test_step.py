"""The bytes and seconds of a step against figures worked out by hand, and against torch's own allocator."""

import gc
import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

import revwire
from revwire._torch import FakeTensorMode
from revwire.errors import RevwireError
from revwire.measure.step import mean_square, measure_step, training_step
from revwire.measure.timing import Timing, time_alternating
from tests.helpers.nets import Residual

KIB = 1024  # bytes of torch.ones(256)


class Tanhs(nn.Module):
    """Blocks of two tanh each: tanh saves its output only, so the bytes can be worked out by hand."""

    def __init__(self, blocks, checkpointed=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.blocks = blocks
        self.checkpointed = checkpointed

    def forward(self, x):
        x = x * self.scale
        for _ in range(self.blocks):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return x

    @staticmethod
    def block(x):
        return x.tanh().tanh()


class Net(nn.Module):
    """A little of everything that keeps tensors for backward: norm, dropout, attention, linear layers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.norm(self.inner(x)).mean(1))


@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_plain_step_as_worked_out_by_hand(blocks):
    size = KIB
    scalar = 4
    memory = measure_step(Tanhs(blocks), torch.ones(256), torch.sum)
    assert memory.held == 2 * blocks * size + scalar  # every tanh keeps its output, the sum keeps nothing
    # the first tanh of backward: everything still held, the loss's gradient, and the gradient it makes
    assert memory.peak == memory.held + scalar + size


@pytest.mark.parametrize("blocks", [1, 4, 16])
def test_checkpointed_step_as_worked_out_by_hand(blocks):
    size = KIB
    scalar = 4
    memory = measure_step(Tanhs(blocks, checkpointed=True), torch.ones(256), torch.sum)
    assert memory.held == blocks * size + scalar  # every block keeps its input
    # the last block of backward: its two outputs made again, and the gradient of the first tanh
    assert memory.peak == memory.held + scalar + 3 * size


def allocator_bytes(model, x, trace):
    """Held and peak bytes of a step, from every allocation that torch's CPU allocator tells the profiler."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = mean_square(model(x))
        with record_function("between"):
            pass
        loss.backward()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    live = held = peak = 0
    for event in sorted((e for e in events if e["name"] in ("[memory]", "between")), key=lambda e: e["ts"]):
        if event["name"] == "between":
            held = live
        else:
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return held, peak


RANDOM_STATE = torch.get_rng_state().nbytes  # checkpoint keeps one per block, which no operator makes


@pytest.mark.parametrize(
    ("model", "shape", "unseen"),
    [
        pytest.param(Net(), (4, 10, 32), 0, id="net"),
        pytest.param(Tanhs(6), (64, 64), 0, id="tanhs"),
        pytest.param(Tanhs(6, checkpointed=True), (64, 64), 6 * RANDOM_STATE, id="checkpointed"),
    ],
)
def test_agrees_with_the_allocator(model, shape, unseen, tmp_path):
    x = torch.randn(shape)
    measured = measure_step(model, x)
    held, peak = allocator_bytes(model, x, tmp_path / "trace.json")
    assert measured.held == held - unseen
    assert 0.95 * peak <= measured.peak + unseen <= peak  # scratch memory inside a kernel is not seen


def block():
    return Residual(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def test_agrees_with_the_allocator_on_a_rewired_model(tmp_path):
    x = torch.randn(128, 64)
    model = revwire.rewire(nn.Sequential(*(block() for _ in range(8))), x)
    model(x)  # which numbers of a trunk are looked at is worked out once
    measured = measure_step(model, x)
    held, peak = allocator_bytes(model, x, tmp_path / "trace.json")
    assert held - 64 <= measured.held <= held  # a number that meets a tensor becomes one without an operator
    assert 0.95 * peak <= measured.peak <= peak


def test_fake_tensors_cost_what_the_real_ones_would():
    torch.manual_seed(0)
    model = Net()
    real = measure_step(model, torch.randn(4, 10, 32))
    with FakeTensorMode():
        fake = measure_step(Net(), torch.randn(4, 10, 32))
    assert fake == real


def test_autocast_is_measured_as_asked():
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    full = measure_step(model, torch.ones(512, 256))
    half = measure_step(model, torch.ones(512, 256), autocast=torch.bfloat16)
    assert half.held < full.held


@pytest.mark.parametrize("given", [torch.ones(2, 3), (torch.ones(2, 3),), {"input": torch.ones(2, 3)}])
def test_inputs_are_a_tensor_positional_or_keyword_arguments(given):
    assert measure_step(nn.Linear(3, 1), given).held == 8 + 4  # the output, for the square, and the loss


def test_a_measured_step_leaves_what_an_ordinary_step_leaves():
    x = torch.randn(4, 10, 32)
    ordinary, measured = Net(), Net()
    measured.load_state_dict(ordinary.state_dict())
    torch.manual_seed(1)
    mean_square(ordinary(x)).backward()
    random_state = torch.get_rng_state()
    old = {name: torch.randn_like(p) for name, p in measured.named_parameters()}
    for name, parameter in measured.named_parameters():
        parameter.grad = None if name == "head.bias" else old[name]
    torch.manual_seed(1)
    measure_step(measured, x)

    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in ordinary.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name
    for name, parameter in measured.named_parameters():
        assert parameter.grad is (None if name == "head.bias" else old[name])
    assert gc.isenabled()


def test_gradients_come_back_and_the_collector_goes_on_after_an_error():
    model = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_step(model, torch.ones(2, 4))
    assert model.weight.grad is None
    assert gc.isenabled()


def test_a_loss_without_gradient_is_told():
    with pytest.raises(RevwireError, match="does not depend on anything that needs a gradient"):
        measure_step(nn.Linear(3, 1).requires_grad_(False), torch.ones(2, 3))


def test_an_output_without_numbers_is_told():
    with pytest.raises(RevwireError, match=r"output \(dict\) holds no floating-point tensor: pass loss_fn"):
        mean_square({"ids": torch.tensor([1])})


def test_a_model_on_two_devices_is_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(RevwireError, match="Sequential have to be on one device, found: cpu, meta"):
        measure_step(model, torch.ones(2, 3))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_figures_are_the_allocators():
    model = Tanhs(8).cuda()
    x = torch.ones(1024, 1024, device="cuda")
    measure_step(model, x, torch.sum)
    memory = measure_step(model, x, torch.sum)
    assert memory.method == "CUDA allocator"
    assert memory.held == 16 * x.nbytes + 512  # the allocator rounds the loss up to its smallest block
    assert memory.peak >= memory.held + x.nbytes


def test_steps_take_turns():
    ran = []
    steps = {name: lambda name=name: ran.append(name) for name in "abc"}
    announced = []
    timings = time_alternating(steps, rounds=3, warmup=1, progress=announced.append)
    assert "".join(ran) == "cab" + "abc" + "bca" + "cab"
    assert announced == ran
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_nothing_to_time_is_told():
    with pytest.raises(RevwireError, match="at least one step and one round"):
        time_alternating({}, rounds=3)
    with pytest.raises(RevwireError, match="at least one step and one round"):
        time_alternating({"a": list}, rounds=0)


def test_timing_median_and_ratio_go_round_by_round():
    slow_start = Timing((10.0, 2.0, 2.0))
    assert slow_start.median == 2.0
    assert slow_start.ratio(Timing((5.0, 1.0, 4.0))) == 2.0


def test_a_training_step_drops_old_gradients():
    model = nn.Linear(3, 1)
    step = training_step(model, torch.ones(2, 3))
    step()
    once = model.weight.grad.clone()
    step()
    assert torch.equal(model.weight.grad, once)
