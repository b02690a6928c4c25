"""The second run is the first run: what a branch reads is as it was, and what cannot be put back is found out.

Each kind of state is tried as it is (gradients are those with everything kept), also in two forwards before one
backward, and without what puts conditions back: the check of the numbers alone must find it out.
"""

import contextvars
import gc
import random
from collections import OrderedDict, deque
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.backends import cuda as sdp
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import revwire
from revwire import ReplayError
from revwire.run.conditions import Conditions
from revwire.run.tape import Link

WIDTH, DEPTH = 6, 4
GLOBAL = []
STRENGTH = contextvars.ContextVar("strength", default=1.0)


class Branch(nn.Module):
    """`tanh(linear(x))` times what `factor` says; `before_backward` is what a caller does in between."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def factor(self, y):
        return y

    def before_backward(self):
        pass

    def forward(self, x):
        return self.factor(torch.tanh(self.linear(x)))


class Int(Branch):
    count = 0

    def factor(self, y):
        self.count += 1
        return y * self.count


class Tuple(Branch):
    count = (0,)

    def factor(self, y):
        self.count = (self.count[0] + 1,)
        return y * self.count[0]


class List(Branch):
    def __init__(self):
        super().__init__()
        self.seen = []

    def factor(self, y):
        self.seen.append(0)
        return y * len(self.seen)


class Set(Branch):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def factor(self, y):
        self.seen.add(len(self.seen))
        return y * len(self.seen)


class Queue(Branch):
    def __init__(self):
        super().__init__()
        self.seen = deque(maxlen=9)

    def factor(self, y):
        self.seen.append(0)
        return y * len(self.seen)


class NestedDict(Branch):
    def __init__(self):
        super().__init__()
        self.table = {"a": {"n": 0}}

    def factor(self, y):
        self.table["a"]["n"] += 1
        return y * self.table["a"]["n"]


class DictInList(NestedDict):
    def __init__(self):
        super().__init__()
        self.table = {"a": ([{"n": 0}],)}

    def factor(self, y):
        self.table["a"][0][0]["n"] += 1
        return y * self.table["a"][0][0]["n"]


class Object(Branch):
    def __init__(self):
        super().__init__()
        self.state = SimpleNamespace(inner=SimpleNamespace(count=0))

    def factor(self, y):
        self.state.inner.count += 1
        return y * self.state.inner.count


class TensorInPlace(Branch):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(())

    def factor(self, y):
        self.count += 1
        return y * self.count.clone()  # plain autograd would save the counter itself


class TensorInTuple(Branch):
    def __init__(self):
        super().__init__()
        self.state = (torch.zeros(1),)

    def factor(self, y):
        self.state[0].add_(1)
        return y * self.state[0].clone()


class TrainedTensorInPlace(TensorInPlace):
    """One that wants a gradient: its own numbers may not be others' meanwhile."""

    def __init__(self):
        super().__init__()
        self.count.requires_grad_()

    def factor(self, y):
        with torch.no_grad():
            self.count += 1
        return y * self.count.clone()


class BufferThroughData(Branch):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def factor(self, y):
        out = y * self.scale.clone()
        self.scale.data = self.scale.data * 1.5
        return out


class BufferInsideData(BufferThroughData):
    def factor(self, y):
        out = y * self.scale.clone()
        self.scale.data.mul_(1.5)
        return out


class FunctionalNorm(Branch):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def factor(self, y):
        y = nn.functional.batch_norm(y, self.mean, self.var, training=self.training, momentum=0.4)
        return y + self.mean


class OwnGenerator(Branch):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def factor(self, y):
        return y * torch.rand(y.shape, generator=self.generator, dtype=y.dtype)


class PythonRandom(Branch):
    def factor(self, y):
        return y * random.random()


class OwnPythonRandom(Branch):
    def __init__(self):
        super().__init__()
        self.random = random.Random(3)

    def factor(self, y):
        return y * self.random.random()


class NumpyRandom(Branch):
    def factor(self, y):
        return y * float(np.random.rand())  # noqa: NPY002 - the legacy generator is the one of all code


class NumpyGenerator(Branch):
    def __init__(self):
        super().__init__()
        self.random = {"own": np.random.default_rng(3)}

    def factor(self, y):
        return y * self.random["own"].random()


