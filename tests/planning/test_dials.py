"""The dials: slices, kept graphs, anchors, transitions; none of them changes a number."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import ReplayError, RewireError
from revwire._torch import solely_held
from revwire.measure.step import LiveBytes
from tests.helpers.couplings import kept
from tests.helpers.nets import assert_same, gradients, loss

WIDTH, TOKENS, DEPTH = 8, 6, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Dropout(0.2)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.mT if mask is None else q @ k.mT + mask
        return self.drop(scores.softmax(-1) @ v)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, WIDTH)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x, mask=None):
        x = x + self.attn(x, mask)
        return x + self.mlp(x)


class Stem(nn.Module):
    """A transition with everything that a second run has to get right."""

    def __init__(self, factor=1):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.factor = factor

    def forward(self, x):
        x = x[:, :: self.factor]
        return self.drop(self.norm(self.fc(x).transpose(1, 2)).transpose(1, 2).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.norm, self.head = Stem(), Stem(2), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.first = nn.ModuleList(Block() for _ in range(DEPTH))
        self.second = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, mask=None):
        x = self.stem(x)
        for block in self.first:
            x = block(x, mask)
        x = self.down(x)
        for block in self.second:
            x = block(x)
        return self.head(self.norm(x))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double().train()


def x_of(batch=5, seed=0):
    return torch.randn(
        batch, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def results(model, x, *args):
    torch.manual_seed(1)
    inner = x.clone().requires_grad_()
    loss(model(inner, *args)).backward()
    return [inner.grad, *gradients(model), *(b.clone() for b in model.buffers()), torch.rand(1)]


_MODES = st.lists(st.sampled_from(["reverse", "anchor", "keep"]), min_size=4 * DEPTH, max_size=4 * DEPTH)


@settings(max_examples=25)
@given(
    modes=_MODES,
    chunks=st.integers(1, 6),
    batch=st.integers(1, 5),
    transitions=st.sampled_from(["keep", "checkpoint"]),
    coupling=st.sampled_from(["re2tal", "bdia", "momentum"]),
    exact=st.booleans(),
    training=st.booleans(),
)
def test_no_dial_changes_a_gradient(modes, chunks, batch, transitions, coupling, exact, training):
    x = x_of(batch)
    model = net().train(training)
    names = [step.name for step in revwire.plan(model, x_of(2)).steps]
    of = {mode: [n for n, m in zip(names, modes, strict=True) if m == mode] for mode in ("anchor", "keep")}
    model = revwire.rewire(
        model, x_of(2), coupling=coupling, exact=exact, chunks=chunks, transitions=transitions, **of
    )
    # slices draw their own dropout masks, so the same slices are compared, with everything kept for backward
    assert_same(results(kept(model), x), results(model, x), tolerance=0 if exact else 1e-9)


@settings(max_examples=10)
@given(chunks=st.integers(2, 7), batch=st.integers(1, 7))
def test_slices_are_the_whole_where_nothing_is_drawn(chunks, batch):
    plain = revwire.rewire(net().eval(), x_of())
    sliced = revwire.rewire(net().eval(), x_of(), chunks=chunks)
    assert any(step.slices > 1 for step in revwire.plan_of(sliced).steps)
    assert_same(results(plain, x_of(batch)), results(sliced, x_of(batch)), tolerance=1e-12)


def test_side_inputs_are_cut_with_the_samples_they_belong_to():
    mask = torch.randn(5, TOKENS, TOKENS, dtype=torch.float64)
    plain = revwire.rewire(net().eval(), (x_of(), mask))
    sliced = revwire.rewire(net().eval(), (x_of(), mask), chunks=2)
    step = next(revwire.plan_of(sliced).steps)
    assert (step.slices, step.sliced_sides) == (2, (True,))
    assert_same(results(plain, x_of(), mask), results(sliced, x_of(), mask), tolerance=1e-12)
    one_for_all = torch.randn(1, TOKENS, TOKENS, dtype=torch.float64)
    assert_same(results(plain, x_of(), one_for_all), results(sliced, x_of(), one_for_all), tolerance=1e-12)


class Branch(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(WIDTH, WIDTH), kind
        self.norm = nn.BatchNorm1d(1) if kind == "norm" else nn.Identity()
        self.table = nn.Parameter(torch.randn(5, 1, WIDTH))

    def forward(self, x):
        if self.kind == "mean":
            x = x - x.mean(0)
        if self.kind == "table":
            x = x + self.table
        if self.kind == "roll":
            x = x.roll(1, 0)
        return self.norm(self.fc(x).tanh())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mean", "samples mix"),
        ("table", "built in"),
        ("roll", "samples mix"),
        ("norm", "BatchNorm1d\\) mixes"),
    ],
)
def test_branches_that_mix_samples_are_not_cut(kind, why):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Branch(kind) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    with pytest.raises(RewireError, match=why):
        # one token: where there are several, those could be cut
        revwire.plan(Chain(), torch.randn(5, 1, WIDTH), chunks=2)


def test_tokens_of_one_sample_are_cut_where_the_branch_treats_them_alike():
    plan = revwire.plan(net(), x_of(1), chunks=3)
    kinds = {step.branch: (step.slices, step.slice_dim) for step in plan.steps}
    assert kinds == {("attn",): (3, 0), ("mlp",): (3, 1)}
    model = revwire.rewire(net().eval(), x_of(1), chunks=3)
    plain = revwire.rewire(net().eval(), x_of(1))
    assert_same(results(plain, x_of(2)), results(model, x_of(2)), tolerance=1e-12)


def held(model, x):
    results(model, x)
    with LiveBytes() as meter:
        out = loss(model(x))
        bytes_held = meter.live
        out.backward()
    return bytes_held, meter.peak


def test_what_each_dial_holds():
    x = x_of(32)
    trunk = x.nbytes
    plain, _ = held(revwire.rewire(net(), x), x)
    steps = 2 * DEPTH
    anchored, _ = held(revwire.rewire(net(), x, anchor="first.*"), x)
    # the first step of a chain has none before it, and an anchored last one needs no stream to reconstruct another
    assert anchored - plain == pytest.approx((steps - 2) * trunk, rel=0.02)
    kept_first, _ = held(revwire.rewire(net(), x, keep="first.0"), x)
    all_kept, _ = held(revwire.rewire(net(), x, keep="*"), x)
    graph = held(net(), x)[0] - plain
    # the blocks of the second half have half the tokens
    assert kept_first - plain == pytest.approx(graph / (1.5 * DEPTH), rel=0.1)
    assert all_kept == pytest.approx(held(net(), x)[0], rel=0.02)
    fewer, _ = held(revwire.rewire(net(), x, transitions="checkpoint"), x)
    # down and norm would keep the merged trunk of their chain beside its pair, and their insides
    assert fewer < plain - 2 * trunk


def test_anchors_are_freed_as_backward_goes():
    """As the inputs of checkpoints are: they are gone when the first step's gradients are made."""
    x = x_of(32)
    at_first = []
    for anchor in (None, "first.*"):
        model = revwire.rewire(net(), x, anchor=anchor)
        results(model, x)
        with LiveBytes() as meter:
            out = loss(model(x))
            weight = model.first[0].attn.norm.weight
            weight.register_hook(lambda _, meter=meter: at_first.append(meter.live))
            out.backward()
    without, with_anchors = at_first
    assert with_anchors - without <= x.nbytes


