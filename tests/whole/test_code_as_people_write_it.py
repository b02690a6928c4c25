"""Ways of writing a residual network that third-party packages use: rewired, with the gradients of everything kept."""

import pytest
import torch
from torch import nn

import revwire
from tests.helpers.nets import assert_same
from tests.helpers.steps import kept, results

WIDTH, DEPTH = 8, 4


def assert_rewired(model, x, steps=DEPTH):
    """So many steps, and verified; and a second input of another batch has the gradients of everything kept."""
    assert len(list(revwire.plan(model, x).steps)) == steps
    report = revwire.verify(model, x)
    assert report.ok, report
    revwire.rewire(model, x)
    for mode in (True, False):
        model.train(mode)
        other = torch.randn(3, *x.shape[1:], dtype=x.dtype) if x.is_floating_point() else x
        floating = x.is_floating_point()
        assert_same(results(kept(model), other, of_input=floating), results(model, other, of_input=floating))


# -- factories with sizes of the trunk --------------------------------------------------------------------------------

FACTORIES = {
    "zeros": lambda b, n: torch.zeros(b, n, 1),
    "zeros of a tuple": lambda b, n: torch.zeros((b, n, 1)),
    "ones in another dtype": lambda b, n: torch.ones(b, n, 1, dtype=torch.float64),
    "empty": lambda b, n: torch.empty(b, n, 1).fill_(0.5),
    "full": lambda b, n: torch.full((b, n, 1), 0.5),
    "arange": lambda b, n: torch.arange(n).double()[:, None],
    "eye": lambda b, n: torch.eye(n)[:, :1],
    "one number": lambda b, n: torch.zeros(n)[:, None],
    "arithmetic": lambda b, n: torch.ones(b, n * 2, 1)[:, ::2],
    "of a list": lambda b, n: torch.zeros([b, n, 1]),
}


class Factory(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.norm, self.ff = how, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        return x + self.ff(self.norm(x) + self.how(b, n).to(x))


@pytest.mark.parametrize("how", FACTORIES)
def test_factories_with_sizes_of_the_trunk(how):
    model = nn.Sequential(*(Factory(FACTORIES[how]) for _ in range(DEPTH))).double()
    assert_rewired(model, torch.randn(2, 6, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("how", [lambda b, n: torch.rand(b, n, 1), lambda b, _: torch.randn(b, 1, 1)])
def test_random_factories_draw_the_same_again(how):
    model = nn.Sequential(*(Factory(how) for _ in range(DEPTH))).double()
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    revwire.rewire(model, x)
    assert_same(results(kept(model), x), results(model, x))


def test_torchs_factories_are_its_own_afterwards():
    was = [getattr(torch, name) for name in ("zeros", "ones", "empty", "rand", "randn")]
    model = nn.Sequential(*(Factory(lambda b, n: torch.zeros(b, n, 1)) for _ in range(DEPTH)))
    revwire.rewire(model, torch.randn(2, 6, WIDTH))(torch.randn(2, 6, WIDTH))
    assert [getattr(torch, name) for name in ("zeros", "ones", "empty", "rand", "randn")] == was
    # nor is it they that are looked for at each call: one trace serves all
    variants = [len(block._revwire_program._variants) for block in model]
    model(torch.randn(2, 6, WIDTH))
    assert [len(block._revwire_program._variants) for block in model] == variants


# -- attributes of tensors that are tensors ---------------------------------------------------------------------------


class Attribute(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.ff = name, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.name == "real":
            return x + self.ff(torch.complex(x, x.flip(0)).real) * torch.complex(x, x).imag.tanh()
        return x + getattr(self.ff(getattr(x, self.name)), self.name)


@pytest.mark.parametrize("name", ["mT", "T", "H", "mH", "real"])
def test_attributes_that_are_tensors(name):
    model = nn.Sequential(*(Attribute(name) for _ in range(DEPTH))).double()
    shape = (WIDTH, WIDTH) if name in {"T", "H"} else (3, WIDTH, WIDTH)
    x = torch.randn(shape, dtype=torch.float64)
    assert len(list(revwire.plan(model, x).steps)) == DEPTH
    revwire.rewire(model, x)
    assert_same(results(kept(model), x), results(model, x))


# -- the sum in a child -----------------------------------------------------------------------------------------------


class Add(nn.Module):
    def forward(self, one, other):
        return one + other


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, out, residual):
        return out * self.scale + residual


class Adding(nn.Module):
    def __init__(self, add, *, branch_first):
        super().__init__()
        self.branch_first = branch_first
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), add()]) for _ in range(DEPTH)
        )

    def forward(self, x):
        for norm, ff, add in self.layers:
            out = ff(norm(x))
            x = add(out, x) if self.branch_first else add(x, out)
        return x


@pytest.mark.parametrize(("add", "branch_first"), [(Add, True), (Add, False), (Scaled, True)])
def test_the_sum_in_a_child(add, branch_first):
    assert_rewired(
        Adding(add, branch_first=branch_first).double(), torch.randn(5, WIDTH, dtype=torch.float64)
    )


