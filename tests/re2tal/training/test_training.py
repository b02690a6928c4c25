import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from examples.re2tal import predict, synth, train
from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.config import Config, read_config
from examples.re2tal.distributed.world import World
from examples.re2tal.errors import Re2TALError
from examples.re2tal.training import checkpoints
from examples.re2tal.training.logs import history
from examples.re2tal.training.optim import Average, optimizer_of, schedule
from examples.re2tal.training.pretraining import pretrain
from examples.re2tal.training.trainer import Trainer
from tests.re2tal import tiny

ROOT = Path(__file__).parents[3]
ALONE = World(0, 1, torch.device("cpu"))
COMPARED = ("loss", "classification", "regression", "gradient_norm", "lr")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data(tmp_path_factory.mktemp("tal"))


def losses(output):
    return {
        line["step"]: [line.get(name) for name in COMPARED]
        for line in history(output / "log.jsonl")
        if "loss" in line
    }


def command(*arguments):
    module = arguments[0]
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, list(map(str, arguments[1:])))


@pytest.mark.parametrize("strategy", ["plain", "checkpoint", "rewired", "frozen"])
def test_a_run_writes_its_log_predictions_and_figures(data, tmp_path, strategy):
    config = tiny.config(data, tmp_path / "run", memory={"strategy": strategy})
    outcome = train.run(config, "cpu")
    assert sorted(losses(config.output)) == list(range(1, 13))
    figures = json.loads((config.output / "results.json").read_text())
    assert figures["average_mAP"] == outcome.evaluation.average_mAP
    assert set(json.loads((config.output / "predictions.json").read_text())["results"]) == set(
        outcome.results
    )
    assert any((config.output / "tensorboard").iterdir())
    assert len(list((config.output / "checkpoints").iterdir())) == 2


def test_checkpointing_trains_as_plain_training_does(data, tmp_path):
    for strategy in ("plain", "checkpoint"):
        train.run(tiny.config(data, tmp_path / strategy, memory={"strategy": strategy}), "cpu")
    one, two = (losses(tmp_path / strategy) for strategy in ("plain", "checkpoint"))
    assert np.allclose([one[i] for i in one], [two[i] for i in one], rtol=1e-4)


