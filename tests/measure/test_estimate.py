"""Estimates on fake tensors against the same steps run for real, and budgets that hold."""

import bisect
import copy
import json
import logging
import re

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import revwire
from revwire import RevwireError, RewireError
from revwire.cli.app import app
from revwire.measure import budget
from revwire.measure.estimate import _largest
from revwire.measure.estimates import Estimate, Estimates
from revwire.measure.live_bytes import LiveBytes
from revwire.measure.spared import spared
from revwire.measure.step import mean_square
from revwire.measure.strategies import STRATEGIES, treated
from revwire.printing import size_of
from revwire.rewrite.recording import Recording

SMALL = {
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "embed_dim": 24,
        "window_size": 7,
        "depths": (2, 2, 2, 2),
    },
    "resnet50": {"layers": (3, 3, 1, 1)},
    "convnext_atto": {"depths": (2, 2, 2, 2)},
}
SHAPE = {"vit_tiny_patch16_224": 64, "swin_tiny_patch4_window7_224": 56}


def model_of(name, **changed):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name], **changed}).train()


def inputs_of(name, batch=6):
    size = SHAPE.get(name, 64)
    return torch.randn(batch, 3, size, size)


def peak_for_real(model, x, make_optimizer, *, set_to_none=True):
    """Most live bytes of the second step."""
    with LiveBytes() as meter:
        own = copy.deepcopy(model)
        inner = x.clone()
        optimizer = make_optimizer(own.parameters())
        for parameter in own.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        meter.reset_peak()
        loss = mean_square(own(inner))
        loss.backward()
        del loss
        optimizer.step()
        return meter.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_estimates_are_what_the_step_takes(name):
    model, x = model_of(name), inputs_of(name)
    names = [s for s in STRATEGIES if s != "lean" or name != "resnet50"]  # whose branches hold BatchNorm
    found = revwire.estimate(model, x, strategies=names)
    for strategy in names:
        real = peak_for_real(treated(copy.deepcopy(model), x, strategy), x, torch.optim.AdamW)
        assert found[strategy].peak == pytest.approx(real, rel=0.03), strategy
        assert not found[strategy].failure


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50"])
def test_gradients_that_are_there_before_the_step_count_in_it(name):
    model, x = model_of(name), inputs_of(name, 64)
    names = ["plain", "checkpoint", "rewired"]
    fresh, accumulated = (revwire.estimate(model, x, strategies=names, accumulate=a) for a in (False, True))
    for strategy in names:
        real = peak_for_real(
            treated(copy.deepcopy(model), x, strategy), x, torch.optim.AdamW, set_to_none=False
        )
        assert accumulated[strategy].peak == pytest.approx(real, rel=0.001), strategy
        assert accumulated[strategy].peak > fresh[strategy].peak
        assert accumulated[strategy].activations == pytest.approx(fresh[strategy].activations, rel=0.05)
    limit = (accumulated["rewired"].peak + accumulated["checkpoint"].peak) // 2
    if name == "vit_tiny_patch16_224":
        own = revwire.rewire(copy.deepcopy(model), x, budget=revwire.Budget(limit, accumulate=True))
        assert peak_for_real(own, x, torch.optim.AdamW, set_to_none=False) <= limit * 1.001
    assert "gradients there before" in str(accumulated)


