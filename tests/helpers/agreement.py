"""The two promises of a rewiring, for nets written in a test: the same network, and plain autograd's gradients."""

from dataclasses import replace

import torch

import revwire
from revwire._torch import tree_leaves
from revwire.find.probe import make_plan, probe
from revwire.rewrite.program import Options
from revwire.rewrite.swap import apply_plan, options_of, with_options
from revwire.run.coupling import Original, Re2TAL

WIDTH = 6


def inputs(*shape):
    return torch.randn(*(shape or (3, WIDTH)), dtype=torch.float64)


def rewired(model, x, coupling=None):
    """The model rewired with any coupling, `Original` (the plain recurrence) included."""
    found = probe(model, (x,), {})
    kind = coupling or Re2TAL()
    apply_plan(model, make_plan(found, kind.name), found, Options(kind))
    return model


def agrees(make, x, *, steps, seed=0, read=lambda output: output):
    """The rewritten code is the original network, and its reversible gradients are plain autograd's.

    `read` takes tensors out of the model's output where a pytree does not.
    """
    for training in (False, True):
        torch.manual_seed(seed)
        original = make().double().train(training)
        rewritten = rewired(make().double(), x, Original()).train(training)
        rewritten.load_state_dict(original.state_dict())
        assert sum(1 for _ in revwire.plan_of(rewritten).steps) == steps
        outputs = []
        for model in (original, rewritten):
            torch.manual_seed(seed)
            outputs.append(tree_leaves(read(model(x))))
        for wanted, found in zip(*outputs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        model = revwire.rewire(original, x)
        gradients = []
        for replay in (False, True):
            copy = with_options(model, Options(options_of(model).coupling, replay)).train(training)
            torch.manual_seed(seed)
            inner = x.clone().requires_grad_()
            leaves = tree_leaves(read(copy(inner)))
            assert all(type(leaf) in {torch.Tensor, int, float, str, type(None)} for leaf in leaves)
            sum(
                t.square().sum() for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad
            ).backward()
            gradients.append({"input": inner.grad, **{name: p.grad for name, p in copy.named_parameters()}})
        for name, kept in gradients[0].items():
            if kept is None:
                assert gradients[1][name] is None
                continue
            assert kept.norm() > 0, name
            torch.testing.assert_close(gradients[1][name], kept, rtol=1e-9, atol=1e-12)


def assert_replayed_as_kept(model, x, seed=0):
    """A rewired model has plain autograd's gradients through the same recurrence; returns them, None where none is."""
    gradients = []
    for replay in (True, False):
        copy = with_options(model, replace(options_of(model), replay=replay))
        torch.manual_seed(seed)
        copy(x).square().sum().backward()
        gradients.append([p.grad for p in copy.parameters()])
    for replayed, kept in zip(*gradients, strict=True):
        assert (replayed is None) == (kept is None)
        if kept is not None:
            torch.testing.assert_close(replayed, kept)
    return gradients[0]
