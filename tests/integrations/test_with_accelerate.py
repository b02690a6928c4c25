"""Accelerate: a run that stops and goes on, gradient accumulation, mixed precision, and the way back."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.utils.data import DataLoader

import revwire
from tests.helpers.branches import Net
from tests.helpers.pictures import Pictures, assert_close, rewired, vit
from tests.helpers.steps import kept


@pytest.fixture(autouse=True)
def _fresh():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(model, steps, saved=None, resumed=None, **options):
    """The losses of `steps` batches; written to the folder `saved` after them, read from `resumed` before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    # a generator of its own: opening the loader draws a number, which must not be one of the restored state's
    loader = DataLoader(Pictures(), 4, generator=torch.Generator())
    dtype = next(model.parameters()).dtype
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    done = 0
    if resumed is not None:
        accelerator.load_state(str(resumed))
        done = 2
    losses = []
    for index, (pictures, labels) in enumerate(loader):
        if index < done or index >= steps:
            continue
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(pictures.to(dtype)), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if saved is not None:
        accelerator.save_state(str(saved), safe_serialization=True)
    return losses


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = train(rewired(), 4)
    first = train(rewired(), 2, saved=tmp_path)
    rest = train(rewired(seed=1), 4, resumed=tmp_path)
    assert first + rest == whole
    assert_close(train(kept(rewired()), 4), whole)


def test_bf16_mixed_precision_and_the_way_back():
    """Accelerate wraps `model.forward` in autocast; what it wrapped goes on to work after `unwire`."""
    found = train(model := rewired().float(), 4, mixed_precision="bf16")
    assert_close(train(kept(rewired().float()), 4, mixed_precision="bf16"), found, 2e-2)
    assert "forward" in vars(model)
    twin = vit().float()
    twin.load_state_dict(model.state_dict())
    x = Pictures(2).pictures.float()
    revwire.unwire(model).eval()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = twin.eval()(x)
    assert torch.equal(model(x), wanted.float())


def tower():
    """The model's own forward holds the chain."""
    return Net(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))


def test_a_model_that_holds_the_chain_itself_is_unwired_under_the_wrapper():
    torch.manual_seed(0)
    model, x = tower(), torch.randn(2, 6)
    wanted = model(x)
    revwire.rewire(model, x)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert not torch.allclose(prepared(x), wanted, atol=0.05)
    with revwire.unwired(model):
        torch.testing.assert_close(prepared(x), wanted, rtol=0, atol=0.05)
    assert not torch.allclose(prepared(x), wanted, atol=0.05)
    revwire.unwire(model)
    torch.testing.assert_close(prepared(x), wanted, rtol=0, atol=0.05)


def test_rewiring_what_was_prepared_for_mixed_precision():
    """Blocks are found under the wrapper; a chain in the wrapped forward itself is not, and the reason is told."""
    model, x = Accelerator(cpu=True, mixed_precision="bf16").prepare(vit().float()), Pictures(2).pictures
    assert len(list(revwire.plan_of(revwire.rewire(model, x.float())).steps)) == 6
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(tower())
    with pytest.raises(revwire.RewireError, match="under a context of its own"):
        revwire.rewire(prepared, torch.randn(2, 6))
