"""Random chains: any depth, any branches, any rearrangements between steps, taps anywhere, against the recurrence."""

import copy
import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from tests.helpers.nets import Residual, assert_same, gradients, loss


class Act(nn.Module):
    """A branch without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Gate(nn.Module):
    """A branch whose parameter meets the trunk in many saved tensors, twice the same one among them."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.proj = nn.Parameter(torch.randn(width)), nn.Linear(width, width)

    def forward(self, x):
        h = self.proj(x).relu_()
        return h * torch.sigmoid(x * self.scale) * h


def frozen(module):
    return module.requires_grad_(False)


# name -> (shapes it takes, module for a shape)
BRANCHES = {
    "linear": (lambda s: True, lambda s: nn.Linear(s[-1], s[-1])),
    "frozen linear": (lambda s: True, lambda s: frozen(nn.Linear(s[-1], s[-1]))),
    "mlp": (lambda s: True, lambda s: nn.Sequential(nn.Linear(s[-1], 7), nn.GELU(), nn.Linear(7, s[-1]))),
    "gate": (lambda s: True, lambda s: Gate(s[-1])),
    "layer norm": (lambda s: s[-1] > 1, lambda s: nn.LayerNorm(s[-1])),
    "batch norm": (
        lambda s: len(s) in {2, 3} and math.prod(s) > s[1],
        lambda s: nn.Sequential(nn.BatchNorm1d(s[1]), nn.Tanh()),
    ),
    "conv": (
        lambda s: len(s) == 3,
        lambda s: nn.Sequential(nn.Conv1d(s[1], s[1], 3, padding=1), nn.ReLU(inplace=True)),
    ),
    "frozen norm": (lambda s: s[-1] > 1, lambda s: nn.Sequential(frozen(nn.LayerNorm(s[-1])), nn.Tanh())),
    "dropout": (lambda s: True, lambda s: nn.Sequential(nn.Linear(s[-1], s[-1]), nn.Dropout(0.4), nn.Tanh())),
    "only dropout": (lambda s: True, lambda s: nn.Sequential(nn.Dropout(0.4))),
    "no parameters": (lambda s: True, lambda s: Act(torch.sin)),
    "saves nothing": (lambda s: True, lambda s: Act(lambda x: x * 0.5)),
    "a view": (lambda s: True, lambda s: Act(lambda x: x.flip(0))),
    "smaller than the trunk": (lambda s: True, lambda s: Act(lambda x: x.mean(-1, keepdim=True).tanh())),
    "no gradient": (lambda s: True, lambda s: Act(lambda x: x.detach().cos())),
}


def _permutations(s):
    return st.permutations(range(len(s))).map(lambda order: lambda x: x.permute(*order))


def _merges(s):
    return st.integers(0, len(s) - 2).map(lambda d: lambda x: x.flatten(d, d + 1))


def _splits(s):
    choices = [(d, n) for d, size in enumerate(s) for n in (1, 2, 3) if size % n == 0 and size]
    return st.sampled_from(choices).map(lambda c: lambda x: x.unflatten(c[0], (c[1], x.shape[c[0]] // c[1])))


REARRANGEMENTS = {
    "permute": (lambda s: True, _permutations),
    "transpose": (lambda s: True, lambda s: st.just(lambda x: torch.transpose(x, 0, -1))),
    "movedim": (lambda s: True, lambda s: st.just(lambda x: x.movedim(0, -1).contiguous())),
    "flatten": (lambda s: len(s) > 2, _merges),
    "unflatten": (lambda s: len(s) < 6, _splits),
    "unsqueeze": (
        lambda s: len(s) < 6,
        lambda s: st.integers(0, len(s)).map(lambda d: lambda x: x.unsqueeze(d)),
    ),
    "squeeze": (lambda s: 1 in s[1:] and len(s) > 2, lambda s: st.just(lambda x: x.squeeze(s.index(1, 1)))),
    "reshape": (lambda s: True, lambda s: st.just(lambda x: x.reshape(x.shape[-1], -1))),
}


@st.composite
def programs(draw):
    """A trunk's shape, and what happens to it: ("step", branch name, shape), ("move", function) or ("tap",)."""
    start = shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    program, names = [], []
    for _ in range(draw(st.integers(2, 6))):
        fitting = sorted(name for name, (fits, _) in BRANCHES.items() if fits(shape))
        program.append(("step", draw(st.sampled_from(fitting)), shape))
        names.append(program[-1][1])
        if draw(st.booleans()) and (
            movable := sorted(n for n, (fits, _) in REARRANGEMENTS.items() if fits(shape))
        ):
            name = draw(st.sampled_from(movable))
            names.append(name)
            move = draw(REARRANGEMENTS[name][1](shape))
            shape = tuple(move(torch.empty(shape, device="meta")).shape)
            program.append(("move", move))
        if draw(st.integers(0, 4)) == 0:
            program.append(("tap",))
    return start, program, names


class Frames(nn.Module):
    """Every step in a frame of its own; what is between them is not rewritten and meets the streams as they run."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.steps = nn.ModuleList(self.step(BRANCHES[p[1]][1](p[2])) for p in program if p[0] == "step")

    def step(self, body):
        return Residual(body)

    def run(self, step, x):
        return step(x)

    def forward(self, x):
        steps, taps = iter(self.steps), []
        for kind, *what in self.program:
            if kind == "step":
                x = self.run(next(steps), x)
            elif kind == "move":
                x = what[0](x)
            else:
                taps.append(x.sin())
        return x, taps


class OneFrame(Frames):
    """Steps, rearrangements and taps in one forward, which is rewritten whole."""

    def step(self, body):
        return body

    def run(self, step, x):
        return step(x) + x


def by_hand(net, x):
    """The recurrence of either net."""
    steps, taps = iter(net.steps), []
    previous = current = x
    for kind, *what in net.program:
        if kind == "step":
            step = next(steps)
            body = step.body if isinstance(step, Residual) else step
            previous, current = current, previous + body(current)
        elif kind == "move":
            previous, current = what[0](previous), what[0](current)
        else:
            taps.append(((previous + current) / 2).sin())
    return (previous + current) / 2, taps


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    programs(),
    st.sampled_from([Frames, OneFrame]),
    st.booleans(),
    st.sampled_from(["output", "taps", "both"]),
    st.integers(0, 99),
)
def test_any_chain_is_its_recurrence(drawn, style, train, on, seed):
    shape, program, _ = drawn
    torch.manual_seed(seed)
    reference = style(program).double().train(train)
    model = copy.deepcopy(reference)
    x = torch.randn(shape, dtype=torch.float64)
    revwire.rewire(model, x)
    assert sum(1 for _ in revwire.plan_of(model).steps) == len(model.steps)
    found = []
    for run, net in ((by_hand, reference), (type(model).__call__, model)):
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        out, taps = run(net, leaf)
        losses = [loss(out)] * (on != "taps" or not taps) + [loss(t) for t in taps] * (on != "output")
        sum(losses).backward()
        found.append([out, *taps, leaf.grad, *gradients(net), *net.buffers(), torch.get_rng_state().double()])
    assert_same(*found)