def test_a_second_backward_through_freed_anchors_says_so():
    model = revwire.rewire(net(), x_of(), anchor="*")
    inner = []
    model.first[1].mlp[1].register_forward_hook(lambda *args: inner.append(args[2]))
    out = loss(model(x_of()))
    out.backward(retain_graph=True)
    out.backward()
    with pytest.raises((ReplayError, RuntimeError), match=r"freed|second time"):
        out.backward()


def test_slices_lower_the_peak():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=4).train()
    x = torch.randn(16, 3, 64, 64)
    peaks = [held(revwire.rewire(copy.deepcopy(model), x, chunks=n), x)[1] for n in (1, 2, 4, 8)]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    assert peaks[3] < 0.62 * peaks[0]


@pytest.mark.parametrize("chunks", [1, 2])
def test_what_others_hold_is_not_overwritten(chunks):
    """`x[i-1]` takes the memory of `x[i+1]` only where nobody else has any of it."""
    torch.manual_seed(0)
    model = revwire.rewire(net().double(), x_of().double(), chunks=chunks).eval()
    held = []

    def hold(_, args):
        x = args[0]
        x = x.tensor() if hasattr(x, "tensor") else x
        held.append((x, x.detach().clone()))

    for block in (*model.first, *model.second):
        block.mlp.register_forward_pre_hook(hold)  # in the second run too: what backward has reconstructed
    loss(model(x_of().double())).backward()
    assert len(held) >= 4 * DEPTH
    for now, then in held:
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_memory_that_others_hold_is_known():
    x = torch.randn(4, 6)
    assert solely_held(x)
    for held in (x[1:], x.detach(), x.numpy(), torch.nn.Parameter(torch.ones(6)) * x):
        assert not solely_held(x)
        del held
    assert solely_held(x)
    assert not solely_held(torch.randn(4, 1).expand(4, 6))
    assert not solely_held(torch.nn.Parameter(x.clone()))  # a subclass may mean anything by its memory


