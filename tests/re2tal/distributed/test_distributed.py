"""Two processes, started by torchrun, over gloo: of one machine, and of two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from examples.re2tal.distributed.world import World
from examples.re2tal.evaluation.inference import detect
from examples.re2tal.training.logs import history
from examples.re2tal.training.setup import annotations_of, clips_of, trained
from tests.re2tal import tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data(tmp_path_factory.mktemp("tal"), 8, 3)  # shares of two videos and of one


def start(path, *options):
    options = options or ("--standalone", "--nproc-per-node", "2")
    run = ["torch.distributed.run", *options, "-m", "examples.re2tal.train"]
    with path.with_suffix(".err").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", *run, path, "--device", "cpu"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=errors,
            start_new_session=True,
        )


def losses(output):
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in history(output / "log.jsonl")}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_killed_run_goes_on_and_one_process_finds_the_same(data, tmp_path, parallel):
    paths = {}
    for name in ("whole", "killed"):
        own = tiny.settings(data, tmp_path / name, parallel=parallel, optim={"epochs": 3}, checkpoint_every=1)
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(own))
    assert start(paths["whole"]).wait(timeout=500) == 0, (
        paths["whole"].with_suffix(".err").read_text()[-3000:]
    )
    process, log = start(paths["killed"]), tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and len(history(log)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start(paths["killed"]).wait(timeout=500) == 0, (
        paths["killed"].with_suffix(".err").read_text()[-3000:]
    )
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert sorted(whole) == sorted(killed) == list(range(1, 7))
    assert np.allclose([whole[i] for i in whole], [killed[i] for i in whole], rtol=1e-5)
    told = [json.loads((tmp_path / name / "results.json").read_text()) for name in paths]
    assert np.allclose(told[0]["mAP"], told[1]["mAP"], atol=1e-6)

    config, classes, detector = trained(tmp_path / "whole")
    clips = clips_of(config, annotations_of(config), training=False)
    found, _ = detect(detector, clips, config, classes, World(0, 1, torch.device("cpu")))
    written = json.loads((tmp_path / "whole" / "predictions.json").read_text())["results"]
    assert list(written) == list(found) == [video.id for video in clips.videos]
    for key, rows in written.items():
        assert np.allclose([row["score"] for row in rows], found[key].scores, atol=1e-5)
        assert np.allclose([row["segment"] for row in rows], found[key].segments, atol=1e-3)


def test_two_machines_shard_one_model(data, tmp_path):
    """The launch of docs/distributed.md, both machines on loopback; the losses are those of one machine."""
    paths = {}
    for name in ("one", "two"):
        own = tiny.settings(data, tmp_path / name, parallel="fsdp2", optim={"epochs": 2})
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(own))
    assert start(paths["one"]).wait(timeout=500) == 0
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        endpoint = f"localhost:{listening.getsockname()[1]}"
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "tal")
    machines = [
        start(paths["two"], *where, "--rdzv-endpoint", endpoint, "--node-rank", rank) for rank in "01"
    ]
    assert [machine.wait(timeout=500) for machine in machines] == [0, 0], (
        paths["two"].with_suffix(".err").read_text()[-3000:]
    )
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