def test_a_run_that_is_killed_goes_on_as_if_it_was_not(data, tmp_path):
    """Killed twice at moments that chance picks; the log, and what is found in the end, are those of a whole run."""
    shared = {
        "optim": {"epochs": 6, "accumulate": 2},
        "loader": {"workers": 1},
        "checkpoint_every": 1,
        "memory": {"strategy": "rewired"},
    }
    paths = {}
    for name in ("whole", "killed"):
        own = tiny.settings(data, tmp_path / name, **shared)
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(own))
    run = [sys.executable, "-m", "examples.re2tal.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name):
        with (tmp_path / f"{name}.err").open("ab") as errors:
            return subprocess.Popen(
                [*run, paths[name], "--device", "cpu"], cwd=ROOT, env=environment, stderr=errors
            )

    assert start("whole").wait(timeout=300) == 0
    total = len(losses(tmp_path / "whole"))
    assert total == 12
    dice = random.Random()
    for least in (2, 6):
        process = start("killed")
        until = dice.randint(least, least + 3)
        log = tmp_path / "killed" / "log.jsonl"
        deadline = time.monotonic() + 200
        while process.poll() is None and len(history(log)) < until and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait(timeout=300) == 0
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert whole == killed
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert one == two


def test_another_experiment_is_not_taken_for_the_same(data, tmp_path):
    train.run(tiny.config(data, tmp_path, optim={"epochs": 2}), "cpu")
    with pytest.raises(Re2TALError, match=r"a run of other settings \(optim\)"):
        Trainer(tiny.config(data, tmp_path, optim={"epochs": 3}), ALONE)
    Trainer(tiny.config(data, tmp_path, optim={"epochs": 2}, loader={"workers": 1}), ALONE)


def test_a_run_that_never_began_does_not_stand_in_the_way(data, tmp_path):
    wrong = tiny.settings(data, tmp_path / "run")
    wrong["data"]["annotations"] = str(tmp_path / "none.json")
    with pytest.raises(Re2TALError, match=r"there is no file .*none\.json; give data\.annotations=FILE"):
        Trainer(Config.model_validate(wrong), ALONE)
    wrong["data"] = {**wrong["data"], "annotations": str(data / "annotations.json"), "evaluate": "test"}
    with pytest.raises(
        Re2TALError, match="no video of the subset 'test'"
    ):  # told before training, not after it
        Trainer(Config.model_validate(wrong), ALONE)
    Trainer(tiny.config(data, tmp_path / "run"), ALONE)


def test_a_step_without_pictures_or_with_a_loss_that_is_no_number_says_so(data, tmp_path):
    trainer = Trainer(tiny.config(data, tmp_path / "one"), ALONE)
    with torch.no_grad():
        trainer.detector.head.classify.last.conv.bias.fill_(float("nan"))
    with pytest.raises(Re2TALError, match="the loss of step 1 is nan; lower"):
        trainer._step(iter(trainer._loader()))
    folder = tiny.data(tmp_path / "torn", 2, 1)
    for path in (folder / "videos").glob("training*"):
        path.write_bytes(path.read_bytes()[:3000])
    trainer = Trainer(tiny.config(folder, tmp_path / "two"), ALONE)
    with pytest.raises(Re2TALError, match=r"no training video can be read: .*training_0_000\d\.mp4"):
        trainer._step(iter(trainer._loader()))


def test_half_precision_trains_and_its_log_is_json(data, tmp_path):
    """The scaler begins at 65536, which overflows: those steps are skipped, and logged without a norm."""
    config = tiny.config(
        data, tmp_path, optim={"amp": "fp16", "epochs": 2}, backbone={"options": {"width": 4}}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        train.run(config, "cpu")

    def strict(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [
        json.loads(line, parse_constant=strict) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_unreadable_videos_are_counted_and_never_stop_a_run(data, tmp_path):
    folder = tiny.data(tmp_path / "own", 5, 2)
    for name in ("training_0_0001", "validation_0_0001"):
        path = folder / "videos" / f"{name}.mp4"
        path.write_bytes(path.read_bytes()[:3000])
    config = tiny.config(folder, tmp_path / "run", loader={"workers": 1})
    outcome = train.run(config, "cpu")
    assert set(outcome.results) == {"validation_0_0000"}
    told = json.loads((config.output / "results.json").read_text())["skipped"]
    assert {Path(path).stem for path in told} == {"training_0_0001", "validation_0_0001"}


def test_gradients_add_up_over_batches(data, tmp_path):
    """Two batches of one clip make the step of one batch of two, where nothing looks across a batch."""
    firsts = []
    for name, batch, accumulate in (("together", 2, 1), ("one by one", 1, 2)):
        optim = {"batch": batch, "accumulate": accumulate, "ema": None, "clip": 1e9}
        trainer = Trainer(
            tiny.config(data, tmp_path / name, optim=optim, memory={"strategy": "frozen"}), ALONE
        )
        trainer.detector.head.momentum = 1.0
        trainer.detector.head.normalizer.fill_(50.0 * batch)  # held: it follows the actions of one batch
        firsts.append(trainer._step(iter(trainer._loader())))
    for name in ("loss", "gradient_norm"):
        assert np.isclose(firsts[0][name], firsts[1][name], rtol=1e-4)


def test_autocast_trains(data, tmp_path):
    config = tiny.config(data, tmp_path, optim={"amp": "bf16", "epochs": 2})
    train.run(config, "cpu")
    assert np.isfinite([values[0] for values in losses(tmp_path).values()]).all()


def test_rates_rise_and_fall():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = schedule(optimizer, 4, 20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert np.allclose(rates[:4], [0.4, 0.8, 1.2, 1.6])
    assert np.allclose(rates[4:], [1 + np.cos(np.pi * i / 16) for i in range(16)])


def test_backbone_and_head_have_their_rates_and_norms_do_not_decay(data, tmp_path):
    optim = {"lr": 1e-2, "backbone_lr": 1e-4, "weight_decay": 0.1}
    trainer = Trainer(tiny.config(data, tmp_path, optim=optim), ALONE)
    names = {id(p): name for name, p in trainer.detector.named_parameters()}
    seen = set()
    for group in optimizer_of(trainer.detector, trainer.config.optim).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == (1e-4 if name.startswith("backbone.") else 1e-2)
            assert (group["weight_decay"] == 0) == (parameter.ndim < 2 or name.endswith("bias"))
    assert seen == set(names.values())


def test_averages_start_fast_and_are_taken_back():
    model = torch.nn.BatchNorm1d(2)
    average = Average(model, 0.9)
    values = torch.randn(50, 2)
    followed = model.weight.detach().clone()
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            model.weight.copy_(value)
        average.update(step)
        decay = min(0.9, step / (step + 10))
        followed = decay * followed + (1 - decay) * value
    assert torch.allclose(average.tensors["weight"], followed, atol=1e-6)
    own = model.weight.detach().clone()
    with average.applied():
        assert torch.allclose(model.weight, followed, atol=1e-6)
    assert torch.equal(model.weight, own)


def test_checkpoints_are_whole_and_few(tmp_path):
    for step in range(5):
        checkpoints.save(tmp_path, step, {"step": step}, 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003.pt", "step-00000004.pt"]
    (tmp_path / "step-00000009.part").write_bytes(b"torn")
    assert checkpoints.latest(tmp_path) == {"step": 4}
    (tmp_path / "step-00000010.pt").write_bytes(b"torn")
    with pytest.raises(Re2TALError, match="remove it to go on from the one before"):
        checkpoints.latest(tmp_path)
    assert checkpoints.latest(tmp_path / "none") is None


def test_pretraining_hands_its_backbone_to_training(data, tmp_path):
    config = tiny.config(data, tmp_path, pretrain_epochs=2)
    path, accuracy = pretrain(config, "cpu")
    assert 0 <= accuracy <= 1
    loaded = build_backbone("convnet", weights=path, width=4)
    fresh = build_backbone("convnet", width=4)
    assert any(not torch.equal(a, b) for a, b in zip(loaded.parameters(), fresh.parameters(), strict=True))
    backbone = {"name": "convnet", "options": {"width": 4}, "weights": str(path)}
    trainer = Trainer(tiny.config(data, tmp_path / "after", backbone=backbone), ALONE)
    assert torch.equal(trainer.detector.backbone.stem.weight, loaded.stem.weight)
    with pytest.raises(Re2TALError, match="leaves nothing to fine-tune"):
        pretrain(tiny.config(data, tmp_path / "frozen", memory={"strategy": "frozen"}), "cpu")


def test_a_run_starts_from_another(data, tmp_path):
    train.run(tiny.config(data, tmp_path / "first", optim={"epochs": 2}), "cpu")
    second = Trainer(tiny.config(data, tmp_path / "second", start_from=str(tmp_path / "first")), ALONE)
    weights = checkpoints.trained_weights(tmp_path / "first")
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.detector.state_dict().items())
    with pytest.raises(Re2TALError, match="holds no trained run"):
        Trainer(tiny.config(data, tmp_path / "third", start_from=str(tmp_path / "none")), ALONE)


def test_one_file_is_predicted_printed_and_drawn(data, tmp_path):
    config = tiny.config(data, tmp_path / "run")
    outcome = train.run(config, "cpu")
    video = data / "videos" / "validation_0_0000.mp4"
    result = command(predict, config.output, video, "--json", "--threshold", 0, "--device", "cpu")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)["actions"]
    wanted = outcome.results["validation_0_0000"]
    assert len(told) == len(wanted)
    assert np.allclose([row["score"] for row in told], wanted.scores, atol=1e-5)
    assert np.allclose([row["segment"] for row in told], wanted.segments, atol=1e-3)
    png = tmp_path / "actions.png"
    table = command(predict, config.output, video, "--png", png, "--threshold", 0.01, "--device", "cpu")
    assert table.exit_code == 0, table.output
    assert png.read_bytes().startswith(b"\x89PNG")
    failed = command(predict, tmp_path / "none", video)
    assert failed.exit_code == 1
    assert "holds no trained run" in failed.output


def test_the_command_says_what_is_wrong(tmp_path):
    result = command(train, "synthetic", "optim.epoch=3", f"output={tmp_path}")
    assert result.exit_code == 1
    assert "did you mean epochs?" in result.output


def test_the_small_configuration_learns(tmp_path):
    """The whole way, from videos to mAP, in about a minute; chance and a frozen backbone stay far below."""
    folder = tmp_path / "data"
    result = command(synth, folder, "--videos", 60, "--held-out", 16, "--processes", 2)
    assert result.exit_code == 0, result.output
    changes = [
        f"data.annotations={folder}/annotations.json",
        f"data.videos={folder}/videos",
        f"output={tmp_path / 'run'}",
        "optim.epochs=24",
        "memory.strategy=rewired",
    ]
    outcome = train.run(read_config("synthetic_ci", changes), "cpu")
    assert outcome.evaluation.average_mAP > 0.7
    assert isinstance(read_config("synthetic_ci", changes), Config)