@pytest.mark.slow
def test_a_forward_that_is_traced_in_the_estimated_step_takes_what_it_takes():
    """transformers' layers read `training`, so the first call in train mode is traced: on fake tensors, for nothing."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 256}
    config = transformers.ViTConfig(image_size=64, **sizes)
    model, x = transformers.ViTModel(config, add_pooling_layer=False).train(), torch.randn(16, 3, 64, 64)
    found = revwire.estimate(model, x, strategies=["plain", "rewired"])
    rewired = treated(copy.deepcopy(model), x, "rewired")
    rewired(x)
    assert found["rewired"].peak == pytest.approx(peak_for_real(rewired, x, torch.optim.AdamW), rel=0.03)
    assert found["rewired"].activations < 0.3 * found["plain"].activations


@pytest.mark.slow
def test_nothing_of_the_model_is_touched_and_the_meta_device_says_the_same():
    model, x = model_of("vit_tiny_patch16_224"), inputs_of("vit_tiny_patch16_224")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = revwire.estimate(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.device("meta"):
        empty = timm.create_model("vit_tiny_patch16_224", **SMALL["vit_tiny_patch16_224"]).train()
    assert revwire.estimate(empty, x.to("meta"), device="cpu") == found


def test_parts_and_place_of_the_peak():
    model, x = model_of("vit_tiny_patch16_224"), inputs_of("vit_tiny_patch16_224", 64)
    weights = sum(p.nbytes for p in model.parameters())
    found = revwire.estimate(model, x, strategies=["plain", "rewired"], optimizer="adam")
    row = found["plain"]
    assert row.gradients == weights
    assert 2 * weights <= row.optimizer < 2.1 * weights
    assert row.model == weights + sum(b.nbytes for b in model.buffers())
    assert row.inputs == x.nbytes
    assert row.activations + row.model + row.optimizer + row.inputs <= row.peak * 1.1
    assert "blocks.*.mlp.fc1" in dict(row.alive)
    assert sum(size for _, size in row.alive) == pytest.approx(row.peak, rel=0.02)
    assert row.where.startswith("backward")
    plain = revwire.estimate(model, x, strategies=["plain"], optimizer=None)["plain"]
    assert plain.optimizer == 0
    assert plain.peak < row.peak


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["plain", "rewired"])
def test_the_largest_batch_is_the_largest(strategy):
    model, x = model_of("vit_tiny_patch16_224"), inputs_of("vit_tiny_patch16_224", 4)
    limit = revwire.estimate(model, inputs_of("vit_tiny_patch16_224", 37), strategies=[strategy]).rows[0].peak
    found = revwire.estimate(model, x, strategies=[strategy], limit=limit).rows[0]
    assert found.fits == 37
    assert revwire.estimate(model, x, strategies=[strategy], limit=limit - 1).rows[0].fits == 36
    assert revwire.estimate(model, x, strategies=[strategy], limit="1KiB").rows[0].fits == 0


@pytest.mark.slow
def test_other_dimensions_are_varied_in_multiples_that_the_model_takes():
    model = model_of("convnext_atto")
    limit = revwire.estimate(model, torch.empty(2, 3, 192, 64), strategies=["plain"]).rows[0].peak
    found = revwire.estimate(model, torch.empty(2, 3, 64, 64), strategies=["plain"], limit=limit, vary=2)
    assert found.rows[0].fits == 192
    with pytest.raises(RevwireError, match="cannot vary dimension 7"):
        revwire.estimate(model, torch.empty(2, 3, 64, 64), limit=limit, vary=7)


def test_a_way_that_a_model_cannot_go_is_a_row_that_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = revwire.estimate(model, torch.empty(2, 4))
    assert found["plain"].peak > 0
    assert "no two residual blocks in a row" in found["rewired"].failure
    with pytest.raises(RevwireError, match="'lbfgs' is not one of adamw"):
        revwire.estimate(model, torch.empty(2, 4), optimizer="lbfgs")
    with pytest.raises(RevwireError, match="rewired already"):
        revwire.estimate(revwire.rewire(model_of("vit_tiny_patch16_224")))


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24gb", 24 * 2**30), ("1.5 MiB", 3 * 2**19), ("800", 800), ("2k", 2048), (7, 7)],
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "big", "-3GiB", "3XB", "1e3", "GiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(RevwireError, match="is no size"):
        size_of(text)


@pytest.mark.parametrize("limit", [0, 9, 10, 57, 1000, 12345, 10**6, 10**9])
@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 10 + 3 * n + (n // 7) ** 2,
        lambda n: 10 + 3 * n,
        lambda n: max(9, 467 * n - 50_000),  # at first the optimizer's step is the peak
        lambda n: max(900 + n, 467 * n - 50_000),
        lambda n: 40 * int(n**0.5),
        lambda n: 100 * (n // 64),
    ],
)
@pytest.mark.parametrize("start", [1, 4, 100])
def test_the_search_finds_the_largest_of_any_growing_function(peak, limit, start):
    asked = []

    def counted(n):
        asked.append(n)
        return peak(n)

    most = 2**20 - 1
    wanted = bisect.bisect_right(range(most + 1), limit, lo=1, key=peak) - 1
    assert _largest(counted, start, limit) == wanted
    assert len(asked) <= 60
    assert len(asked) == len(set(asked))


def test_the_search_is_short_where_peaks_grow_evenly_after_a_flat_beginning():
    """Of a small model the optimizer's step is the peak up to some batch; each question here is a step."""
    asked = []

    def peak(n):
        asked.append(n)
        return max(92_000_000 + 1_000 * n, 467_420 * n + 5_000_000)

    assert _largest(peak, 8, 2**31) == (2**31 - 5_000_000) // 467_420
    assert len(asked) <= 10


def test_estimates_print_as_a_table():
    printed = str(revwire.estimate(nn.Sequential(nn.Linear(4, 4)), torch.empty(2, 4), strategies=["plain"]))
    assert printed.startswith("Sequential, input 2x4, adamw: one training step, GiB")
    assert "│ plain" in printed


def test_rows_are_gone_through_and_asked_for_by_name():
    found = revwire.estimate(
        nn.Sequential(nn.Linear(4, 4)), torch.empty(2, 4), strategies=["plain", "checkpoint"]
    )
    assert [row.strategy for row in found] == ["plain", "checkpoint"]
    assert len(found) == 2
    assert found["checkpoint"] is found.rows[1]
    with pytest.raises(RevwireError, match=r"no strategy 'lean' was estimated, but plain, checkpoint"):
        found["lean"]


