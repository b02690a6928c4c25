"""Attention in slices: the scores of one part at a time, and no number changes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from revwire import ReplayError
from revwire.run.attention import Scores, SlicedAttention
from revwire.run.sliced_operations import spans_of
from tests.helpers.nets import assert_same, loss

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
    parts = spans_of(leads, count)
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
    assert spans_of([(2, 6), (3, 4)], 2) is None


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
    for mode in (SlicedAttention(1, "whole", always=True), SlicedAttention(parts, "parts", always=True)):
        if mode.slices == 1:
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
        with SlicedAttention(5, "parts", always=True):
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
    with SlicedAttention(2, "parts") as mode:
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
    with SlicedAttention(2, "the.branch") as mode:
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
        with pytest.raises(ReplayError, match=r"the\.branch: what its attention is computed from is changed"):
            weights.sum()
        dropped = functional.dropout((q @ k.mT).softmax(-1), 0.5)
        dropped @ v
        with pytest.raises(ReplayError, match=r"the\.branch: its attention weights are used twice"):
            dropped @ v


def test_a_look_at_scores_leaves_them_what_they_would_have_been():
    """Without grad, or outside of the autocast that they belong to."""
    q, k, v = double(2, 3, 9, 4), double(2, 3, 9, 4), double(2, 3, 9, 4)
    with SlicedAttention(2, "the.branch"):
        scores = q @ k.mT
        with torch.no_grad():
            assert scores.amax() > 0
        found = torch.autograd.grad(loss(scores.softmax(-1) @ v), (q, k, v))
        with torch.autocast("cpu", torch.bfloat16):
            low = q.float() @ k.float().mT
        assert isinstance(low, Scores)
        assert low.tensor().dtype == torch.bfloat16
    assert_same(torch.autograd.grad(loss((q @ k.mT).softmax(-1) @ v), (q, k, v)), found)
