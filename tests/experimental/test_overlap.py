"""Second runs beside gradients: the same numbers, and no two streams at the same memory."""

import copy
import gc

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire.experimental import overlap
from revwire.rewrite import step
from revwire.rewrite.wired import options_of
from tests.helpers.nets import stir
from tests.helpers.races import Device, Races, Stream

pytestmark = pytest.mark.filterwarnings("ignore:overlap=True is experimental")

MODELS = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2}, 32),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "embed_dim": 12, "depths": (2, 2, 4, 2)}, 56),
    "resnet50": ({"layers": (3, 3, 3, 3)}, 64),
}


def with_streams(patch):
    """A CPU that has streams, as far as revwire knows."""
    device = Device()
    patch.setattr(overlap, "device_module", lambda _: device)
    patch.setattr(step, "can_overlap", lambda _: True)
    return device


@pytest.fixture
def device(monkeypatch):
    return with_streams(monkeypatch)


def built(name, seed=0, **more):
    torch.manual_seed(seed)
    arguments, size = MODELS[name]
    model = stir(timm.create_model(name, **{**arguments, **more}).double().train())
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


def gradients(model, x, seed=3):
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def raced(device, work):
    with Races(device) as races:
        result = work()
        del result
    gc.collect()
    return races


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchor": "*"},
        {"keep": 1},
        {"transitions": "checkpoint"},
        {"coupling": "momentum(gamma=0.5)"},
        {"coupling": "bdia"},
        {"coupling": "dr2net(alpha=0.1,beta=0.9)"},
    ],
)
def test_the_same_gradients_and_no_race(device, name, options):
    model, x = built(name, drop_path_rate=0.2)
    plain = revwire.rewire(copy.deepcopy(model), x, **options)
    ahead = revwire.rewire(model, x, overlap=True, **options)
    assert options_of(ahead).overlap
    assert same(gradients(ahead, x), gradients(plain, x))
    races = raced(device, lambda: gradients(ahead, x))
    assert not races.found
    # of chains of two steps, the one that keeps its graph does not run again
    assert races.on_side > 0 or "keep" in options


def test_most_second_runs_are_beside_gradients(device):
    model, x = built("vit_tiny_patch16_224")
    model = revwire.rewire(model, x, overlap=True)
    ran = []
    for block in model.blocks:
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(lambda *_: ran.append(device.now is not device.main))
    gradients(model, x)
    # in forward none; in backward all but the last step's, which nothing runs beside; the first step's stops before its
    # attention is through
    assert ran == [False] * 8 + [False] + [True] * 6


def hold_nothing(device, monkeypatch):
    started = overlap.Ahead.__init__
    monkeypatch.setattr(overlap.Ahead, "__init__", lambda self, device, _: started(self, device, ()))


def start_at_once(device, monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda *_: None)


def use_at_once(device, monkeypatch):
    device.main.deaf = True


@pytest.mark.parametrize("forget", [hold_nothing, start_at_once, use_at_once])
def test_each_rule_is_needed(device, monkeypatch, forget):
    """And its absence is found: this is what the tests above would say."""
    model, x = built("vit_tiny_patch16_224")
    model = revwire.rewire(model, x, overlap=True)
    gradients(model, x)
    forget(device, monkeypatch)
    assert raced(device, lambda: gradients(model, x)).found


def test_a_backward_that_stops_early_leaves_nothing_running(device):
    """Gradients of an upper step alone: the step below it ran ahead, and nobody asks."""
    model, x = built("vit_tiny_patch16_224")
    model = revwire.rewire(model, x, overlap=True)
    upper = model.blocks[2].mlp.fc1.weight

    def work():
        loss = model(x).square().mean()
        (alone,) = torch.autograd.grad(loss, upper, retain_graph=True)
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert torch.equal(alone, upper.grad)
        return model(x)

    assert not raced(device, work).found


def test_weights_changed_below_what_is_asked_for_are_no_error(device):
    model, x = built("vit_tiny_patch16_224")
    model = revwire.rewire(model, x, overlap=True)
    upper, lower = model.blocks[2].norm1.weight, model.blocks[1].mlp.fc1.weight

    def work():
        loss = model(x).square().mean()
        with torch.no_grad():
            lower.add_(1)
        torch.autograd.grad(loss, upper, retain_graph=True)
        with pytest.raises(revwire.ReplayError, match="changed in place"):
            loss.backward()

    assert not raced(device, work).found


class Biased(nn.Module):
    """A branch whose last operation saves nothing: its bias has its gradient before the branch runs again."""

    def __init__(self, dim):
        super().__init__()
        self.fc, self.bias = nn.Linear(dim, dim), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return x + (self.fc(x).tanh() + self.bias)


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(Biased(8) for _ in range(4))).double(), torch.randn(3, 8, dtype=torch.float64)


