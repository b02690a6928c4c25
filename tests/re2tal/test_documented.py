"""The figures of docs/re2tal.md are those of the result files, and they show what the page says they show."""

import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import tal
from benchmarks.shared import result_files as record

PAGE = (Path(__file__).parents[2] / "docs" / "re2tal.md").read_text(encoding="utf-8")
MIB, GIB = 2**20, 2**30


def results(name):
    return json.loads((record.RESULTS / name).read_text(encoding="utf-8"))


def by_run(document):
    """Average mAP of each run, by its name, in the order of the seeds."""
    return {
        run.name: [row["average_mAP"] for row in document["rows"] if row["run"] == run.name]
        for run in tal.RUNS
    }


@pytest.mark.parametrize("run", tal.RUNS, ids=lambda run: run.name)
def test_average_map_of_every_run(run):
    document = results("tal.json")
    assert document["titles"][run.name] == run.title
    values = by_run(document)[run.name]
    assert len(values) == 3
    cells = " | ".join([*(f"{value:.3f}" for value in values), f"**{mean(values):.3f}**"])
    assert f"| {run.title} | {cells} |" in PAGE


def test_the_comparison_shows_what_the_paper_claims():
    """Of every seed: a rewired network needs tuning, a little is enough if it was trained, and features are not."""
    found = by_run(results("tal.json"))
    for plain, rewired, tuned, few, frozen in zip(
        *(found[name] for name in ("plain", "rewired", "tuned", "scratch-few", "frozen")), strict=True
    ):
        assert plain >= 0.9
        assert tuned >= plain - 0.02
        assert rewired < plain - 0.2
        assert few < tuned - 0.1
        assert frozen < plain - 0.2


def test_what_the_backbone_holds():
    memory = results("tal.json")["memory"]
    for row in memory["rows"]:
        held, peak = (f"{row[name] / MIB:.1f}" for name in ("held", "peak"))
        assert f"| {row['way']} | {held} | {peak} | {row['longest_clip']} |" in PAGE
    assert f"longest clip in {memory['limit'].replace('MiB', ' MiB')}" in PAGE


def test_peaks_of_training_steps():
    found = results("tal-memory.json")["estimates"]
    assert set(found) == {"swin_t_thumos14", "videomae_l_thumos14"}
    for name, estimates in found.items():
        for way in estimates["rows"]:
            assert f"| {name} | {way['strategy']} | {way['peak'] / GIB:.2f} |" in PAGE
    lean = found["videomae_l_thumos14"]["rows"][-1]
    assert lean["strategy"].startswith("rewired, chunks")
    assert lean["peak"] < 9.2e9
