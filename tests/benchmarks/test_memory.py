"""The memory benchmark at a tiny size: rows, ratios, table, files, and what it says when it cannot run."""

import json

import pytest
import timm
import torch
from torch import nn

from benchmarks.memory import Case, Row, main, run, table, timm_case
from benchmarks.shared import step_report
from benchmarks.shared.step_measurement import steps_to_come
from benchmarks.shared.strategies import worth_measuring
from revwire.errors import RevwireError
from revwire.measure.step import StepMemory
from revwire.measure.timing import Timing
from tests.helpers.commands import command_of, in_one_line, printed
from tests.helpers.nets import Residual

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 6, "num_heads": 2, "num_classes": 3}


def block(dim):
    return Residual(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def tiny_vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY)


def own_model():
    torch.manual_seed(0)
    return nn.Sequential(*(block(16) for _ in range(6)))


@pytest.fixture(scope="module")
def rows():
    cases = [
        Case("vit", tiny_vit, torch.randn(8, 3, 16, 16)),
        Case("own", own_model, (torch.randn(128, 16),), loss_fn=torch.sum),
        Case("no blocks", lambda: nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)),
    ]
    return run(cases, worth_measuring("cpu"), rounds=2)


def by_name(rows, case):
    return {row.strategy: row for row in rows if row.case == case}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vit", "own"])
def test_every_strategy_is_measured(rows, case):
    found = by_name(rows, case)
    assert list(found) == worth_measuring("cpu")
    assert all(len(row.timing.seconds) == 2 for row in found.values())
    held = {name: row.memory.held for name, row in found.items()}
    assert held["rewired"] < held["checkpoint"] < held["plain"]
    peak = {name: row.memory.peak for name, row in found.items()}
    for like in ("checkpoint", "plain"):
        # the budget is that of a step with another loss
        assert peak[f"budget={like}"] <= 1.05 * peak[like]


@pytest.mark.slow
def test_a_model_that_cannot_be_treated_has_a_row_that_says_so(rows):
    found = by_name(rows, "no blocks")
    assert found["plain"].memory
    assert "no residual blocks to checkpoint" in found["checkpoint"].failure
    assert found["rewired"].failure


@pytest.mark.slow
def test_strategies_get_copies_of_one_model():
    made = []

    def factory():
        made.append(tiny_vit())
        return made[-1]

    before = {name: value.clone() for name, value in tiny_vit().state_dict().items()}
    run([Case("vit", factory, torch.randn(2, 3, 16, 16))], worth_measuring("cpu"), rounds=0)
    assert len(made) == 1
    assert type(made[0]).__name__ == "VisionTransformer"
    assert not made[0].grad_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in made[0].state_dict().items())


@pytest.mark.slow
def test_progress_is_told_of_every_step():
    told = []
    run(
        [Case("vit", tiny_vit, torch.randn(2, 3, 16, 16))],
        ["plain", "checkpoint"],
        rounds=2,
        progress=told.append,
    )
    assert len(told) == steps_to_come(cases=1, strategies=2, rounds=2)
    assert told[0] == "vit plain: bytes"
    assert told[-1].endswith(": seconds")


MADE = [
    Row("vit [x]", "plain", StepMemory(100 * 2**20, 120 * 2**20, "live tensors"), Timing((1.0, 2.0, 3.0))),
    Row("vit [x]", "checkpoint", StepMemory(20 * 2**20, 40 * 2**20, "live tensors"), Timing((1.5, 3.0, 4.5))),
    Row("vit [x]", "rewired", StepMemory(2 * 2**20, 10 * 2**20, "live tensors"), Timing((1.5, 2.7, 5.4))),
    Row("odd", "plain", failure="out of GPU memory"),
]


def test_the_table_to_the_character():
    assert printed(table(MADE), 80) == [
        "vit [x]",
        " strategy   held MiB /plain /ckpt peak MiB /plain /ckpt seconds /plain /ckpt",
        " ───────────────────────────────────────────────────────────────────────────",
        " plain         100.0                 120.0                2.000",
        " checkpoint     20.0  0.200           40.0  0.333         3.000  1.500",
        " rewired         2.0  0.020 0.100     10.0  0.083 0.250   2.700  1.500 1.000",
        "odd",
        " strategy held MiB peak MiB seconds",
        " ──────────────────────────────────",
        " plain",
        "plain: out of GPU memory",
    ]


def test_files_hold_figures_and_origin(tmp_path):
    cases = [Case("vit [x]", tiny_vit, None, about={"input": [2, 3, 16, 16]}), Case("odd", tiny_vit, None)]
    document = step_report.document(cases, MADE, "benchmarks.memory", {"amp": "none"})
    text, picture = step_report.save(document, MADE, tmp_path / "results" / "memory-cpu-none")
    read = json.loads(text.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert read["command"].startswith("python -m benchmarks.memory")
    assert set(read["versions"]) == {"python", "torch", "timm", "revwire"}
    assert {"cpu", "cores", "threads", "gpu", "load"} <= set(read["machine"])
    assert read["method"] == step_report.METHOD
    assert read["cases"][0] == {"case": "vit [x]", "input": [2, 3, 16, 16]}
    assert read["rows"][2]["ratio_to_checkpoint"] == {"held": 0.1, "peak": 0.25, "seconds": 1.0}
    assert "ratio_to_plain" not in read["rows"][0]
    assert read["rows"][3] == {"case": "odd", "strategy": "plain", "failure": "out of GPU memory"}


def test_timm_case_by_name_batch_and_size():
    case = timm_case("vit_tiny_patch16_224@3", size=32)
    assert case.name == "vit_tiny_patch16_224, batch 3"
    assert case.inputs.shape == (3, 3, 32, 32)
    assert case.loss_fn(case.factory()(case.inputs)).dim() == 0
    assert timm_case("resnet18", batch=2, size=32).inputs.shape == (2, 3, 32, 32)


def test_drop_path_is_off_in_timm_cases():
    model = timm_case("swin_tiny_patch4_window7_224", batch=1).factory()
    assert model.training
    assert not any(getattr(module, "drop_prob", 0) for module in model.modules())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_tiny_patch16_224@x", "whole number"),
        ("resnet18@0", "whole number"),
        ("vit_tny_patch16_224", "no model"),
    ],
)
def test_a_wrong_model_is_told(spec, message):
    with pytest.raises(RevwireError, match=message):
        timm_case(spec)


@pytest.fixture
def command():
    return command_of(main)


@pytest.mark.slow
def test_the_program_prints_and_writes(command, tmp_path):
    args = ["-m", "vit_tiny_patch16_224", "-b", "1", "--size", "32", "--rounds", "1", "--out", str(tmp_path)]
    result = command(*args)
    assert result.exit_code == 0, result.output
    assert "rewired" in result.output
    assert "held MiB /plain  /ckpt peak MiB /plain /ckpt seconds /plain /ckpt" in result.output
    assert "Neither counts" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory-cpu-none.json", "memory-cpu-none.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [(("-s", "magic"), "'magic' is not one of"), (("-m", "vit_tny"), "timm has no model")],
)
def test_the_program_tells_what_is_wrong_and_exits_2(command, args, message):
    result = command(*args)
    assert result.exit_code == 2
    assert message in in_one_line(result.output)
