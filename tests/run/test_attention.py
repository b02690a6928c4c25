"""Attention in parts: the scores of one part at a time, and no number changes."""

import copy
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import revwire
from revwire import ReplayError, RewireError
from revwire.measure.step import LiveBytes
from revwire.run.attention import AttentionInParts, Scores
from revwire.run.recipe import parts_of
from tests.helpers.couplings import kept
from tests.helpers.nets import assert_same, gradients, loss

WIDTH, HEADS, TOKENS, WINDOWS = 12, 3, 9, 4


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@given(
    outer=st.integers(1, 4),
    inner=st.integers(1, 6),
    heads=st.integers(1, 3),
    count=st.integers(1, 30),
)
def test_parts_cover_everything_once_and_are_blocks_of_every_view(outer, inner, heads, count):
    leads = [(outer * inner, heads), (outer, inner, heads), (outer * inner * heads,)]
    total = math.prod(leads[0])
    parts = parts_of(leads, count)
    if total < 2:
        assert parts is None
        return
    assert [i for part in parts for i in range(*part)] == list(range(total))
    assert max(end - begin for begin, end in parts) <= max(1, total // count)
    for lead in leads:
        for begin, end in parts:
            at = torch.stack(torch.unravel_index(torch.arange(begin, end), lead))
            spans = at.amax(1) - at.amin(1) + 1
            assert math.prod(spans.tolist()) == end - begin


def test_views_that_do_not_nest_cannot_be_cut():
    assert parts_of([(2, 6), (3, 4)], 2) is None


# what models do between the products, each on scores of shape (samples * windows, heads, tokens, tokens)
def _scaled(scores, bias, mask):
    return scores * 0.3 + bias


def _windows(scores, bias, mask):
    split = (scores + bias).view(-1, WINDOWS, HEADS, TOKENS, TOKENS)
    return (split + mask[:, None][None]).view(-1, HEADS, TOKENS, TOKENS)


def _filled(scores, bias, mask):
    return (bias + scores / 2).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))


def _capped(scores, bias, mask):
    return 1.5 - torch.where(bias > 0, scores, 5 * torch.tanh(scores / 5)).clamp(-1, 1)


def _looked_into(scores, bias, mask):
    if scores.ndim != 4 or scores.size(1) != HEADS or scores.shape[0] != scores.size()[0]:
        raise AssertionError
    scores[:, :, 1:, 1:] += bias[..., 1:, 1:]
    return scores


def _in_place(scores, bias, mask):
    scores += bias
    return scores - scores.amax(-1, keepdim=True).detach()


BETWEEN = [_scaled, _windows, _filled, _capped, _looked_into, _in_place]


def attend(x, weight, bias, mask, between, *, drop=0.0, product=torch.matmul):
    q, k, v = (x @ weight).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
    weights = between(product(q, k.transpose(-2, -1)), bias, mask).softmax(-1)
    weights = functional.dropout(weights, drop, training=True)
    return product(weights, v).transpose(1, 2).flatten(2)


def operands(samples):
    return (
        double(samples * WINDOWS, TOKENS, WIDTH),
        double(WIDTH, 3 * WIDTH),
        double(1, HEADS, TOKENS, TOKENS),
        double(WINDOWS, TOKENS, TOKENS),
    )


@settings(max_examples=40)
@given(
    between=st.sampled_from(BETWEEN),
    samples=st.integers(1, 3),
    parts=st.integers(2, 20),
    seed=st.integers(0, 1000),
)
def test_outputs_gradients_and_their_gradients_are_those_of_the_whole(between, samples, parts, seed):
    torch.manual_seed(seed)
    given_ = operands(samples)
    found = []
    for mode in (AttentionInParts(1, "whole", always=True), AttentionInParts(parts, "parts", always=True)):
        if mode.parts == 1:
            out = attend(*given_, between)
        else:
            with mode:
                out = attend(*given_, between)
            assert mode.run == 1
        first = torch.autograd.grad(loss(out), given_, create_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss(out), given_, retain_graph=True, allow_unused=True)
        squares = sum(g.square().sum() for g in first if g is not None)
        second = torch.autograd.grad(squares, given_, allow_unused=True)
        found.append([out, *first, *again, *second])
    assert_same(*found, tolerance=1e-10)


