"""The runner of what a GPU has to show, on programs that need none."""

import json

import pytest
import torch
import typer

from benchmarks import gpu


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.result_files, "origin", lambda module: {"command": module})
    monkeypatch.setattr(gpu, "PARTS", {"good": ["this"], "bad": ["json.tool", "--no-such-option"]})


def ends(path):
    return {name: part["exit"] for name, part in json.loads((path / "gpu.json").read_text())["parts"].items()}


def test_parts_that_are_done_are_not_run_again(parts, tmp_path, capsys):
    gpu.main(out=tmp_path)
    assert ends(tmp_path) == {"good": 0, "bad": 2}
    assert "exit 2" in capsys.readouterr().out
    gpu.main(out=tmp_path)
    again = capsys.readouterr().out
    assert "bad: python" in again  # what failed is tried again
    assert "good: python" not in again
    gpu.main(out=tmp_path, again=True)
    assert "good: python" in capsys.readouterr().out


def test_what_takes_too_long_is_stopped_and_stays_to_be_done(tmp_path):
    done = gpu.run(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], 1.0)
    assert done["exit"] is None
    assert done["seconds"] < 30


def test_an_unknown_part_is_told(parts):
    with pytest.raises(typer.BadParameter, match="'memry' is not one of good, bad"):
        gpu.main(part=["memry"])


def test_every_part_is_a_program(monkeypatch):
    for command in gpu.PARTS.values():
        assert command[0] in {"benchmarks.memory", "benchmarks.largest_batch", "benchmarks.depth", "pytest"}