def test_a_child_that_adds_something_else_is_no_step():
    class Elsewhere(Adding):
        def forward(self, x):
            y = x.tanh()
            for norm, ff, add in self.layers:
                x = add(ff(norm(y)), x)  # what is added comes from another tensor
            return x

    assert not revwire.plan(Elsewhere(Add, branch_first=True), torch.randn(5, WIDTH)).chains


# -- an expanded trunk ------------------------------------------------------------------------------------------------


class Queries(nn.Module):
    """Learned queries, expanded over the batch, are the trunk."""

    def __init__(self, expand):
        super().__init__()
        self.expand, self.queries = expand, nn.Parameter(torch.randn(5, WIDTH))
        self.blocks = nn.Sequential(*(Normed() for _ in range(DEPTH)))

    def forward(self, y):
        return self.blocks(self.expand(self.queries, y)) * y


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.value, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x + self.value(x).tanh())


@pytest.mark.parametrize(
    "expand",
    [
        lambda q, y: q.expand(len(y), -1, -1),
        lambda q, y: q.mean(0).expand_as(y),
        lambda q, y: q.mean().expand_as(y),
        lambda q, y: torch.broadcast_to(q, y.shape),
    ],
)
def test_an_expanded_trunk(expand):
    assert_rewired(Queries(expand).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64))


# -- positions --------------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.reads, self.table = reads, nn.Embedding(32, WIDTH)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return (
            self.table(places) + x
            if self.reads == "adds"
            else self.table(places) * (x.mean(-1, keepdim=True) if self.reads else 1)
        )


class Positioned(nn.Module):
    def __init__(self, reads=False):
        super().__init__()
        self.words, self.pos = nn.Embedding(50, WIDTH), Positions(reads)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH)
        )

    def forward(self, ids):
        x = self.words(ids)
        x = x + self.pos(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_positions_that_read_the_shape_alone_are_no_step():
    assert_rewired(Positioned().double(), torch.randint(50, (2, 8)))


def test_positions_that_read_the_values_are_one():
    assert_rewired(Positioned(reads=True).double(), torch.randint(50, (2, 8)), DEPTH + 1)


# -- two trunks, one attention over both ------------------------------------------------------------------------------


class Modulated(nn.Module):
    """Hands out gates beside the normed input, as adaptive norms do."""

    def __init__(self):
        super().__init__()
        self.norm, self.gates = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, t):
        now, later = self.gates(t)[:, None].chunk(2, -1)
        return self.norm(x), now, later


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_x, self.of_c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, c):
        both = torch.cat([self.of_x(x), self.of_c(c)], 1)
        both = nn.functional.scaled_dot_product_attention(both, both, both)
        return both[:, : x.shape[1]], both[:, x.shape[1] :]


class JointBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_x, self.norm_c, self.attention = Modulated(), Modulated(), Both()
        self.ff_x, self.ff_c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, c, t):
        of_x, gate_x, later_x = self.norm_x(x, t)
        of_c, gate_c, later_c = self.norm_c(c, t)
        a, b = self.attention(of_x, of_c)
        x = x + gate_x * a
        x = x + later_x * self.ff_x(x).tanh()
        c = c + gate_c * b
        c = c + later_c * self.ff_c(c).tanh()
        return x, c


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock() for _ in range(DEPTH))

    def forward(self, x, c, t):
        for block in self.blocks:
            x, c = block(x, c, t)
        return x.mean(1) + c.mean(1)


@pytest.mark.parametrize(("of_x", "of_c"), [(8, 4), (4, 8), (5, 5)])
def test_of_two_trunks_under_one_attention_the_larger_is_a_chain(of_x, of_c):
    torch.manual_seed(0)
    model = Joint().double()
    inputs = [torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (of_x, of_c)]
    inputs.append(torch.randn(2, WIDTH, dtype=torch.float64))
    plan = revwire.plan(model, tuple(inputs))
    assert [len(chain.steps) for chain in plan.chains] == [2 * DEPTH]
    assert {step.trunk[1] for step in plan.steps} == {max(of_x, of_c)}
    assert any("inner values of each other's branches" in skipped.reason for skipped in plan.skipped)
    report = revwire.verify(model, tuple(inputs))
    assert report.ok, report
    revwire.rewire(model, tuple(inputs))
    assert_same(results(kept(model), *inputs), results(model, *inputs))


# -- children that are gone -------------------------------------------------------------------------------------------


class Fusable(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.fused = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), None

    def forward(self, x):
        return x.tanh() if self.fused else x + self.mix(self.norm(x))

    def fuse(self):
        del self.norm, self.mix
        self.fused = True


def test_children_that_are_gone_are_told():
    model = nn.Sequential(*(Fusable() for _ in range(DEPTH)))
    x = torch.randn(5, WIDTH)
    revwire.rewire(model, x)
    model[1].fuse()
    with pytest.raises(revwire.RewireError, match=r"has 0 residuals|was replaced|is gone"):
        model(x)