@pytest.mark.parametrize(
    "dials", [{"chunks": 3}, {"anchor": "*"}, {"keep": 2}, {"transitions": "checkpoint"}]
)
def test_autograd_at_large(dials):
    x = x_of()
    plain, model = revwire.rewire(net(), x), revwire.rewire(net(), x, **dials)
    plain.eval()
    model.eval()
    found = []
    for each in (plain, model):
        inner = x.clone().requires_grad_()
        value = loss(each(inner))
        (first,) = torch.autograd.grad(value, inner, create_graph=True)
        second = torch.autograd.grad(
            first.square().sum(), [inner, *each.first.parameters()], retain_graph=True
        )
        again = torch.autograd.grad(value, inner)
        found.append([first, *second, *again])
    assert_same(*found, tolerance=1e-9)
    duplicate = pickle.loads(pickle.dumps(model))
    assert_same(results(model, x), results(duplicate, x), tolerance=0)


def test_a_changed_input_is_found_out():
    x = x_of()
    model = revwire.rewire(net(), x, transitions="checkpoint")
    given = x.clone()
    value = loss(model(given))
    given.add_(1)
    with pytest.raises(ReplayError, match="stem: its input has been modified"):
        value.backward()

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Mlp().double() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) + x
            return x

    trunk = revwire.rewire(Trunk(), x, anchor="*", coupling="momentum")
    given = x.clone()
    value = loss(trunk(given))
    given.add_(1)
    with pytest.raises(ReplayError, match="the input of its chain has been modified"):
        value.backward()


def test_unwire_takes_the_transitions_back():
    model, x = net(), x_of()
    classes = [type(module) for module in model.modules()]
    wanted = results(model, x)
    model = net()
    revwire.unwire(revwire.rewire(model, x, chunks=2, transitions="checkpoint", keep=1))
    assert [type(module) for module in model.modules()] == classes
    assert_same(wanted, results(model, x), tolerance=0)


def test_a_plan_keeps_its_dials():
    x = x_of()
    plan = revwire.plan(
        net(),
        x,
        chunks={"*#1": 2, "first.0": 3},
        keep="second.1#1",
        anchor="*#0",
        transitions="checkpoint",
    )
    assert revwire.Plan.from_json(plan.to_json()) == plan
    text = str(plan)
    assert "in 3 slices" in text
    assert "graph kept" in text
    assert "run again in backward from their input: norm+head, stem, down" in text
    model = revwire.rewire(net(), x, plan=plan)
    assert_same(results(kept(model), x), results(model, x), tolerance=1e-9)


def test_a_plan_from_elsewhere_is_proven_again():
    class Net(nn.Module):
        def __init__(self, mixes):
            super().__init__()
            self.layers, self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), mixes

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x - x.mean(0) if self.mixes else x)
            return x

    x = torch.randn(4, 3, WIDTH)
    plan = revwire.plan(Net(mixes=False), x, chunks=2)
    revwire.rewire(Net(mixes=False), x, plan=plan)
    with pytest.raises(RewireError, match="in slices, and here its slices do not come out"):
        revwire.rewire(Net(mixes=True), x, plan=plan)
    for recomputed in (("nowhere",), ("layers",), ("",)):
        with pytest.raises(RewireError, match="no module beside the chains"):
            revwire.rewire(Net(mixes=False), x, plan=replace(plan, recomputed=recomputed))


def test_verify_takes_a_model_with_dials():
    x = x_of().float()
    model = revwire.rewire(
        net().float(), x, chunks=2, keep="first.1", anchor="second.2", transitions="checkpoint"
    )
    report = revwire.verify(model, x)
    assert report.ok, report
    assert any("slices" in check.name for check in report.checks)


@pytest.mark.parametrize(
    ("dials", "says"),
    [
        ({"chunks": 0}, "at least 1"),
        ({"chunks": {"nowhere": 2}}, "no step matches 'nowhere'; steps are named first.0#0"),
        ({"keep": "nowhere"}, "keep: no step matches"),
        ({"anchor": "nowhere"}, "anchor: no step matches"),
        ({"keep": -1}, "at least 0"),
        ({"transitions": "drop"}, "one of keep, checkpoint"),
    ],
)
def test_dials_that_cannot_be(dials, says):
    with pytest.raises(RewireError, match=says):
        revwire.rewire(net(), x_of(), **dials)
