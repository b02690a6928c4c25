"""Hooks on blocks and layers, summaries, profilers: what each sees of a rewired model, as docs/integrations.md says."""

import re

import pytest
import torch
import torchinfo
import torchview
from torch import nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import revwire
from tests.helpers.nets import NETS, assert_same, gradients, loss, pair
from tests.helpers.pictures import Pictures, rewired, vit

each_net = pytest.mark.parametrize("name", ["loop", "vit", "convnext"])


def states(reference, x):
    """The merged trunk after each block of a ViT, by hand, with its graph."""
    net = reference.net
    x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    previous = current = x
    seen = []
    for b in net.blocks:
        previous, current = current, previous + b.drop_path1(b.ls1(b.attn(b.norm1(current))))
        previous, current = current, previous + b.drop_path2(b.ls2(b.mlp(b.norm2(current))))
        seen.append((previous + current) / 2)
    return seen


def test_a_forward_hook_on_a_block_sees_the_streams():
    """Their `.tensor()` is the merged trunk, with its gradient; the chain goes on as without the hook."""
    reference, model, x = pair("vit")
    wanted = states(reference, x)
    seen = []
    handles = [b.register_forward_hook(lambda _m, _args, out: seen.append(out)) for b in model.blocks]
    out = model(x)
    assert isinstance(seen[0], revwire.Streams)
    assert type(seen[-1]) is torch.Tensor  # the last step of a chain hands on a tensor
    found = [seen[0].tensor(), seen[-1]]
    assert_same(wanted, found)
    (loss(out) + loss(found[0]).sin()).backward()
    (loss(reference(x)) + loss(wanted[0]).sin()).backward()
    assert_same(gradients(reference), gradients(model))
    for handle in handles:
        handle.remove()


def test_a_pre_hook_on_a_block_is_given_the_streams():
    reference, model, x = pair("vit")
    wanted = states(reference, x)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(x)
    assert_same([wanted[0]], [seen[0].tensor()])


def test_the_gradient_of_the_trunk_is_had_from_the_merged_tensor():
    """A hook on it is called with the gradient of what was done with it, which is not that of both streams."""
    reference, model, x = pair("vit")
    grads = []

    def tap(_module, _args, out):
        merged = out.tensor()
        merged.register_hook(lambda g: grads.append(g.clone()))
        return merged  # from here a tensor travels, and the next block starts another chain

    model.blocks[0].register_forward_hook(tap)
    net = reference.net
    x0 = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for b in net.blocks:
        first = x0 + b.attn(b.norm1(x0))
        x0 = (first + x0 + b.mlp(b.norm2(first))) / 2
        x0.register_hook(lambda g: grads.append(g.clone()))
    loss(net.forward_head(net.norm(x0))).backward()
    (wanted,) = grads[1:]
    grads.clear()
    loss(model(x)).backward()
    assert_same([wanted], grads)
    assert_same(gradients(reference), gradients(model))


def test_a_backward_hook_on_a_block_within_a_chain_is_not_called_and_torch_says_so():
    """Its input and output are no tensors; at the layers of the branch it is called (`test_compatibility.py`)."""
    reference, model, x = pair("vit")
    seen = []
    model.blocks[0].register_full_backward_hook(lambda *given: seen.append(given))
    with pytest.warns(UserWarning, match="output should be a Tensor.*Streams"):
        out = model(x)
    loss(out).backward()
    assert not seen
    loss(reference(x)).backward()
    assert_same(gradients(reference), gradients(model))


def test_forward_hooks_within_a_branch_are_called_in_both_runs():
    _, model, x = pair("vit")
    calls = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    out = model(x)
    assert len(calls) == 1
    loss(out).backward()
    assert calls == [True, True]


@each_net
def test_torchinfo(name):
    """The network as it was: same layers, sizes and parameters."""
    reference, model, x = pair(name)
    with revwire.unwired(model):
        found = str(torchinfo.summary(model, input_data=x, verbose=0, depth=5))
    assert found == str(torchinfo.summary(reference.net, input_data=x, verbose=0, depth=5))
    assert "Total params" in found
    loss(model(x)).backward()