class AttributeSet(Branch):
    strength = 1.0

    def before_backward(self):
        self.strength = 3.0

    def factor(self, y):
        return y * self.strength


class MaskSet(Branch):
    def __init__(self):
        super().__init__()
        self.mask = torch.linspace(0, 1, WIDTH)

    def before_backward(self):
        self.mask = torch.linspace(1, 0, WIDTH)

    def factor(self, y):
        return y * self.mask


class EntryReplaced(NestedDict):
    def before_backward(self):
        self.table["b"] = 5.0

    def factor(self, y):
        self.table.setdefault("b", 2.0)
        return y * self.table["b"] * (1 + len(self.table))


class ObjectSet(Branch):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(strength=1.0)

    def before_backward(self):
        self.config.strength = 4.0

    def factor(self, y):
        return y * self.config.strength


class ChildReplaced(Branch):
    def before_backward(self):
        self.linear = nn.Linear(WIDTH, WIDTH).to(self.linear.weight.dtype)


class HookAdded(Branch):
    def before_backward(self):
        self.linear.register_forward_hook(lambda _, __, out: out * 2)


class HookRemoved(Branch):
    def __init__(self):
        super().__init__()
        self.handle = self.linear.register_forward_hook(lambda _, __, out: out * 2)

    def before_backward(self):
        self.handle.remove()


class HookOfAnotherKindAdded(HookRemoved):
    def before_backward(self):
        self.linear.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


class GlobalHookAdded(Branch):
    def before_backward(self):
        GLOBAL.append(
            register_module_forward_hook(lambda module, _, out: out * 2 if module is self.linear else None)
        )


class HooksReplaced(HookRemoved):
    def before_backward(self):
        self.linear._forward_hooks = OrderedDict()


class HookInOtherTable(Branch):
    def before_backward(self):
        self.linear._forward_hooks = OrderedDict()
        self.linear.register_forward_hook(lambda _, __, out: out * 2)


class KeyRenamed(Branch):
    def __init__(self):
        super().__init__()
        self.table = {"strength": 2.0}

    def before_backward(self):
        self.table["other"] = self.table.pop("strength", 2.0)

    def factor(self, y):
        return y * self.table.get("strength", 1.0)


class KeyMoved(KeyRenamed):
    """In a table whose order counts."""

    def __init__(self):
        super().__init__()
        self.table = {"strength": 2.0, "other": 5.0}

    def before_backward(self):
        self.table["strength"] = self.table.pop("strength")

    def factor(self, y):
        return y * next(iter(self.table.values()))


class ListInItself(Branch):
    """More goes on after it."""

    def __init__(self):
        super().__init__()
        self.seen = [0]
        self.seen.append(self.seen)
        self.count = {"n": [0]}

    def factor(self, y):
        self.seen[0] += 1
        self.count["n"][0] += 1
        return y * (self.seen[1][0] + self.count["n"][0])


class ObjectInItself(Branch):
    def __init__(self):
        super().__init__()
        self.state = SimpleNamespace(count=0)
        self.state.me = self.state

    def factor(self, y):
        self.state.me.count += 1
        return y * self.state.count


class BesideItsOutput(AttributeSet):
    """What is noted of its attributes has no history, which the output has."""

    last = None

    def before_backward(self):
        self.strength += 1.0

    def factor(self, y):
        self.last = y
        return y * self.strength


class ObjectBesideItsOutput(ObjectSet):
    def before_backward(self):
        self.config.strength += 1.0

    def factor(self, y):
        self.config.last = y
        return y * self.config.strength


class WeightReplaced(Branch):
    def before_backward(self):
        self.linear.weight = nn.Parameter(torch.zeros_like(self.linear.weight))


class WeightTableReplaced(Branch):
    def before_backward(self):
        self.linear._parameters = {
            k: nn.Parameter(2 * p.detach()) for k, p in self.linear._parameters.items()
        }


class ModeChanged(Branch):
    def before_backward(self):
        self.eval()

    def factor(self, y):
        return y * (2 if self.training else 1)


class ContextVariable(Branch):
    def before_backward(self):
        STRENGTH.set(5.0)

    def factor(self, y):
        return y * STRENGTH.get()


class FunctionMode(Branch):
    """The forward runs within a mode that turns tanh into a sine; the backward does not."""


