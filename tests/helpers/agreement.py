"""The two promises of a rewiring, for nets written in a test: the same network, and plain autograd's gradients."""

import torch
from torch import nn

import revwire
from revwire._torch import tree_leaves
from revwire.find.probe import probe
from revwire.planning.chains import make_plan
from revwire.rewrite.swap import apply_plan
from revwire.run.coupling import Original, Re2TAL
from revwire.run.options import Options
from tests.helpers.nets import WIDTH, Residual
from tests.helpers.steps import kept


class Bodied(nn.Module):
    """A block with a linear layer; subclasses write their forwards."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)


def block():
    """`x + tanh(W x)`."""
    return Residual(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class InTurn(nn.Module):
    """Some blocks, each called with whatever the net is given beside `x`."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *rest):
        for each in self.blocks:
            x = each(x, *rest)
        return x


class AddNorm(nn.Module):
    """As BERT has it: the sum is a child's, of two arguments."""

    def __init__(self):
        super().__init__()
        self.dense, self.drop, self.norm = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.LayerNorm(WIDTH)

    def forward(self, hidden, given):
        return self.norm(self.drop(self.dense(hidden)) + given)


class Layer(nn.Module):
    """A block whose only sum is in its child."""

    def __init__(self):
        super().__init__()
        self.self, self.output = nn.Linear(WIDTH, WIDTH), AddNorm()

    def forward(self, x):
        return self.output(self.self(x).tanh(), x)


def post_norm():
    return nn.Sequential(*(Layer() for _ in range(3)))


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
        assert len(revwire.plan_of(rewritten).steps) == steps
        outputs = []
        for model in (original, rewritten):
            torch.manual_seed(seed)
            outputs.append(tree_leaves(read(model(x))))
        for wanted, found in zip(*outputs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        model = revwire.rewire(original, x).train(training)
        for name, gradient in assert_replayed_as_kept(model, x, seed, read, of_input=True).items():
            assert gradient is None or gradient.norm() > 0, name


def assert_replayed_as_kept(model, x, seed=0, read=lambda output: output, *, of_input=False):
    """A rewired model has plain autograd's gradients through the same recurrence; returns them, None where none is."""
    model.zero_grad()
    gradients = []
    for net in (kept(model), model):
        torch.manual_seed(seed)
        inner = x.clone().requires_grad_(of_input)
        leaves = tree_leaves(read(net(inner)))
        assert all(type(leaf) in {torch.Tensor, int, float, str, type(None)} for leaf in leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        sum(t.square().sum() for t in tensors).backward()
        named = {"input": inner, **dict(net.named_parameters())}
        gradients.append({name: tensor.grad for name, tensor in named.items() if of_input or name != "input"})
    for name, wanted in gradients[0].items():
        found = gradients[1][name]
        assert (found is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    return gradients[0]
