"""Looking at a model leaves nothing behind: in caches, tables, random states, filters of warnings, the model itself."""

import copy
import functools
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire

WIDTH = 6

LIBRARY = types.ModuleType("library_of_helpers")
LIBRARY.__dict__["__name__"] = "library_of_helpers"
exec(
    """
import functools
import torch

KNOWN = {}
SEEN = set()
LATEST = None

@functools.lru_cache(maxsize=16)
def sizes(shape, heads):
    rows, width = shape
    return rows, heads, width // heads

@functools.cache
def positions(width):
    return torch.arange(width, dtype=torch.float64)

class Recipes:
    @staticmethod
    @functools.lru_cache
    def sizes(shape, heads):
        return shape[0], heads, shape[1] // heads

    @classmethod
    @functools.lru_cache
    def of_class(cls, shape, heads):
        return shape[0], heads, shape[1] // heads

    @functools.lru_cache
    def own(self, shape, heads):
        return shape[0], heads, shape[1] // heads

RECIPES = Recipes()

def split(x, heads):
    return x.reshape(sizes(tuple(x.shape), heads))

def table(x):
    key = tuple(x.shape)
    if key not in KNOWN:
        KNOWN[key] = torch.arange(x.shape[1], dtype=x.dtype)
    SEEN.add(key)
    return KNOWN[key]

def lazily(x):
    global LATEST
    if LATEST is None:
        LATEST = torch.ones(x.shape[1], dtype=x.dtype)
    return LATEST

def closing(function):
    kept = functools.lru_cache(function)
    def called(x):
        return kept(tuple(x.shape), 2)
    return called

in_a_closure = closing(lambda shape, heads: (shape[0], heads, shape[1] // heads))
""",
    LIBRARY.__dict__,
)


def through(get):
    return lambda y: y.reshape(get(y)).reshape(y.shape)


USES = {
    "a library's function": through(lambda y: LIBRARY.split(y, 2).shape),
    "a static method": through(lambda y: LIBRARY.Recipes.sizes(tuple(y.shape), 2)),
    "a class method": through(lambda y: LIBRARY.Recipes.of_class(tuple(y.shape), 2)),
    "a method": through(lambda y: LIBRARY.RECIPES.own(tuple(y.shape), 2)),
    "a closure": through(LIBRARY.in_a_closure),
    "a table of tensors": lambda y: y * LIBRARY.table(y),
    "a cached table": lambda y: y * LIBRARY.positions(y.shape[1]),
    "a global": lambda y: y * LIBRARY.lazily(y),
}


def caches():
    members = vars(LIBRARY.Recipes)
    kept = LIBRARY.in_a_closure.__closure__[0].cell_contents
    functions = [LIBRARY.sizes, LIBRARY.positions, members["sizes"].__func__, members["of_class"].__func__]
    functions += [members["own"], kept]
    assert all(type(f) is type(functools.lru_cache(len)) for f in functions), "a function was not put back"
    return [f.cache_info().currsize for f in functions], len(LIBRARY.KNOWN), len(LIBRARY.SEEN), LIBRARY.LATEST


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(LIBRARY, "LATEST", None)
    monkeypatch.setitem(sys.modules, "library_of_helpers", LIBRARY)
    LIBRARY.KNOWN.clear()
    LIBRARY.SEEN.clear()
    members = vars(LIBRARY.Recipes)
    for function in (LIBRARY.sizes, LIBRARY.positions, members["sizes"].__func__, members["own"]):
        function.cache_clear()
    members["of_class"].__func__.cache_clear()
    LIBRARY.in_a_closure.__closure__[0].cell_contents.cache_clear()


def net(use):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + use(self.f(x))

    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3))).double().eval()


