"""Steps whose slices are parts of their attention, as there is nothing else to cut: the plan's, and the gradients."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import RewireError
from tests.helpers.branches import Net
from tests.helpers.nets import assert_same, gradients, loss, x_of
from tests.helpers.steps import held, kept, results

WIDTH, HEADS = 12, 3


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


def net(drop=0.2, attention=Attention):
    torch.manual_seed(0)
    return Net(*(attention(drop) for _ in range(4))).double().train()


def noise(batch=1, tokens=24, seed=0):
    return x_of(batch, tokens, WIDTH, seed=seed)


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
    model = revwire.rewire(net(), noise(), chunks=chunks, coupling=coupling, **dials).train(training)
    assert all(step.inside for step in revwire.plan_of(model).steps)
    x = noise(batch, seed=seed)
    # dropout draws slice by slice, so the same parts are compared, with everything kept for backward
    wanted, found = results(kept(model), x), results(model, x)
    assert_same(wanted, found, tolerance=0 if "exact" in dials else 1e-10)
    if not training and "exact" not in dials:
        whole = revwire.rewire(net(), noise(), coupling=coupling).eval()
        assert_same(results(whole, x), found, tolerance=1e-10)


def test_plans_keep_it_and_it_is_proven_again():
    x = noise()
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
    x = noise(6)
    assert not any(step.inside for step in revwire.plan(net(), x, chunks=4).steps)
    model = revwire.rewire(net(drop=0.0), noise(2), chunks=4)
    plain = revwire.rewire(net(drop=0.0), noise(2))
    for batch in (1, 2, 3, 8):
        assert_same(results(plain, noise(batch)), results(model, noise(batch)))


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


@pytest.mark.slow
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


def test_a_peak_that_no_slice_of_the_batch_can_lower():
    x = noise(1, 256).float()
    peaks = []
    for chunks in (1, 2, 8):
        model = revwire.rewire(net().float(), x, chunks=chunks)
        peaks.append(held(model, x)[1])
        found = revwire.estimate(net().float(), x, strategies={"it": {"chunks": chunks}}, optimizer=None)
        gradients_ = sum(p.nbytes for p in model.parameters())
        assert found["it"].activations + gradients_ == pytest.approx(peaks[-1], rel=0.03)
    # three heads: more parts than that there are none
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[2] == peaks[1]


def test_bf16_autocast_around_the_forward_only():
    x = noise().float()
    whole, parts = (revwire.rewire(net(drop=0.0).float(), x, chunks=n) for n in (1, 3))
    found = []
    for model in (whole, parts, kept(parts)):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model(x))
        value.backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert_same(found[0], other, tolerance=1e-2)