@pytest.mark.parametrize("between", BETWEEN)
def test_dropout_is_the_same_in_backward(between):
    """Against differences of the function itself, which draws from a generator that stands where it stood."""
    torch.manual_seed(3)
    given_ = operands(1)

    def run(*tensors):
        torch.manual_seed(4)
        with AttentionInParts(5, "parts", always=True):
            out = attend(*tensors, between, drop=0.3)
        torch.rand(7)  # backward must not draw from where the generator is by then
        return out

    assert torch.autograd.gradcheck(run, given_, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given_, fast_mode=True)
    value = loss(run(*given_))
    state = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_small_scores_and_other_products_are_left_alone():
    q, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    with AttentionInParts(2, "parts") as mode:
        assert isinstance(q @ v.mT, torch.Tensor)
        large = torch.randn(2, 40, 3) @ torch.randn(2, 3, 40)
        assert isinstance(large, Scores)
        assert isinstance(large.sum(), torch.Tensor)
        assert isinstance(torch.matmul(large, torch.randn(2, 40, 3)), torch.Tensor)  # no softmax
        assert large.dtype == torch.float32
        assert "Scores((2, 40, 40)" in repr(large)
        assert len(large) == 2
        with torch.inference_mode():
            assert isinstance(q.repeat(1, 1, 9, 1) @ v.repeat(1, 1, 9, 1).mT, torch.Tensor)
    assert not mode.run


def test_weights_used_twice():
    q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
    with AttentionInParts(2, "the.branch") as mode:
        weights = (q @ k.mT).softmax(-1)
        out = weights @ v
        assert not mode.reused
        torch.testing.assert_close(weights.tensor() @ v, out)
        assert mode.reused
        dropped = functional.dropout((q @ k.mT).softmax(-1), 0.5)
        out = dropped @ v
        with pytest.raises(ReplayError, match=r"the\.branch: its attention weights are used twice"):
            dropped.sum()
        changed = q.clone()
        weights = (changed @ k.mT).softmax(-1)
        changed.add_(1)
        with pytest.raises(ReplayError, match=r"the\.branch: what its attention is computed from is changed"):
            weights @ v


