"""What children return beside tensors: seen as what it is by the code that tests it, and checked at each call."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import ReplayError
from tests.helpers.agreement import agrees, inputs

WIDTH = inputs().shape[-1]


class Child(nn.Linear):
    """Returns its output and something beside it."""

    beside = None

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.where = "tuple"

    def forward(self, x):
        out = super().forward(x).tanh()
        beside = self.beside(out) if callable(self.beside) else self.beside
        if self.where == "dict":
            return {"out": out, "beside": beside}
        return out, beside


def block(test, where="tuple"):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()
            self.child.where = where

        def forward(self, x):
            result = self.child(x)
            out, beside = (result["out"], result["beside"]) if where == "dict" else result
            return x + test(out, beside)

    return Block


def is_none(value):
    return value is None


TESTS = {
    "None": (lambda out, beside: out if beside is None else 0.5 * out, None),
    "None in a helper": (lambda out, beside: out if is_none(beside) else 0.5 * out, None),
    "None or": (lambda out, beside: out * (beside or 3), None),
    "no None": (lambda out, beside: out if beside is None else out * beside, torch.sigmoid),
    "True": (lambda out, beside: 2 * out if beside else out, True),
    "is True": (lambda out, beside: 2 * out if beside is True else out, True),
    "False": (lambda out, beside: 2 * out if beside else out, False),
    "not": (lambda out, beside: 2 * out if not beside else out, False),
    "a word": (lambda out, beside: 2 * out if beside == "twice" else out, "twice"),
    "another word": (lambda out, beside: 2 * out if beside == "twice" else out, "once"),
    "a word in a table": (lambda out, beside: {"twice": 2.0, "once": 1.0}[beside] * out, "twice"),
    "a word in a text": (lambda out, beside: out * len(f"<{beside}>"), "twice"),
    "a number decided by": (lambda out, beside: 2 * out if beside > 2 else out, 3),
    "a number computed with": (lambda out, beside: out * beside, 3.0),
    "a dtype": (lambda out, beside: out.to(beside) * (2 if beside is torch.float64 else 1), torch.float64),
}


@pytest.mark.parametrize("where", ["tuple", "dict"])
@pytest.mark.parametrize("what", TESTS)
def test_the_code_sees_what_it_is(what, where, monkeypatch):
    test, beside = TESTS[what]
    monkeypatch.setattr(Child, "beside", staticmethod(beside) if callable(beside) else beside)
    agrees(lambda: nn.Sequential(*(block(test, where)() for _ in range(3))), inputs(), steps=3)


def rewired(kind, monkeypatch, beside):
    monkeypatch.setattr(Child, "beside", beside)
    torch.manual_seed(0)
    original = nn.Sequential(*(kind() for _ in range(3))).double().eval()
    return original, revwire.rewire(copy.deepcopy(original), inputs(), coupling="bdia").eval()


def test_what_decides_the_childs_value_is_a_guard(monkeypatch):
    class Moody(Child):
        def forward(self, x):
            out, _ = super().forward(x)
            return out, (None if self.training else True)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Moody()

        def forward(self, x):
            out, flag = self.child(x)
            return x + (out if flag is None else 2 * out)

    original, model = rewired(Block, monkeypatch, None)
    x = inputs()
    torch.testing.assert_close(model(x), original(x))
    for each in (original, model):
        for one in each:
            one.child.train()  # the blocks themselves stay in evaluation
    torch.testing.assert_close(model(x), original(x))


def test_a_child_that_returns_something_else_at_a_later_call_raises(monkeypatch):
    calls = {"flag": [False]}  # a table that the child's code reads deeper than anyone looks

    class Hidden(Child):
        def forward(self, x):
            out, _ = super().forward(x)
            return out, calls.__getitem__("flag")[-1]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Hidden()

        def forward(self, x):
            out, flag = self.child(x)
            return x + (2 * out if flag else out)

    original, model = rewired(Block, monkeypatch, None)
    x = inputs()
    torch.testing.assert_close(model(x), original(x))
    for variant in model[0].__dict__["_revwire_program"]._variants:
        variant.guards.reads = None  # as if the guards had not seen it
    calls["flag"] = [True]
    with pytest.raises(ReplayError, match="child returned True where it returned False when the code"):
        model[0](x)


def test_what_nobody_reads_may_change(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def forward(self, x):
            out, _ = self.child(x)
            return x + (out if out is not None else x)

    original, model = rewired(Block, monkeypatch, None)
    variants = len(model[0].__dict__["_revwire_program"]._variants)
    monkeypatch.setattr(Child, "beside", 3)
    x = inputs()
    torch.testing.assert_close(model(x), original(x))
    assert len(model[0].__dict__["_revwire_program"]._variants) == variants


def test_how_many_values_a_child_returns_is_seen(monkeypatch):
    class Several(Child):
        count = 2

        def forward(self, x):
            out, _ = super().forward(x)
            return (out, *(out for _ in range(self.count - 1)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Several()

        def forward(self, x):
            outs = self.child(x)
            return x + (outs[0] if len(outs) == 2 else outs[0] * len(outs))

    original, model = rewired(Block, monkeypatch, None)
    monkeypatch.setattr(Several, "count", 3)
    x = inputs()
    torch.testing.assert_close(model(x), original(x))


def test_sizes_that_a_child_returns_stay_sizes(monkeypatch):
    class Sized(Child):
        def forward(self, x):
            out, _ = super().forward(x)
            return out.flatten(), out.shape[0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Sized()

        def forward(self, x):
            out, rows = self.child(x)
            return x + out.view(rows, -1)

    original, model = rewired(Block, monkeypatch, None)
    for rows in (2, 5, 9):
        x = inputs(rows, WIDTH)
        torch.testing.assert_close(model(x), original(x))
    assert len(model[0].__dict__["_revwire_program"]._variants) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([None, True, False, "a", "b", 1, 2, 0.5]), min_size=1, max_size=4))
def test_any_value_is_followed_from_call_to_call(values):
    class Holding(Child):
        value = None

        def forward(self, x):
            out, _ = super().forward(x)
            return out, self.value

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Holding()

        def forward(self, x):
            out, value = self.child(x)
            factor = 1 if value is None else 2 if value == "a" else 3 if value else 4
            return x + factor * out

    torch.manual_seed(0)
    original = nn.Sequential(*(Block() for _ in range(2))).double().eval()
    model = revwire.rewire(copy.deepcopy(original), inputs(), coupling="bdia").eval()
    x = inputs()
    for value in values:
        for each in (original, model):
            for one in each:
                one.child.value = value
        torch.testing.assert_close(model(x), original(x))