@each_net
def test_torchview(name):
    reference, model, x = pair(name)
    with revwire.unwired(model):
        found = torchview.draw_graph(model, input_data=x, depth=4).visual_graph.source
    wanted = torchview.draw_graph(reference.net, input_data=x, depth=4).visual_graph.source
    assert re.sub(r"\d+", "", found) == re.sub(r"\d+", "", wanted)


def test_unwired_is_the_original_within_the_block_alone():
    reference, model, x = pair("vit", train=False)
    wanted, original = model(x), reference.net(x)
    assert not torch.allclose(wanted, original)
    with revwire.unwired(model) as inner:
        assert inner is model
        assert type(model) is type(reference.net)
        assert torch.equal(model(x), original)
        assert revwire.plan_of(model) is None
    assert torch.equal(model(x), wanted)
    with pytest.raises(AssertionError, match="Input height"), revwire.unwired(model):
        model(x[:, :1, :1])
    assert torch.equal(model(x), wanted)
    with pytest.raises(revwire.RewireError, match="is not rewired"), revwire.unwired(reference.net):
        pass


def test_a_class_that_was_replaced_since_is_not_undone_with_the_wiring():
    """A parametrization lives in a class of its own, on top: what it computes would be lost without a word."""
    reference, model, x = pair("loop", train=False)
    model.scale = nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(model, "scale", nn.Softplus())
    wanted = model(x)
    with pytest.raises(
        revwire.RewireError, match=r"\(model\): .* replaced by Parametrized.*, as fully_shard"
    ):
        revwire.unwire(model)
    with pytest.raises(revwire.RewireError, match="unwire before it"), revwire.unwired(model):
        pass
    assert_same([wanted], [model(x)])
    parametrize.remove_parametrizations(model, "scale")
    assert_same([reference.net(x)], [revwire.unwire(model)(x)])


def test_a_backward_within_the_block_of_a_forward_before_it():
    reference, model, x = pair("vit", dropout=0.2)
    for m in (reference, model):
        torch.manual_seed(0)
        out = loss(m(x))
        if m is model:
            with revwire.unwired(model):
                out.backward()
        else:
            out.backward()
    assert_same(gradients(reference), gradients(model))


def calls_of(model, x, operation):
    """How often an operation ran in forward and in backward, by the profiler."""
    found = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("forward"):
            out = model(x)
        with record_function("backward"):
            loss(out).backward()
    for part in ("forward", "backward"):
        (span,) = (e.time_range for e in profiler.events() if e.name == part)
        inside = (e for e in profiler.events() if e.name == operation)
        found.append(sum(span.start <= e.time_range.start <= span.end for e in inside))
    return found


def test_the_profiler_shows_each_branch_once_in_forward_and_once_in_backward():
    """A ViT's four linear layers a block; those of the head and the last one of each branch do not run again."""
    model, x = rewired(dropout=0.0), Pictures(2).pictures
    plain = calls_of(vit(dropout=0.0), x, "aten::linear")
    found = calls_of(model, x, "aten::linear")
    assert plain == [3 * 4 + 1, 0]
    assert found[0] == plain[0]
    assert 3 * 3 <= found[1] <= 3 * 4


def test_floating_point_operations_are_counted():
    """The second run of the branches is all that comes on top of a plain step."""
    reference, model, x = pair("vit")
    counts = []
    for m in (reference, model):
        with FlopCounterMode(display=False) as counter:
            out = m(x)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss(out).backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] < counts[1][1] <= counts[0][1] + counts[0][0]


@pytest.mark.parametrize("name", NETS)
def test_always_on_module_hooks_of_a_tool(name):
    """A forward hook on every module, as summaries and debuggers register, changes nothing."""
    reference, model, x = pair(name)
    shapes = []

    def note(module, _args, out):
        shapes.append((type(module).__name__, tuple(out.shape), out.dtype))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        out = model(x)
    finally:
        handle.remove()
    assert len(shapes) > NETS[name].steps
    loss(out).backward()
    loss(reference(x)).backward()
    assert_same(gradients(reference), gradients(model))
