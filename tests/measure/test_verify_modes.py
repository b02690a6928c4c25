"""`verify` looks at both modes, and survives what models hold: it passes what is right and fails what is planted."""

import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import revwire
from revwire.measure import checks, modes
from revwire.measure.specimen import random_state_kept, seed
from revwire.measure.watching import Growth
from revwire.rewrite.program import Program
from revwire.run.coupling import Original

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.lin, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(self.lin(self.norm(x)).tanh())


def net(make=Block, depth=4):
    return nn.Sequential(*(make() for _ in range(depth)))


def inputs():
    return torch.randn(4, WIDTH)


def named(report):
    return {check.name: check for check in report.checks}


def test_both_modes_are_counted_and_compared():
    report = revwire.verify(net(), inputs())
    assert report.ok
    found = named(report)
    assert found["steps not rewired, eval"].figure == found["steps not rewired, train"].figure == 0
    assert found["training and evaluation apart"].figure <= modes.BOUND


def test_the_report_prints_its_table():
    text = str(revwire.verify(net(), inputs()))
    assert "Sequential: verified" in text
    for name in ("steps not rewired, train", "training and evaluation apart", "gradients, train, float64"):
        assert re.search(rf"{name} .* ok", text)
    assert "reconstructed chain inputs" in text


class Branches(Block):
    def forward(self, x, flag=None):
        if self.training and self.falls and x.sum() > 1e9:
            return x
        return super().forward(x)

    falls = False


@pytest.mark.parametrize("fallback", ["error", "original"])
def test_a_mode_that_does_not_run_rewired_fails(fallback, monkeypatch):
    model = revwire.rewire(net(Branches), inputs(), fallback=fallback)
    for block in model:
        block.falls = True
    report = revwire.verify(model, inputs())
    assert not report.ok
    check = named(report)["steps not rewired, train"]
    assert check.figure == 4
    assert "decides by the numbers" in check.detail
    assert named(report)["steps not rewired, eval"].ok


def test_a_step_that_quietly_runs_the_original_fails(monkeypatch):
    from revwire.run.streams import settle
    from revwire.trace.frame import original_forward

    call = Program.__call__

    def quiet(program, module, args, kwargs):
        if module.training:
            return original_forward(module)(*settle(args), **settle(kwargs))
        return call(program, module, args, kwargs)

    monkeypatch.setattr(Program, "__call__", quiet)
    check = named(revwire.verify(net(), inputs()))["steps not rewired, train"]
    assert check.figure == 4
    assert "0#0" in check.detail


def test_another_function_in_training_fails(monkeypatch):
    """Planted: the recurrence of training is entered anew at each step, as no plan says."""
    from revwire.run.streams import Streams

    can_continue, training = Streams.can_continue, []

    def parted(streams, *args):
        return can_continue(streams, *args) and not training

    monkeypatch.setattr(Streams, "can_continue", parted)
    output = modes._output

    def watched(model, *args, **named):
        training[:] = [1] if named["training"] else []
        try:
            return output(model, *args, **named)
        finally:
            training.clear()

    monkeypatch.setattr(modes, "_output", watched)
    check = named(revwire.verify(net(), inputs()))["training and evaluation apart"]
    assert not check.ok


def test_models_that_train_as_another_function_are_not_compared():
    class Scaled(Block):
        def forward(self, x):
            return x + self.lin(x) * (2.0 if self.training else 1.0)

    report = revwire.verify(net(Scaled), inputs())
    assert report.ok
    assert "training and evaluation apart" not in named(report)

    # BatchNorm's own statistics are no reason not to compare
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

    assert "training and evaluation apart" in named(revwire.verify(net(Normed), inputs()))


def test_a_coupling_of_another_kind_in_training_is_not_compared():
    report = revwire.verify(net(depth=3), torch.randn(4, 16, WIDTH), coupling="bdia")
    assert report.ok
    assert "training and evaluation apart" not in named(report)


class Drawing(nn.Module):
    """Draws for a branch from Python's and numpy's generators."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.lin(x) * (1 + random.random() + np.random.rand())  # noqa: NPY002


def test_networks_that_draw_from_other_generators_are_compared_on_the_same_draws():
    """Where nothing runs again, only the seeds make two runs the same."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Drawing()

        def forward(self, x):
            return x + self.inner(x)

    found = named(revwire.verify(net(Block), inputs(), coupling=Original()))
    assert found["decomposition, train"].figure == found["decomposition, eval"].figure == 0


def test_generators_are_seeded_and_put_back():
    before = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()  # noqa: NPY002
    with random_state_kept():
        seed(3)
        first = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        seed(3)
        assert first == (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    assert random.getstate() == before[0]
    assert np.random.get_state()[2] == before[1][1]  # noqa: NPY002
    assert (np.random.get_state()[1] == before[1][0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


class Extra(Block):
    def get_extra_state(self):
        return {"version": 2}


class Twice(nn.Module):
    """A child that the branch calls twice, on other shapes or on the same ones."""

    def __init__(self, alike):
        super().__init__()
        self.drop, self.qk, self.v = nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.alike = alike

    def forward(self, x):
        h = self.drop(x)
        if self.alike:
            return x + self.v(self.drop(self.qk(h).tanh()))
        return x + self.drop((self.qk(h) @ h.transpose(1, 2)).softmax(-1)) @ self.v(x)


class Holding(Block):
    """Keeps its last activation, as networks do whose insides are looked at."""

    def __init__(self):
        super().__init__()
        self.inner = Held()

    def forward(self, x):
        return x + self.inner(x)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.last, self.all = nn.Linear(WIDTH, WIDTH), None, {}

    def forward(self, x):
        self.last = self.lin(x).tanh()
        self.all["last"] = [self.last]
        return self.last


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_models_hold_is_no_hindrance():
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.lin = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

    for make in (Extra, Holding, Normed):
        model = net(make)
        model(inputs())  # what it computes is there when it is copied
        assert revwire.verify(model, inputs()).ok, make


@pytest.mark.parametrize("alike", [True, False])
def test_a_child_that_is_called_twice(alike):
    report = revwire.verify(net(lambda: Twice(alike)), torch.randn(2, 5, WIDTH))
    assert report.ok
    (drift,) = report.drift.chains
    assert drift.float32 < 1e-5
    assert drift.exact == 0


class Growing(nn.Module):
    """A trunk of small embeddings that grows to large sums: gemma's."""

    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + 3 * self.lin(self.norm(x)).tanh()


@pytest.mark.filterwarnings("ignore:.*have left the range of its exact grid")
def test_the_float32_bound_knows_how_far_a_trunk_grows():
    torch.manual_seed(0)
    model, x = net(Growing, 12), 0.01 * torch.randn(16, WIDTH)
    report = revwire.verify(model, x)
    assert report.ok, str(report)
    check = named(report)["gradients, eval, float32"]
    assert checks.GRADIENT_BOUND < check.bound <= 1e-3
    assert "roundings of their own size" in check.detail
    # a trunk that does not grow gets no more room
    assert (
        named(revwire.verify(net(), inputs()))["gradients, eval, float32"].bound < 2 * checks.GRADIENT_BOUND
    )


def test_growth_is_counted_in_roundings():
    growth = Growth()
    assert growth.factor == 0
    model = revwire.rewire(net(), inputs())
    with growth.watched():
        model(inputs())
    assert 4 < growth.factor < 40
