"""timm's own parts of a training run, put together as its `train.py` does: scaler, EMA, mixup, schedule, files."""

import pytest
import timm.optim
import timm.scheduler
import timm.utils
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from torch.utils.data import DataLoader

import revwire
from tests.helpers.pictures import CLASSES, Pictures, assert_close, rewired, vit
from tests.helpers.steps import kept

EPOCHS = 2


def train(model, folder, epochs=EPOCHS, resume=None):
    """The losses, and the averaged model; a checkpoint of the last epoch stays in the folder."""
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.9)
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=EPOCHS)
    scaler = timm.utils.NativeScaler("cpu")
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=CLASSES)
    start = 0
    if resume is not None:
        start = resume_checkpoint(model, str(resume), optimizer, scaler, log_info=False)
        state = torch.load(resume, weights_only=False)["state_dict_ema"]
        average.module.load_state_dict(state)
        schedule.step(start)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=average, amp_scaler=scaler, checkpoint_dir=str(folder), recovery_dir=""
    )
    losses = []
    for epoch in range(start, epochs):
        torch.manual_seed(epoch)
        timm.utils.random_seed(epoch)
        updates = epoch * 4
        for pictures, labels in DataLoader(Pictures(), 4):
            pictures, targets = mixup(pictures.clone(), labels)
            with torch.autocast("cpu", enabled=False):
                loss = SoftTargetCrossEntropy()(model(pictures), targets)
            scaler(
                loss,
                optimizer,
                clip_grad=1.0,
                clip_mode="agc",
                parameters=model.parameters(),
                need_update=True,
            )
            optimizer.zero_grad()
            updates += 1
            average.update(model, step=updates)
            losses.append(float(loss.detach()))
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=0.0)
    return losses, average.module


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    for name in ("whole", "stopped", "kept"):
        (tmp_path / name).mkdir()
    whole, average = train(rewired(), tmp_path / "whole")
    first, _ = train(rewired(), tmp_path / "stopped", 1)
    last = tmp_path / "stopped" / "last.pth.tar"
    rest, resumed = train(rewired(seed=1), tmp_path / "stopped", resume=last)
    assert first + rest == whole
    assert all(map(torch.equal, average.state_dict().values(), resumed.state_dict().values()))
    assert_close(train(kept(rewired()), tmp_path / "kept")[0], whole)


def test_the_averaged_model_is_rewired_and_of_the_averaged_weights(tmp_path):
    model = rewired()
    _, average = train(model, tmp_path, 1)
    assert revwire.plan_of(average) == revwire.plan_of(model)
    twin = vit(seed=1)
    twin.load_state_dict(average.state_dict())
    x = Pictures(2).pictures
    wanted = revwire.rewire(twin, x).eval()(x)
    assert torch.equal(average.eval()(x), wanted)
    assert not torch.allclose(model.eval()(x), wanted)


def test_a_checkpoint_tells_a_model_that_is_rewired_another_way(tmp_path):
    train(rewired(coupling="bdia"), tmp_path, 1)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    for entry in ("state_dict", "state_dict_ema"):
        with pytest.warns(UserWarning, match=r"rewired by coupling='bdia.*another function"):
            rewired(seed=1).load_state_dict(saved[entry])
