"""The recurrence of every coupling written out, plain and rounded: what the couplings' tests compare with.

Nothing here uses revwire's own arithmetic: coefficients come from the papers' formulas, rounding from torch.round.
"""

import torch
from torch import nn

import revwire
from revwire.rewrite.wired import with_options
from revwire.run.options import Options
from tests.helpers.nets import x_of

WIDTH = 8


def noise(batch=4, dtype=torch.float32):
    """What goes through these nets."""
    return x_of(batch, 3, WIDTH, dtype=dtype)


class Block(nn.Module):
    """A residual branch with dropout."""

    def __init__(self, dropout=0.1, width=WIDTH):
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return self.body(x)


class Trunk(nn.Module):
    def __init__(self, depth, dropout=0.1):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


# coupling -> what enters, (a, b, c) of step i for a batch, what leaves
def _bdia(i, x):
    if i == 0:
        return 0.0, 1.0, 1.0
    g = 0.5 * (2.0 * torch.randint(0, 2, (x.shape[0], *[1] * (x.ndim - 1))).to(x.dtype) - 1)
    return g, 1 - g, 1 + g


def _same(x):
    return x, x


def _last(previous, current):
    return current


RULES = {
    "re2tal": (revwire.Re2TAL(), _same, lambda i, x: (1.0, 0.0, 1.0), lambda p, c: (p + c) / 2),
    "dr2net": (
        revwire.Dr2Net(0.875, 0.125),
        lambda x: (torch.zeros_like(x), x),
        lambda i, x: (0.125, 0.875, 1.0),
        _last,
    ),
    "dr2net (0, 1)": (
        revwire.Dr2Net(0, 1),
        lambda x: (torch.zeros_like(x), x),
        lambda i, x: (1.0, 0.0, 1.0),
        _last,
    ),
    "momentum": (revwire.Momentum(0.5), _same, lambda i, x: (-0.5, 1.5, 0.5), _last),
    "bdia": (revwire.BDIA(), _same, _bdia, _last),
    "own": (revwire.Coupling(-0.25, 1.25, 2.0), _same, lambda i, x: (-0.25, 1.25, 2.0), _last),
}


class Through(torch.autograd.Function):
    """Rounds to multiples of 2^-bits (down, or to the nearest); the gradient passes."""

    @staticmethod
    def forward(ctx, x, bits, down):
        scaled = x * 2.0**bits
        return (scaled.floor() if down else scaled.round()) * 2.0**-bits

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def reference(name, branches, x, bits=None):
    """All states of the chain `x[0], ..., x[n]` and what leaves it, by plain autograd."""
    _, enter, rule, leave = RULES[name]

    def on_grid(value, down=False):
        return value if bits is None else Through.apply(value, bits, down)

    previous, current = enter(on_grid(x))
    states = [current]
    for i, branch in enumerate(branches):
        a, b, c = rule(i, current)
        change = c * branch(current).to(current.dtype)
        if isinstance(b, torch.Tensor) or b:
            change = b * current + change
        previous, current = current, on_grid(a * previous, down=True) + on_grid(change)
        states.append(current)
    return states, leave(previous, current)


def rewired(name, net, x, **options):
    """The net rewired with a coupling of `RULES`, without the warnings of float streams that amplify noise."""
    model = revwire.rewire(net, x)
    return with_options(model, Options(RULES[name][0], **options))