class DefaultDtype(Branch):
    def before_backward(self):
        torch.set_default_dtype(torch.float64)

    def factor(self, y):
        return y * (torch.full((), 0.1).double() * 1e8).frac()


KINDS = [
    Int, Tuple, List, Set, Queue, NestedDict, DictInList, Object, TensorInPlace, BufferThroughData,
    BufferInsideData, FunctionalNorm, OwnGenerator, PythonRandom, OwnPythonRandom, NumpyRandom, NumpyGenerator,
    AttributeSet, MaskSet, EntryReplaced, ObjectSet, ChildReplaced, HookAdded, HookRemoved, HooksReplaced,
    HookInOtherTable, GlobalHookAdded, HookOfAnotherKindAdded, TrainedTensorInPlace, KeyRenamed, KeyMoved,
    ListInItself, ObjectInItself, BesideItsOutput, ObjectBesideItsOutput, WeightReplaced, WeightTableReplaced,
    ModeChanged, ContextVariable, FunctionMode, DefaultDtype, TensorInTuple,
]  # fmt: skip


class Sine(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return torch.sin(*args) if function is torch.tanh else function(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.branches = nn.ModuleList(kind() for _ in range(DEPTH))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.fixture(autouse=True)
def everything_as_it_was():
    yield
    torch.set_default_dtype(torch.float32)
    STRENGTH.set(1.0)
    forget_global_hooks()


def forget_global_hooks():
    while GLOBAL:
        GLOBAL.pop().remove()


def gradients(kind, keep=None, forwards=1, training=True, **options):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    STRENGTH.set(1.0)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    model = revwire.rewire(Net(kind).double(), x, keep=keep, **options).train(training)
    parameters = list(model.parameters())
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    total = 0.0
    for _ in range(forwards):
        with Sine() if kind is FunctionMode else nullcontext():
            total = total + model(x).square().sum()
        for branch in model.branches:
            branch.before_backward()
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    forget_global_hooks()
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_gradients_are_those_with_everything_kept(kind, training, forwards):
    wanted = gradients(kind, "*", forwards, training)
    found = gradients(kind, None, forwards, training)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


def without_conditions(monkeypatch):
    monkeypatch.setattr(Conditions, "run", lambda self, where, function: function())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_numbers_alone_tell_another_run(kind, monkeypatch):
    without_conditions(monkeypatch)
    with pytest.raises(ReplayError, match=r"other numbers than in forward|saves"):
        gradients(kind)


def test_the_check_can_be_left_out(monkeypatch):
    without_conditions(monkeypatch)
    wanted = gradients(AttributeSet, "*")
    found = gradients(AttributeSet, check=False)
    assert not all(map(torch.allclose, wanted, found))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dials", [{}, {"chunks": 2}, {"anchor": "*"}, {"transitions": "checkpoint"}])
def test_weights_that_change_without_a_mark_are_found_out(dials, exact):
    class Plain(nn.Sequential):
        def __init__(self):
            super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    x = torch.randn(6, WIDTH)
    model = revwire.rewire(Net(Plain), x, exact=exact, **dials)
    loss = model(x).square().sum()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    with pytest.raises(ReplayError, match=r"other numbers than in forward.*Call backward\(\) before"):
        loss.backward()


@pytest.mark.parametrize("dials", [{}, {"anchor": "*"}])
def test_the_mask_of_a_drop_path_does_not_stand_for_a_branch(dials):
    class Dropped(nn.Sequential):
        def __init__(self):
            layers = nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), DropPath(0.5)
            super().__init__(nn.LayerNorm(WIDTH), *layers)

    x = torch.randn(6, 9, WIDTH)
    model = revwire.rewire(Net(Dropped), x, **dials).train()
    for changed in (0, DEPTH - 1) if dials else (0,):  # whose outputs are not asked for
        loss = model(x).square().sum()
        weight = model.branches[changed][1].weight
        weight.data = weight + 0.3 * torch.randn_like(weight)
        with pytest.raises(ReplayError, match=rf"branches\.{changed}|#{changed}"):
            loss.backward()


def test_a_fused_optimizers_step_before_backward_is_found_out():
    x = torch.randn(6, WIDTH)
    model = revwire.rewire(Net(Branch), x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    model(x).square().sum().backward()
    late = model(x).square().sum()
    optimizer.step()
    with pytest.raises(ReplayError, match="before"):
        late.backward()


def test_afterwards_everything_is_as_the_caller_left_it():
    x = torch.randn(5, WIDTH)
    model = revwire.rewire(Net(AttributeSet), x)
    loss = model(x).sum()
    model.branches[0].strength, model.branches[1].extra = 7.0, [1, 2]
    children = dict(model.branches[2]._modules)
    loss.backward()
    assert (model.branches[0].strength, model.branches[1].extra) == (7.0, [1, 2])
    assert model.branches[2]._modules == children


def settings():
    autocast = (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )
    precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    return *autocast, *precision, sdp.flash_sdp_enabled(), sdp.math_sdp_enabled()


def test_the_settings_of_the_process_are_those_of_the_forward_and_come_back():
    seen, x = [], torch.randn(5, WIDTH)
    model = revwire.rewire(Net(Branch), x)
    for branch in model.branches:
        branch.linear.register_forward_hook(lambda *_: seen.append(settings()))
    was = settings()
    try:
        torch.set_float32_matmul_precision("medium")
        sdp.enable_flash_sdp(enabled=False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().sum()
        torch.set_float32_matmul_precision("highest")
        sdp.enable_flash_sdp(enabled=True)
        sdp.enable_math_sdp(enabled=False)
        between = settings()
        loss.backward()
        assert settings() == between
    finally:
        torch.set_float32_matmul_precision(was[4])
        sdp.enable_flash_sdp(enabled=was[5])
        sdp.enable_math_sdp(enabled=was[6])
    assert len(seen) == 2 * DEPTH
    assert len(set(seen)) == 1


def test_a_branch_that_changes_its_own_weights_says_so_in_forward():
    class Clamps(Branch):
        def factor(self, y):
            with torch.no_grad():
                self.linear.weight.clamp_(-0.2, 0.2)
            return y

    x = torch.randn(5, WIDTH)
    model = revwire.rewire(Net(Clamps), x)
    with pytest.raises(ReplayError, match=r"the branch itself changes Linear\.weight in place"):
        model(x)


def test_losses_appended_to_a_list_are_told_to_happen_twice():
    losses = []

    class Appends(Branch):
        def factor(self, y):
            losses.append(y.mean(0).square().sum())
            return y

    x = torch.randn(5, WIDTH)
    model = revwire.rewire(Net(Appends), x)
    losses.clear()

    def step():
        loss = model(x).sum() + sum(losses)
        losses.clear()
        loss.backward()

    step()
    with pytest.raises(ReplayError, match=r"side effect.*happens twice"):
        step()


def test_what_a_module_keeps_does_not_keep_earlier_graphs_alive():
    class Keeps(Branch):
        def __init__(self):
            super().__init__()
            self.last, self.all, self.state = None, {"seen": None}, SimpleNamespace(last=None)

        def factor(self, y):
            self.last, self.all["seen"], self.state.last = y, [y], y
            return y

    x = torch.randn(5, WIDTH)
    model = revwire.rewire(Net(Keeps), x)
    gc.collect()
    before = sum(type(thing) is Link for thing in gc.get_objects())
    gc.disable()
    try:
        for _ in range(6):
            model(x)
        # the modules themselves hold what the last call gave them
        assert sum(type(thing) is Link for thing in gc.get_objects()) - before <= 2 * DEPTH
    finally:
        gc.enable()


def test_a_weight_whose_memory_is_gone_is_told():
    """As a sharded one is outside of its own block."""
    model = revwire.rewire(Net(Branch), torch.randn(5, WIDTH))
    loss = model(torch.randn(5, WIDTH)).sum()
    model.branches[1].linear.weight.untyped_storage().resize_(0)
    with pytest.raises(ReplayError, match=r"the memory of Linear\.weight was freed"):
        loss.backward()


def test_a_tensor_in_a_tuple_is_what_it_was_after_backward():
    model = revwire.rewire(Net(TensorInTuple), torch.randn(5, WIDTH))
    loss = model(torch.randn(5, WIDTH)).sum()
    model(torch.randn(5, WIDTH))
    held = [branch.state[0] for branch in model.branches]
    before = [tensor.clone() for tensor in held]
    loss.backward()
    assert before == held
    assert all(before)
