"""One thread traces at a time, and what it patches and hands out acts for it alone."""

import builtins
import copy
import functools
import queue
import threading
import warnings

import pytest
import torch
from torch import nn

import revwire
from revwire._torch import FakeTensor
from revwire.trace.frame import Frame
from revwire.trace.recorder import Recorder

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return x + self.norm(self.f(x)) * (1.0 if x.shape[0] > 3 else 2.0)


def net(depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).double().eval()


def in_threads(*works):
    errors = []

    def run(work):
        try:
            work()
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model each"])
def test_first_calls_from_several_threads(shared):
    original = net()
    inputs = [torch.randn(n, WIDTH, dtype=torch.float64) for n in range(2, 22)]
    wanted = [original(x) for x in inputs]
    model = revwire.rewire(copy.deepcopy(original), inputs[0], coupling="bdia").eval()
    models = [model if shared else copy.deepcopy(model) for _ in range(4)]
    call, kind = nn.Module.__call__, builtins.isinstance

    def work(k):
        for x, out in list(zip(inputs, wanted, strict=True))[k::2]:
            torch.testing.assert_close(models[k](x), out)

    in_threads(*(lambda k=k: work(k) for k in range(4)))
    assert nn.Module.__call__ is call
    assert builtins.isinstance is kind
    assert not any(isinstance(p, FakeTensor) for m in models for p in (*m.parameters(), *m.buffers()))


def test_a_model_that_is_planned_goes_on_in_other_threads():
    model = net().train(False)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    wanted, stop = model(x), threading.Event()

    def runs():
        while not stop.is_set():
            torch.testing.assert_close(model(x), wanted)
            assert not any(isinstance(p, FakeTensor) for p in model.parameters())

    def plans():
        try:
            for _ in range(10):
                assert len(list(revwire.plan(model, x).steps)) == 6
        finally:
            stop.set()

    in_threads(runs, plans)


def test_only_one_of_two_threads_rewires_a_model():
    model, refused = net(), []
    x = torch.randn(5, WIDTH, dtype=torch.float64)

    def rewires():
        try:
            revwire.rewire(model, x)
        except revwire.RewireError as error:
            refused.append(str(error))

    in_threads(rewires, rewires, rewires)
    assert len(refused) == 2
    assert all("rewired" in reason for reason in refused)
    revwire.unwire(model)
    assert not any(hasattr(type(m), "revwire_original") for m in model.modules())


class Asks(nn.Module):
    """While its forward is traced, another thread looks around."""

    def __init__(self, look):
        super().__init__()
        self.f, self.look = nn.Linear(WIDTH, WIDTH), [look]

    def forward(self, x):
        thread = threading.Thread(target=self.look[0], args=(self,))
        thread.start()
        thread.join()
        return x + self.f(x)


def traced(look):
    module = Asks(look)
    recorder = Recorder(module, nested=False)
    examples = recorder.example(((torch.randn(3, WIDTH),), {}))
    frame = Frame("", module)
    with recorder.recording():
        recorder.trace(frame, *examples)
    assert frame.graph is not None


def test_others_see_the_module_and_torch_as_they_are():
    seen = {}

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def look(module):
        seen["weight"] = type(module.f.weight)
        seen["held"] = type(module.f._parameters["weight"])
        seen["call"] = module.f(torch.ones(2, WIDTH))
        seen["function"] = Doubled.apply(torch.ones(2))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warnings.warn("hear me", stacklevel=1)
        seen["told"] = len(told)

    traced(look)
    assert seen["weight"] is nn.Parameter
    assert seen["held"] is nn.Parameter
    assert type(seen["call"]) is torch.Tensor
    assert seen["function"].tolist() == [2.0, 2.0]
    assert seen["told"] == 1


def test_others_are_warned_by_the_filters_that_they_have():
    found = []

    def look(module):
        try:
            warnings.warn("an error in this test run", stacklevel=1)
        except UserWarning as warning:
            found.append(warning)

    traced(look)
    assert len(found) == 1


def test_what_others_draw_meanwhile_stays_drawn():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    traced(lambda module: torch.rand(3))
    assert not torch.equal(torch.get_rng_state(), state)


def test_others_use_caches_as_they_are():
    @functools.cache
    def table(width):
        return torch.ones(width)

    found = queue.SimpleQueue()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            thread = threading.Thread(target=lambda: found.put(table(WIDTH)))
            thread.start()
            thread.join()
            return x + self.f(x) * table(WIDTH)

    kept = table(WIDTH)
    revwire.plan(nn.Sequential(Block(), Block()), torch.randn(3, WIDTH))
    assert found.qsize() > 1
    while not found.empty():
        assert found.get() is kept
