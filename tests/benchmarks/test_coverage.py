"""The coverage sweep: what it counts, remembers, compares and tells."""

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import coverage
from benchmarks.coverage import Planned, Verified, done, plan_one, representatives, verify_one
from benchmarks.shared import coverage_models, coverage_report, result_files
from benchmarks.shared.diary import Diary
from benchmarks.shared.residual_counter import ResidualCounter
from tests.helpers.programs import python

ROW = Planned(
    "timm", "resnet", "resnet50", "rewired", (2, 3), seconds=1.0, parameters=9, held=100, held_rewired=40
)
REPORT = Verified("timm", "resnet", "resnet50", ok=True, input=(2, 3, 64, 64), float64=1e-15, float32=1e-7)


def longest(model, x):
    with torch.no_grad(), ResidualCounter() as counter:
        model.eval()(x)
    return counter.longest


def test_residuals_counted_from_the_operators():
    image = torch.randn(1, 3, 64, 64)
    assert longest(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3), image) == 6
    assert longest(timm.create_model("resnet50"), image) == 5
    assert longest(timm.create_model("vgg11"), image) == 0
    assert longest(timm.create_model("densenet121"), image) == 0

    class Sums(nn.Module):
        def forward(self, x):
            return (
                (x + 1).relu() + (x - 1) + x
            )  # (x + 1) + (x - 1) is no residual, and x is added to what came of it

    assert longest(Sums(), torch.randn(2, 3)) == 1


@pytest.mark.slow
def test_planning_and_verifying_an_architecture():
    row = plan_one("timm/convnext_atto")
    assert (row.verdict, row.chains) == ("rewired", (2, 2, 6, 2))
    assert 0 < row.held_rewired < 0.3 * row.held
    assert plan_one("timm/convnext_atto", bytes_up_to=1000).held is None
    cannot = plan_one("timm/vgg11")
    assert cannot.verdict == "cannot"
    assert not cannot.missed
    report = verify_one(row.key, row.chains)
    assert report.ok
    assert report.float64 < 1e-10
    other = verify_one(row.key, (99,))
    assert not other.ok


def test_every_listed_architecture_has_an_entry():
    keys = {entry.key for entry in coverage_models.entries(tuple(coverage_models.SOURCES))}
    assert {f"timm/{name}" for name in timm.list_models()} <= keys
    assert {"torchvision/swin3d_t", "torchvision/maskrcnn_resnet50_fpn", "transformers/bert"} <= keys


def test_the_smallest_rewired_model_stands_for_its_family():
    small, none = (
        replace(ROW, name="small", parameters=2),
        replace(ROW, name="none", verdict="cannot", parameters=1),
    )
    assert representatives([ROW, small, none]) == [small]


def test_a_stopped_sweep_goes_on(tmp_path):
    diary = Diary(tmp_path / "partial.jsonl", fresh=False)
    diary.write(ROW)
    diary.write(REPORT)
    with diary.path.open("a") as file:
        file.write('{"source": "timm", "fam')  # killed while it wrote
    planned, verified = done(Diary(diary.path, fresh=False))
    assert planned == {ROW.key: ROW}
    assert verified == {REPORT.key: REPORT}
    # run as a script, the module's classes are others than those that it imports
    script = runpy.run_path(str(Path(coverage.__file__)), run_name="script")
    assert [set(rows) for rows in script["done"](diary)] == [
        set(planned),
        set(verified),
    ]
    assert done(Diary(diary.path, fresh=True)) == ({}, {})


def test_what_got_worse_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage_report.result_files, "RESULTS", tmp_path)
    monkeypatch.setattr(coverage_report, "PAGE", tmp_path / "coverage.md")
    cannot = Planned("timm", "vgg", "vgg11", "cannot", reason="no residual additions")
    coverage_report.save([ROW, cannot], [REPORT], 1.0)
    path = tmp_path / "coverage.json"
    assert len(json.loads(path.read_text())["architectures"]) == 2
    page = (tmp_path / "coverage.md").read_text()
    assert "| resnet | 1 of 1 | resnet50 | 5 in 2 |" in page
    assert "**vgg** (vgg11): no residual additions" in page
    assert coverage_report.worse(path, [ROW, cannot], [REPORT]) == []
    lost = coverage_report.worse(path, [replace(ROW, verdict="cannot", chains=(), reason="why")], [])
    assert lost == ["timm/resnet50 was rewired, now: why"]
    assert "5 steps, now 2" in coverage_report.worse(path, [replace(ROW, chains=(2,))], [])[0]
    assert "was verified" in coverage_report.worse(path, [], [replace(REPORT, ok=False, failed="x")])[0]


@pytest.mark.slow
def test_nothing_of_transformers_is_imported_for_other_models():
    code = "import sys, timm, revwire; revwire.plan(timm.create_model('convnext_atto'))"
    code += "; print('transformers' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_page_tells_of_a_model_that_was_verified_with_fewer_blocks():
    document = {
        "architectures": [asdict(ROW)],
        "verified": [asdict(replace(REPORT, name="resnet50, 4 blocks"))],
        "batch": 8,
        "median_seconds_to_plan": 1.0,
        **result_files.origin("benchmarks.coverage"),
    }
    assert "| resnet | 1 of 1 | resnet50, 4 blocks | 5 in 2 |" in coverage_report.page(document)