class Attention(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.bias, self.drop = nn.Parameter(torch.randn(HEADS, 1, 1)), nn.Dropout(drop)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = self.drop((q @ k.mT * self.bias).softmax(-1))
        return self.drop(self.out((weights @ v).transpose(1, 2).flatten(2)))


class Net(nn.Module):
    def __init__(self, drop=0.2, attention=Attention):
        super().__init__()
        self.layers = nn.ModuleList(attention(drop) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs).double().train()


def x_of(batch, tokens=24, seed=0):
    return torch.randn(
        batch, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def results(model, x):
    torch.manual_seed(1)
    inner = x.clone().requires_grad_()
    loss(model(inner)).backward()
    return [inner.grad, *gradients(model), torch.rand(1)]


@settings(max_examples=15)
@given(
    chunks=st.integers(2, 9),
    batch=st.integers(1, 3),
    dials=st.sampled_from([{}, {"keep": 2}, {"anchor": "*"}, {"exact": True}]),
    coupling=st.sampled_from(["re2tal", "bdia", "momentum"]),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_steps_whose_attention_runs_in_parts_keep_their_gradients(
    chunks, batch, dials, coupling, training, seed
):
    model = revwire.rewire(net(), x_of(1), chunks=chunks, coupling=coupling, **dials).train(training)
    assert all(step.inside for step in revwire.plan_of(model).steps)
    x = x_of(batch, seed=seed)
    # dropout draws part by part, so the same parts are compared, with everything kept for backward
    wanted, found = results(kept(model), x), results(model, x)
    assert_same(wanted, found, tolerance=0 if "exact" in dials else 1e-10)
    if not training and "exact" not in dials:
        whole = revwire.rewire(net(), x_of(1), coupling=coupling).eval()
        assert_same(results(whole, x), found, tolerance=1e-10)


def test_a_peak_that_no_slice_of_the_batch_can_lower():
    x = x_of(1, 256).float()
    peaks = []
    for chunks in (1, 2, 8):
        model = revwire.rewire(net().float(), x, chunks=chunks)
        results(model, x)
        with LiveBytes() as meter:
            results(model, x)
        peaks.append(meter.peak)
        found = revwire.estimate(net().float(), x, strategies={"it": {"chunks": chunks}}, optimizer=None)
        gradients_ = sum(p.nbytes for p in model.parameters())
        assert found["it"].activations + gradients_ == pytest.approx(meter.peak, rel=0.03)
    # three heads: more parts than that there are none
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[2] == peaks[1]


def test_bf16_autocast_around_the_forward_only():
    x = x_of(1).float()
    models = [revwire.rewire(net(drop=0.0).float(), x, chunks=n) for n in (1, 3)]
    found = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model(x))
        value.backward()
        found.append(gradients(model))
    assert_same(*found, tolerance=1e-2)
    for model, wanted in zip(models[1:], found[1:], strict=True):
        other = copy.deepcopy(kept(model))
        other.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(other(x))
        value.backward()
        assert_same(gradients(other), wanted, tolerance=1e-2)


def test_plans_keep_it_and_it_is_proven_again():
    x = x_of(1)
    plan = revwire.plan(net(), x, chunks=4)
    assert revwire.Plan.from_json(plan.to_json()) == plan
    assert "in 4 slices or of its attention" in str(plan)
    model = revwire.rewire(net(), x, plan=plan)
    assert_same(results(kept(model), x), results(model, x))
    report = revwire.verify(revwire.rewire(net().float(), x.float(), plan=plan), x.float())
    assert report.ok, report
    assert any("slices" in check.name for check in report.checks)

    class Twice(Attention):
        def forward(self, x):
            q = self.qkv(self.norm(x))[..., :WIDTH].unsqueeze(1)
            weights = (q @ q.mT).softmax(-1)
            return (weights @ q + weights.sum(-1, keepdim=True)).squeeze(1)

    with pytest.raises(RewireError, match="in slices, and here its attention weights are used twice"):
        revwire.rewire(net(attention=Twice), x, plan=plan)

    class Mixing(nn.Linear):
        def __init__(self, _):
            super().__init__(WIDTH, WIDTH)

        def forward(self, x):
            return super().forward(x - x.mean((0, 1)))

    with pytest.raises(RewireError, match="can run slice by slice"):
        revwire.plan(net(attention=Mixing), x, chunks=4)


def test_samples_are_cut_first():
    x = x_of(6)
    assert not any(step.inside for step in revwire.plan(net(), x, chunks=4).steps)
    model = revwire.rewire(net(drop=0.0), x_of(2), chunks=4)
    plain = revwire.rewire(net(drop=0.0), x_of(2))
    for batch in (1, 2, 3, 8):
        assert_same(results(plain, x_of(batch)), results(model, x_of(batch)))


_SWIN = {"depths": [2, 2], "num_heads": [2, 3], "num_classes": 5}


def _swin(version):
    classes = torchvision.models.swin_transformer
    block = classes.SwinTransformerBlock if version == 1 else classes.SwinTransformerBlockV2
    merging = classes.PatchMerging if version == 1 else classes.PatchMergingV2
    sizes = {"patch_size": [4, 4], "window_size": [4, 4], "embed_dim": 24}
    return classes.SwinTransformer(
        **sizes, block=block, downsample_layer=merging, attention_dropout=0.1, **_SWIN
    )


FAMILIES = {
    "swin": (lambda: _swin(1), (1, 3, 48, 48)),
    "swinv2": (lambda: _swin(2), (1, 3, 48, 48)),
    "swin3d": (
        lambda: torchvision.models.video.SwinTransformer3d(
            patch_size=[2, 4, 4], window_size=[2, 4, 4], embed_dim=24, attention_dropout=0.1, **_SWIN
        ),
        (1, 3, 8, 32, 48),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_write_their_attention_out(name):
    torch.manual_seed(0)
    make, shape = FAMILIES[name]
    x = torch.randn(shape)
    model = revwire.rewire(make().train(), x, chunks=5)
    inside = [step for step in revwire.plan_of(model).steps if step.inside]
    assert len(inside) == 4  # every attention
    report = revwire.verify(model, x)
    assert report.ok, report
