"""Long lives: what is made for one shape, class or thread does not stay for ever."""

import copy
import gc
import os
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import revwire
from tests.helpers.programs import python


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        if x.shape[1] > 10**6:
            x = x * 2
        return x + torch.tanh(self.f(x))


def net(block=Block):
    return revwire.rewire(nn.Sequential(block(), block(), block()), torch.zeros(2, 5, 8))


def test_shapes_leave_nothing_in_torchs_cache():
    model = net()
    before = len(FakeTensorMode.cache)
    for length in range(2, 12):
        model(torch.randn(1, length, 8)).sum().backward()
    assert len(FakeTensorMode.cache) == before


def test_what_others_cached_stays():
    with FakeTensorMode():
        torch.ones(3, 7) + torch.ones(3, 7)
    before = dict(FakeTensorMode.cache)
    assert before
    net()
    revwire.estimate(nn.Linear(3, 3), torch.zeros(2, 3))
    assert before.items() <= FakeTensorMode.cache.items()
    assert len(FakeTensorMode.cache) == len(before)


@pytest.mark.parametrize("copied", [False, True])
def test_a_class_made_for_one_model_goes_with_it(copied):
    own = type("Own", (Block,), {})
    model = net(own)
    if copied:
        model = copy.deepcopy(model)
    model(torch.randn(1, 3, 8)).sum().backward()
    classes = [weakref.ref(own), weakref.ref(type(model[0]))]
    assert classes[0]() is not classes[1]()
    del own, model
    gc.collect()
    assert [ref() for ref in classes] == [None, None]


def test_models_of_one_class_share_what_is_made_for_it():
    one, other = net(), net()
    assert type(one[0]) is type(other[0])
    assert type(copy.deepcopy(one)[0]) is type(one[0])


# in a process of its own: torch's autograd does not survive a fork once it has started threads
FORKED = """
import os, threading, time, warnings
import torch
from tests.helpers.programs import python
from tests.rewrite.test_long_life import net

warnings.simplefilter("ignore")
torch.set_num_threads(1)
held, done = threading.Event(), threading.Event()

def trace():
    with TRACING:
        held.set()
        done.wait(60)

thread = threading.Thread(target=trace)
thread.start()
held.wait(60)
child = os.fork()
if not child:
    status = 1
    try:
        net()(torch.randn(1, 3, 8)).sum().backward()
        status = 0
    finally:
        os._exit(status)
end = time.monotonic() + 60
while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
    time.sleep(0.05)
if not ended[0]:
    os.kill(child, 9)
print("ended" if ended == (child, 0) else f"hung or failed: {ended}")
done.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_while_another_thread_traces_can_trace():
    done = python("-c", FORKED, timeout=150)
    assert done.stdout == "ended\n", done.stderr