@pytest.mark.parametrize("what", USES)
def test_planning_and_tracing_again_leave_no_trace_in_caches(what):
    original = net(USES[what])
    x, other = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(7, WIDTH, dtype=torch.float64)
    before = caches()
    assert len(list(revwire.plan(original, x).steps)) == 3
    assert caches() == before
    model = revwire.rewire(copy.deepcopy(original), x, coupling="bdia").eval()
    assert caches() == before
    # a global that holds a tensor by now cannot be traced again, as of old
    for each in (x, x) if what == "a global" else (x, other, x):
        # no stand-in comes out of a cache, neither in the model nor in the original
        torch.testing.assert_close(model(each), original(each))
        torch.testing.assert_close(model(each), original(each))


def test_what_was_in_a_cache_is_in_it_afterwards():
    kept = LIBRARY.positions(WIDTH)
    LIBRARY.KNOWN["mine"] = 1
    revwire.plan(net(USES["a library's function"]), torch.randn(4, WIDTH, dtype=torch.float64))
    assert LIBRARY.positions(WIDTH) is kept
    assert LIBRARY.KNOWN == {"mine": 1}


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if random.random() < 2 and np.random.rand() < 2:  # noqa: NPY002 - the global generator is the point
            torch.rand(3)
        return F.dropout(x + self.f(x), 0.1, self.training)


def states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


class FusedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.dropout(x + self.f(x), 0.1, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_planning_draws_no_random_numbers(training):
    model = nn.Sequential(Draws(), Draws(), nn.Dropout(0.5)).train(training)
    before = states()
    revwire.plan(model, torch.randn(4, WIDTH, generator=torch.Generator()))
    assert states() == before


def test_the_first_call_in_train_mode_draws_what_the_model_draws():
    x = torch.randn(4, WIDTH)
    found = []
    for rewired in (False, True):
        model = nn.Sequential(*(FusedBlock() for _ in range(3)))
        model = revwire.rewire(model, x) if rewired else model
        torch.manual_seed(1)
        model.train()(x)
        found.append(torch.get_rng_state())
    assert torch.equal(*found)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.seen = nn.Linear(WIDTH, WIDTH), {}
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        self.seen["x"], self.latest = x, x
        LIBRARY.sizes(tuple(x.shape), 2)
        random.random()
        raise ZeroDivisionError("on purpose")


def test_a_plan_that_fails_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Fails()).train()
    held = [(dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    call, read, apply = nn.Module.__call__, nn.Module.__getattr__, torch.autograd.Function.__dict__["apply"]
    filters, before, kept = list(warnings.filters), states(), caches()
    kind = isinstance
    with pytest.raises(revwire.RewireError, match="on purpose"):
        revwire.plan(model, torch.randn(4, WIDTH))
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, read)
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert isinstance is kind
    assert list(warnings.filters) == filters
    assert (states()[:2], caches()) == (before[:2], kept)
    for module, (attributes, parameters, buffers) in zip(model.modules(), held, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert module._parameters == parameters
        assert module._buffers == buffers
    assert not model[1].seen
    assert model[1].count == 0


class Replaced(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.f(x)


def test_a_planned_block_that_is_fused_away_is_named():
    x = torch.randn(4, WIDTH)
    model = revwire.rewire(nn.Sequential(*(Plain() for _ in range(3))), x)
    model(x)
    for each in (model, copy.deepcopy(model)):
        each[1] = nn.Linear(WIDTH, WIDTH)
        with pytest.raises(revwire.RewireError, match=r"^1 was replaced by Linear .* then fuse, then rewire"):
            each(x)
    del model[1:]
    with pytest.raises(revwire.RewireError, match=r"^1 \(and 1 more\) is gone"):
        model(x)


def test_wrappers_around_planned_blocks_are_no_replacement():
    x = torch.randn(4, WIDTH)
    torch.manual_seed(0)
    model = revwire.rewire(nn.Sequential(*(Plain() for _ in range(3))), x, coupling="bdia").eval()
    wanted = model(x)
    model[1] = Replaced(Replaced(model[1]))
    for _ in range(2):
        torch.testing.assert_close(model(x), wanted)
    # found further down once, it is looked for there
    assert set(model.__dict__["_revwire_planned"]) == {"0", "1.inner.inner", "2"}
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), wanted)
    assert "_revwire_planned" not in vars(revwire.unwire(model))