def test_a_weight_updated_in_a_hook_meanwhile_is_found_out(device):
    model, x = stack()
    model = revwire.rewire(model, x, overlap=True)

    def update(bias):
        with torch.no_grad():
            bias.sub_(bias.grad)

    model[1].bias.register_post_accumulate_grad_hook(update)
    with pytest.raises(revwire.ReplayError, match=r"1.*bias was changed in place"):
        gradients(model, x)


class Gated(nn.Module):
    """Biased branches, times what comes from beside the trunk."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.biases = nn.ParameterList(torch.zeros(8) for _ in range(4))

    def forward(self, x, gate):
        for block, bias in zip(self.blocks, self.biases, strict=True):
            x = x + (block(x).tanh() * gate + bias)
        return x


def test_a_side_input_updated_in_a_hook_meanwhile_is_found_out(device):
    torch.manual_seed(0)
    x, gate = torch.randn(3, 8), torch.randn(8)
    model = revwire.rewire(Gated(), (x, gate), overlap=True)

    def update(_):
        gate.mul_(2)

    model.biases[1].register_post_accumulate_grad_hook(update)
    loss = model(x, gate).square().mean()
    with pytest.raises(revwire.ReplayError, match=r"#1: what the branch reads beside the trunk"):
        loss.backward()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_changed_in_place_is_told_the_same_way(device, overlap):
    model, x = stack()

    seen = []
    model = revwire.rewire(model, x, overlap=overlap, anchor="*")
    model[0].register_forward_hook(lambda _, args, output: seen.append(output.current.detach()))

    def change(module, args):
        seen[-1].add_(1)

    model[3].register_forward_pre_hook(change)
    with pytest.raises(revwire.ReplayError, match="input of its chain has been modified"):
        gradients(model, x)


def test_two_models_on_streams_of_their_own(device):
    (one, x), (other, y) = stack(), stack()
    one, other = (revwire.rewire(model, x, overlap=True) for model in (one, other))
    streams = Stream(), Stream()

    def work():
        for stream in streams:
            stream.wait_stream(device.main)
        for _ in range(2):
            for model, batch, stream in ((one, x, streams[0]), (other, y, streams[1])):
                with device.stream(stream):
                    loss = model(batch).square().mean()
                    loss.backward()

    assert not raced(device, work).found


def test_an_error_in_backward_leaves_nothing_running(device):
    model, x = built("vit_tiny_patch16_224")
    model = revwire.rewire(model, x, overlap=True)

    def fail(_):
        raise ValueError("stop")

    def work():
        handle = model.blocks[1].mlp.fc1.weight.register_hook(fail)
        with pytest.raises(ValueError, match="stop"):
            gradients(model, x)
        handle.remove()
        return gradients(model, x)

    assert not raced(device, work).found


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    frozen=st.sets(st.integers(0, 3)),
    taps=st.sets(st.integers(0, 3)),
    slices=st.integers(1, 2),
    exact=st.booleans(),
    create_graph=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_race_whatever_takes_part(frozen, taps, slices, exact, create_graph, seed):
    with pytest.MonkeyPatch.context() as patch:
        device = with_streams(patch)
        model, x = built("vit_tiny_patch16_224", seed, drop_path_rate=0.1)
        if exact:
            model, x = model.float(), x.float()
        for i in frozen:
            model.blocks[i].requires_grad_(requires_grad=False)
        dials = {"chunks": slices, "exact": exact}
        plain = revwire.rewire(copy.deepcopy(model), x, **dials)
        ahead = revwire.rewire(model, x, overlap=True, **dials)

        def work(model):
            torch.manual_seed(seed)
            outputs = model.forward_intermediates(x, indices=sorted(taps) or [3])[1]
            wanted = [p for p in model.blocks.parameters() if p.requires_grad]
            loss = sum(out.square().mean() for out in outputs)
            return torch.autograd.grad(
                loss, [*wanted, model.patch_embed.proj.weight], allow_unused=True, create_graph=create_graph
            )

        with Races(device) as races:
            found = work(ahead)
        assert not races.found
        for one, other in zip(found, work(plain), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_estimates_count_the_branch_that_runs_ahead():
    model, _ = built("vit_tiny_patch16_224", num_classes=10)
    x = torch.empty(256, 3, 32, 32, dtype=torch.float64)
    ways = {"one after the other": {}, "overlap": {"overlap": True}}
    found = revwire.estimate(model, x, strategies=ways, optimizer=None)
    assert found["overlap"].peak > found["one after the other"].peak
    assert found["overlap"].activations < 3 * found["one after the other"].activations


def test_a_cpu_runs_one_after_the_other(monkeypatch):
    monkeypatch.setattr(overlap, "new_stream", pytest.fail)
    model, x = built("vit_tiny_patch16_224")
    model = revwire.rewire(model, x, overlap=True)
    assert not overlap.can_overlap(x.device)
    assert gradients(model, x)


@pytest.mark.filterwarnings("error:overlap=True is experimental")
def test_it_says_that_it_is_experimental():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
    with pytest.warns(UserWarning, match="no GPU has shown yet that it pays"):
        revwire.rewire(net, torch.zeros(2, 4), coupling="dr2net", exact=True, overlap=True)
