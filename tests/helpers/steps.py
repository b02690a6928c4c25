"""One training step: what it leaves behind and holds, and the same step with everything kept for backward."""

import random

import torch

import revwire
from revwire.measure.live_bytes import LiveBytes
from revwire.rewrite.wired import options_of, with_options
from revwire.run.options import Options
from tests.helpers.nets import assert_same, gradients, loss, pair, recur


def kept(model):
    """The same model with everything kept for backward: plain autograd through the same recurrence."""
    return with_options(model, Options(options_of(model).coupling, False, options_of(model).exact))


def results(model, x, *args, of_input=True):
    """Loss, gradients, buffers and the next random number, of a step from one random state."""
    torch.manual_seed(1)
    model.zero_grad()
    inner = x.clone().requires_grad_(of_input)
    value = loss(model(inner, *args))
    value.backward()
    found = [value.detach(), *gradients(model), *(b.clone() for b in model.buffers()), torch.rand(1)]
    return [inner.grad, *found] if of_input else found


def assert_steps(model, x, steps, branches):
    """So many steps in one chain, verified, in the recurrence of these branches, with everything kept's gradients."""
    assert [len(chain.steps) for chain in revwire.plan(model, x).chains] == [steps]
    report = revwire.verify(model, x)
    assert report.ok, report
    wanted = recur(x, branches)
    torch.testing.assert_close(revwire.rewire(model, x)(x), wanted)
    for mode in (True, False):
        assert_same(results(kept(model).train(mode), x), results(model.train(mode), x))


def held(model, x, *args):
    """Bytes held between forward and backward beside the input, and the peak of both; not of the first such step."""
    results(model, x, *args)  # traces what it has to
    with LiveBytes() as meter:
        value = loss(model(x, *args))
        between = meter.live
        value.backward()
    return between, meter.peak


def assert_alike(reference, model, run, x, seed=0):
    """`run(net, x)` with both, from one random state: the same results, gradients, buffers, and numbers drawn next."""
    found = []
    for net in (reference, model):
        torch.manual_seed(seed)
        random.seed(seed)
        of_run = run(net, x.clone()) or ()
        drawn = torch.tensor([random.random()]), torch.get_rng_state().double()
        found.append([*of_run, *gradients(net), *net.buffers(), *drawn])
    assert of_run or any(g is not None and g.norm() > 0 for g in gradients(reference))
    assert_same(*found)


def agree(name, run, dropout=0.0, seed=0, *, train=True):
    """`run(model, x)` is the same with one of `NETS` and with its recurrence by hand."""
    reference, model, x = pair(name, dropout, seed, train=train)
    assert_alike(reference, model, run, x, seed)
    return reference, model
