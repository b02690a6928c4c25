"""Averages, copies and files of a whole rewired model, also in a process that knows nothing of the first one."""

import pickle

import pytest
import timm.utils
import torch
from torch.optim import swa_utils

import revwire
from tests.helpers.nets import NETS, assert_same, gradients, loss, pair
from tests.helpers.programs import python

each_net = pytest.mark.parametrize("name", ["loop", "vit", "convolutions"])


def step(model, x):
    """One step of training; the same of reference and rewired model, as their gradients are."""
    loss(model.train()(x)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1e-3 * parameter.grad)
            parameter.grad = None


AVERAGES = {
    "timm": lambda model: timm.utils.ModelEmaV3(model, decay=0.7),
    "timm, in buffers too": lambda model: timm.utils.ModelEmaV3(model, decay=0.7, exclude_buffers=False),
    "swa": swa_utils.AveragedModel,
    "ema": lambda model: swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True
    ),
}


def updated(average, model):
    (average.update if hasattr(average, "update") else average.update_parameters)(model)


@pytest.mark.parametrize("kind", AVERAGES)
@each_net
def test_an_average_is_that_of_the_recurrence_by_hand(name, kind):
    reference, model, x = pair(name, dropout=0.2)
    found = []
    for m in (reference, model):
        torch.manual_seed(0)
        average = AVERAGES[kind](m)
        for _ in range(3):
            step(m, x)
            updated(average, m)
        out = average.module.eval()(x)
        assert not torch.allclose(out, m.eval()(x))
        loss(out).backward()  # a student may be distilled from it, or trained on
        found.append([out, *gradients(average.module), *average.module.buffers()])
    assert_same(*found)
    assert revwire.plan_of(average.module) == revwire.plan_of(model)


def test_the_statistics_of_an_average_are_gathered_anew():
    """`update_bn` runs the average in train mode, without backward."""
    reference, model, x = pair("convolutions")
    found = []
    for m in (reference, model):
        average = swa_utils.AveragedModel(m)
        step(m, x)
        updated(average, m)
        swa_utils.update_bn([x, 2 * x], average)
        found.append(average.module.buffers())
    assert_same(*found)


LOADS = """
import pickle, sys, torch
from tests.helpers.nets import gradients, loss
import revwire
folder = sys.argv[1]
results = {}
for name in sys.argv[2:]:
    x = torch.load(f"{folder}/{name}.x")
    with open(f"{folder}/{name}.pickle", "rb") as file:
        models = {"saved": torch.load(f"{folder}/{name}.pt", weights_only=False), "pickled": pickle.load(file)}
    for how, model in models.items():
        torch.manual_seed(3)
        out = model(x)
        loss(out).backward()
        results[name, how] = [out.detach(), *gradients(model)]
        results[name, how, "class"] = type(revwire.unwire(model)).__qualname__
torch.save(results, f"{folder}/results.pt")
"""


def test_a_whole_model_is_loaded_in_another_process(tmp_path):
    wanted = {}
    for name in NETS:
        reference, model, x = pair(name, dropout=0.2)
        loss(model(x)).backward()  # what it holds of a run is no part of it
        model.zero_grad()
        model.load_state_dict(reference.net.state_dict())
        torch.save(model, tmp_path / f"{name}.pt")
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(model))
        torch.save(x, tmp_path / f"{name}.x")
        torch.manual_seed(3)
        out = reference(x)
        loss(out).backward()
        wanted[name] = [out, *gradients(reference)], type(reference.net).__qualname__
    done = python("-W", "error", "-c", LOADS, tmp_path, *NETS)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    for name, (tensors, kind) in wanted.items():
        for how in ("saved", "pickled"):
            assert_same(tensors, results[name, how])
            assert results[name, how, "class"] == kind