def test_a_notebook_shows_the_table_and_obeys_no_name_in_it():
    row = Estimate("<b>plain</b>", failure="[red]<script>")
    shown = Estimates("<i>Net", ((2, 4),), "adamw", "", False, None, 0, (row,))._repr_html_()
    assert shown.startswith("<pre")
    assert shown.endswith("</pre>")
    for name in ("&lt;i&gt;Net", "&lt;b&gt;plain&lt;/b&gt;", "[red]&lt;script&gt;"):
        assert name in shown
    assert not {"<i>", "<b>", "<script>"} & set(re.findall(r"<\w+>", shown))


@pytest.mark.parametrize("share", [1.2, pytest.param(0.8, marks=pytest.mark.slow), 0.6])
def test_a_budget_is_kept_and_used(share, caplog):
    model, x = model_of("vit_tiny_patch16_224", depth=3), inputs_of("vit_tiny_patch16_224", 64)
    plain = revwire.estimate(model, x, strategies=["plain"]).rows[0].peak
    limit = int(share * plain)
    with caplog.at_level(logging.INFO, "revwire"):
        model = revwire.rewire(model, x, budget=limit)
    assert "budget: the step takes" in caplog.text
    real = peak_for_real(model, x, torch.optim.AdamW)
    assert real <= limit * 1.01
    steps = list(revwire.plan_of(model).steps)
    kept = sum(step.mode == "keep" for step in steps)
    assert kept == len(steps) if share > 1 else kept < len(steps)
    # what is left is less than one more graph would take
    assert real >= limit * 0.75 or share > 1


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much():
    model, x = model_of("vit_tiny_patch16_224"), inputs_of("vit_tiny_patch16_224")
    with pytest.raises(RewireError, match=r"needs at least .* MiB, .* MiB more than 100\.0 KiB"):
        revwire.rewire(model, x, budget="100KiB")
    assert revwire.plan_of(model) is None
    with pytest.raises(RewireError, match="pass one"):
        revwire.rewire(model, x, budget="1GiB", chunks=2)
    with pytest.raises(RewireError, match="pass one"):
        revwire.rewire(model, x, budget="1GiB", plan=revwire.plan(model, x))


@pytest.mark.slow
def test_a_budget_of_a_model_whose_branches_cannot_be_cut():
    model, x = model_of("resnet50"), inputs_of("resnet50", 2)
    least = revwire.estimate(model, x, strategies={"": {"transitions": "checkpoint"}}).rows[0].peak
    model = revwire.rewire(model, x, budget=revwire.Budget(int(least * 1.02)))
    assert all(step.slices == 1 for step in revwire.plan_of(model).steps)


def levels_of(name):
    model = model_of(name)
    return budget.Levels.of(Recording.of(model, inputs_of(name)))


def test_steps_of_short_trunks_keep_their_graph_first():
    steps = levels_of("swin_tiny_patch4_window7_224").steps
    assert steps[0].startswith("layers.3")
    assert steps[-1].startswith("layers.0")


def test_anchors_go_first_where_they_spare_most():
    levels = levels_of("vit_tiny_patch16_224")
    half = len(levels.steps) // 2
    # the last product of an MLP is four times that of an attention
    assert all(name.endswith("#1") for name in levels.anchored[:half])
    assert levels.enough == half
    dials = levels.dials(("keep", 1), half)
    assert dials.anchor == levels.anchored[:half]
    assert dials.keep is None
    everything = levels.dials(("checkpoint", 4), levels.most)
    assert (everything.keep, everything.anchor) == (levels.steps, None)
    assert (everything.chunks, everything.transitions) == (4, "checkpoint")


def test_what_an_anchor_spares_is_counted_from_the_last_saved_tensor():
    class Block(torch.nn.Module):
        def __init__(self, *after):
            super().__init__()
            self.branch = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4), *after
            )

        def forward(self, x):
            return x + self.branch(x)

    for after, wanted in (((), 2 * 3 * 8 * 4), ((torch.nn.GELU(),), 0)):
        net = torch.nn.Sequential(Block(*after), Block(*after))
        residuals = Recording.of(net, torch.zeros(3, 4)).found.residuals
        assert [spared(residual) for residual in residuals] == [wanted, wanted]


@pytest.mark.slow
def test_the_command_prints_a_table_or_json():
    small = json.dumps(SMALL["vit_tiny_patch16_224"])
    call = [
        "estimate",
        "vit_tiny_patch16_224",
        "--model-args",
        small,
        "--batch",
        "4",
        "-s",
        "plain",
        "-s",
        "lean",
    ]
    told = CliRunner().invoke(app, [*call, "--limit", "64MiB", "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout)["rows"]
    assert [row["strategy"] for row in rows] == ["plain", "lean"]
    assert rows[1]["fits"] > rows[0]["fits"] > 0
    told = CliRunner().invoke(app, call)
    assert "one training step" in told.output
    told = CliRunner().invoke(app, [*call, "--limit", "many"])
    assert told.exit_code == 1
    assert "is no size" in told.stderr
