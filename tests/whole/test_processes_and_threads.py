"""Rewired models in workers of loaders, as replicas, copied and trained by several threads at once."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import revwire
from tests.helpers.nets import assert_same, gradients, loss, pair

each_net = pytest.mark.parametrize("name", ["loop", "vit", "convolutions"])


def step(model, x):
    """Outputs and gradients."""
    model.zero_grad()
    out = model(x)
    loss(out).backward()
    return [out.detach(), *gradients(model)]


class Stepping(Dataset):
    """What a worker makes of a model: outputs, and where torch can, a step of its own."""

    def __init__(self, model, inputs, *, forked):
        self.model, self.inputs, self.forked = model, inputs, forked

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if self.forked:  # torch has no backward in a fork of a process that ran one
            return [self.model(self.inputs[index]).detach()]
        return step(self.model, self.inputs[index])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start"),
    [("loop", "fork"), ("vit", "fork"), ("convolutions", "fork"), ("vit", "spawn"), ("loop", "forkserver")],
)
def test_workers_of_a_loader(name, start):
    """The model was rewired, and trained a step, before they were started."""
    reference, model, x = pair(name)
    inputs = [torch.randn_like(x) for _ in range(4)]
    wanted = [step(reference, each) for each in inputs]
    step(model, x)
    stepping = Stepping(model, inputs, forked=start == "fork")
    loader = DataLoader(stepping, batch_size=None, num_workers=2, multiprocessing_context=start)
    for found, should in zip(loader, wanted, strict=True):
        assert_same(found, should[: len(found)])
    assert_same(step(model, x), step(reference, x))


def replica_of(model):
    """A module as `torch.nn.parallel.replicate` makes it for another device: parameters are copies, and no leaves."""
    modules = dict(model.named_modules())
    replicas = {name: module._replicate_for_data_parallel() for name, module in modules.items()}
    for name, module in modules.items():
        replica = replicas[name]
        for key in module._modules:
            replica._modules[key] = replicas[f"{name}.{key}".lstrip(".")]
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.clone())
        for key, buffer in module._buffers.items():
            replica._buffers[key] = None if buffer is None else buffer.clone()
    return replicas[""]


@each_net
def test_replicas_in_threads(name):
    """As DataParallel trains: a replica and a thread for each part of the batch."""
    reference, model, x = pair(name)
    parts = [torch.randn_like(x) for _ in range(3)]
    sum(loss(reference(part)) for part in parts).backward()
    replicas = [replica_of(model) for _ in parts]
    with ThreadPoolExecutor(len(parts)) as pool:
        outputs = list(pool.map(lambda replica, part: replica(part), replicas, parts))
    sum(map(loss, outputs)).backward()
    assert_same(gradients(model), gradients(reference))


@each_net
def test_copies_made_and_trained_by_threads(name):
    reference, model, x = pair(name)
    wanted = step(reference, x)
    together = Barrier(4)

    def copied(_):
        together.wait()
        own = copy.deepcopy(model)
        return [step(own, x) for _ in range(3)][-1]

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(copied, range(4)):
                assert_same(found, wanted)


@pytest.mark.parametrize("names", [("loop", "loop"), ("vit", "convolutions")])
def test_two_models_in_two_threads(names):
    """Rewired and trained at once, each with other shapes as it goes."""
    together = Barrier(2)

    def trained(name):
        reference, model, x = pair(name)
        together.wait()
        rewired = revwire.rewire(revwire.unwire(copy.deepcopy(model)), x)
        for number in range(4):
            inputs = torch.cat([x] * (1 + number % 2))
            assert_same(step(rewired, inputs), step(reference, inputs))
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(trained, names)) == [True, True]
