"""What a backward pass does on its way: steps that take no part in it are stepped through, and checked all the same."""

import pytest
import torch
from torch import nn

import revwire
from revwire import ReplayError
from revwire.measure.live_bytes import LiveBytes
from tests.helpers.nets import WIDTH, Residual, assert_same, gradients, loss, x_of
from tests.helpers.steps import kept

DEPTH = 4


def chain(depth=DEPTH, **options):
    torch.manual_seed(0)
    net = nn.Sequential(*(Residual(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth))).double()
    return revwire.rewire(net, x_of(4, WIDTH), **options)


def inside(model, at, x):
    """The output of a layer inside of one step's branch."""
    found = []
    handle = model[at].body[0].register_forward_hook(lambda *args: found.append(args[2]))
    model(x)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("keep", ["2", "3", ["1", "3"]])
@pytest.mark.parametrize("of", ["the output", "the inside of the first step"])
def test_steps_that_keep_their_graph_are_stepped_through(keep, of):
    model, x, found = chain(keep=keep), x_of(4, WIDTH), []
    for net in (kept(model), model):
        loss(net(x) if of == "the output" else inside(net, 1, x)).backward()
        found.append(gradients(net))
    assert_same(*found)


def test_a_step_that_is_only_stepped_through_is_checked():
    """The lower ones start from what it gives."""
    model = chain()
    value = loss(inside(model, 1, x_of(4, WIDTH)))
    weight = model[2].body[0].weight
    weight.data = weight + 0.3
    with pytest.raises(ReplayError, match=r"2#0: .*other numbers than in forward"):
        value.backward()


def test_a_saved_tensor_that_somebody_looks_at_is_checked():
    """Outside of any backward."""
    model = chain()
    held = inside(model, 3, x_of(4, WIDTH)).tanh().grad_fn.next_functions[0][0]
    assert held._saved_mat1.shape == (4, WIDTH)
    weight = model[3].body[0].weight
    weight.data = weight + 0.3
    with pytest.raises(ReplayError, match=r"3#0: .*other numbers than in forward"):
        held._saved_mat1  # noqa: B018


def test_what_is_reconstructed_is_let_go_as_backward_goes():
    """When the first step's gradients are made, no more is there for every step above."""
    x, at_first = x_of(2000, WIDTH), []
    for depth in (3, 9):
        model = chain(depth)
        loss(model(x)).backward()
        with LiveBytes() as meter:
            value = loss(model(x))
            model[0].body[0].weight.register_hook(lambda _, meter=meter: at_first.append(meter.live))
            value.backward()
    shallow, deep = at_first
    assert deep - shallow < x.nbytes
