"""A second run that is not the first: it is told in what it differs, and no error of the branch's own is lost."""

import pytest
import torch
from torch import nn

import revwire
from revwire import ReplayError
from tests.helpers.branches import Net, linear, noise
from tests.helpers.nets import assert_same, gradients, loss
from tests.helpers.steps import kept

SWITCH = {"to": "as planned"}
"""A global that branches read: what they do changes, and nothing of it can be put back."""


@pytest.fixture(autouse=True)
def _as_planned():
    yield
    SWITCH["to"] = "as planned"


class Switched(nn.Module):
    """`tanh(linear(x))`, or what the switch says."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        if SWITCH["to"] == "changes its input":
            x.mul_(2)
        y = self.layer(x)
        if SWITCH["to"] == "saves fewer":
            return y
        y = y.tanh()
        if SWITCH["to"] == "saves more":
            y = y.tanh()
        elif SWITCH["to"] == "another dtype":
            y = y.float()
        elif SWITCH["to"] == "another shape":
            y = y[:1]
        elif SWITCH["to"] == "fails":
            raise RuntimeError("of the branch's own")
        return y


def net(**options):
    torch.manual_seed(0)
    return revwire.rewire(Net(*(Switched() for _ in range(3))).double(), noise(), **options)


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("saves more", "saves more tensors than in forward"),
        ("saves fewer", "saves fewer tensors than in forward"),
        ("another dtype", r"returns a torch\.float32 \(4, 8\) for a torch\.float64 \(4, 8\)"),
        ("another shape", r"returns a torch\.float64 \(1, 8\) for a torch\.float64 \(4, 8\)"),
    ],
)
def test_what_differs_is_told(to, words):
    out = loss(net()(noise()))
    SWITCH["to"] = to
    with pytest.raises(ReplayError, match=rf"#2: .*{words}"):
        out.backward()


@pytest.mark.parametrize("to", ["saves more", "saves fewer"])
def test_another_number_of_tensors_is_told_where_no_numbers_are_compared(to):
    out = loss(net(check=False)(noise()))
    SWITCH["to"] = to
    with pytest.raises(ReplayError, match=to):
        out.backward()


def test_an_error_of_the_second_run_is_the_callers():
    out = loss(net()(noise()))
    SWITCH["to"] = "fails"
    with pytest.raises(RuntimeError, match="of the branch's own"):
        out.backward()


def test_a_branch_that_changes_its_input_in_place_says_so_in_forward():
    """What it changes is a stream, which the next step reads."""
    model = net()
    SWITCH["to"] = "changes its input"
    with pytest.raises(ReplayError, match=r"#0: .*changes its input in place.*give it a clone"):
        model(noise())


def test_a_step_that_nothing_is_reconstructed_for_runs_no_further_than_its_last_saved_tensor():
    """The first of a chain: what comes after would be computed for nobody."""
    ran = []
    branches = [nn.Sequential(linear(), nn.Tanh(), linear(), nn.Identity()) for _ in range(3)]
    model = revwire.rewire(Net(*branches).double(), noise())
    plain = kept(model)
    for i, branch in enumerate(model.branches):
        branch[3].register_forward_hook(lambda *_, i=i: ran.append(i))
    loss(model(noise())).backward()
    assert ran == [0, 1, 2, 2, 1]
    found = [g.clone() for g in gradients(model)]
    model.zero_grad()
    loss(plain(noise())).backward()
    assert_same(gradients(plain), found)
