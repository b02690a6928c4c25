"""What a chain holds between forward and backward, when it lets go of it, and what happens where others hold it too."""

import pytest
import torch
from torch import nn

import revwire
from revwire import ReplayError
from revwire._torch import solely_held
from revwire.measure.live_bytes import LiveBytes
from tests.helpers.branches import Net, mlp
from tests.helpers.nets import WIDTH, Residual, assert_same, gradients, loss, x_of
from tests.helpers.steps import held, kept, results
from tests.helpers.transformer import DEPTH, Mlp, net, noise


def test_what_each_dial_holds():
    x = noise(32)
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
    x = noise(32)
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
    model = revwire.rewire(net(), noise(), anchor="*")
    inner = []
    model.first[1].mlp[1].register_forward_hook(lambda *args: inner.append(args[2]))
    out = loss(model(noise()))
    out.backward(retain_graph=True)
    out.backward()
    with pytest.raises((ReplayError, RuntimeError), match=r"freed|second time"):
        out.backward()


def test_a_second_backward_from_inside_a_chain_whose_end_was_freed_says_so():
    """Plain autograd has what it needs: the first backward went no further than the last step."""
    model, inner = nn.Sequential(*(Residual(mlp()) for _ in range(3))).double(), []
    model = revwire.rewire(model, x_of(4, WIDTH))
    model[0].body[0].register_forward_hook(lambda *args: inner.append(args[2]))
    out = loss(model(x_of(4, WIDTH)))
    torch.autograd.grad(out, model[2].body[0][2].weight)
    with pytest.raises(ReplayError, match=r"the output of its chain was freed by an earlier backward\(\)"):
        loss(inner[0]).backward()


@pytest.mark.parametrize("chunks", [1, 2])
def test_what_others_hold_is_not_overwritten(chunks):
    """`x[i-1]` takes the memory of `x[i+1]` only where nobody else has any of it."""
    torch.manual_seed(0)
    model = revwire.rewire(net(), noise(), chunks=chunks).eval()
    seen = []

    def hold(_, args):
        x = args[0]
        x = x.tensor() if hasattr(x, "tensor") else x
        seen.append((x, x.detach().clone()))

    for block in (*model.first, *model.second):
        block.mlp.register_forward_pre_hook(hold)  # in the second run too: what backward has reconstructed
    loss(model(noise())).backward()
    assert len(seen) >= 4 * DEPTH
    for now, then in seen:
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_memory_that_others_hold_is_known():
    x = torch.randn(4, 6)
    assert solely_held(x)
    for other in (x[1:], x.detach(), x.numpy(), torch.nn.Parameter(torch.ones(6)) * x):
        assert not solely_held(x)
        del other
    assert solely_held(x)
    assert not solely_held(torch.randn(4, 1).expand(4, 6))
    assert not solely_held(torch.nn.Parameter(x.clone()))  # a subclass may mean anything by its memory


def test_a_changed_input_is_found_out():
    x = noise()
    model = revwire.rewire(net(), x, transitions="checkpoint")
    given = x.clone()
    value = loss(model(given))
    given.add_(1)
    with pytest.raises(ReplayError, match="stem: its input has been modified"):
        value.backward()

    trunk = revwire.rewire(Net(Mlp(), Mlp(), Mlp()).double(), x, anchor="*", coupling="momentum")
    given = x.clone()
    value = loss(trunk(given))
    given.add_(1)
    with pytest.raises(ReplayError, match="the input of its chain has been modified"):
        value.backward()


# couplings that hand out the chain's last stream as it is
LAST_STREAM = ["momentum", "bdia", "dr2net(alpha=0.5,beta=0.5)", "coupling(a=-0.25,b=1.25,c=2)"]


def halved_later(out):
    value = loss(out)
    with torch.no_grad():
        out.mul_(0.5)
    return value


CHANGES = {
    "by an activation": lambda out: loss(out.relu_()),
    "by a factor": lambda out: loss(out.mul_(0.5)),
    "between forward and backward": halved_later,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("coupling", LAST_STREAM)
def test_an_output_changed_in_place_is_found_out(coupling, change):
    """Plain autograd has no use for it, and is right; backward starts from it, and raises."""
    x = x_of(4, WIDTH)
    torch.manual_seed(0)
    model = revwire.rewire(Net(mlp(), mlp(), mlp()).double(), x, coupling=coupling)
    plain = kept(model)
    CHANGES[change](plain(x)).backward()
    assert all(p.grad.norm() > 0 for p in plain.parameters())
    value = CHANGES[change](model(x))
    with pytest.raises(
        ReplayError, match="the output of its chain has been modified by an inplace operation"
    ):
        value.backward()


def test_whoever_asks_again_is_told_the_same():
    """Where one half of the pair was changed, the other one is not let go."""
    x, inner = x_of(4, WIDTH), []
    net = Net(mlp(), mlp(), mlp()).double()
    model = revwire.rewire(net, x, coupling="momentum")
    for branch in model.branches:
        branch[0].register_forward_hook(lambda *args: inner.append(args[2]))
    out = model(x)
    losses = [loss(inner[2]), loss(inner[1])]
    with torch.no_grad():
        out.mul_(0.5)
    for value in losses:
        with pytest.raises(ReplayError, match="the output of its chain has been modified"):
            value.backward()


def test_an_output_that_is_the_mean_of_both_streams_may_be_changed_in_place():
    x = x_of(4, WIDTH)
    torch.manual_seed(0)
    model = revwire.rewire(Net(mlp(), mlp(), mlp()).double(), x)
    found = []
    for each in (kept(model), model):
        CHANGES["by a factor"](each(x)).backward()
        found.append(gradients(each))
    assert_same(*found)


@pytest.mark.parametrize("coupling", LAST_STREAM)
def test_the_input_of_the_last_step_changed_in_place_is_found_out(coupling):
    """The other half of the pair that backward starts from."""
    x, seen = x_of(4, WIDTH), []
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(mlp()) for _ in range(3))).double()
    model = revwire.rewire(model, x, coupling=coupling)
    model[1].register_forward_hook(lambda _m, _args, out: seen.append(out.tensor()))
    value = loss(model(x))
    with torch.no_grad():
        seen[0].mul_(0.5)
    with pytest.raises(ReplayError, match="has been modified by an inplace operation"):
        value.backward()
