"""The depth benchmark: slopes against a hand computation, files, and what it says when it cannot run."""

import json

import pytest

from benchmarks import depth
from benchmarks.shared.step_measurement import Row
from revwire.errors import RevwireError
from revwire.measure.step import StepMemory
from revwire.measure.timing import Timing
from revwire.run.sample import SIZE
from tests.helpers.commands import command_of, in_one_line, printed

BLOCKS = {"two": 2, "four": 4, "nine": 9}


def made(strategy, held, peak):
    memories = (StepMemory(h, p, "live tensors") for h, p in zip(held, peak, strict=True))
    return [
        Row(case, strategy, memory, Timing((1.0, 2.0))) for case, memory in zip(BLOCKS, memories, strict=True)
    ]


def test_slopes_are_those_computed_by_hand():
    # depths 2, 4, 9 with mean 5: deviations -3, -1, 4, squares 26. held 10, 20, 60 with mean 30: -20, -10, 30;
    # 60 + 10 + 120 = 190. peak 100, 110, 135 is a line of slope 5.
    rows = [*made("plain", (10, 20, 60), (100, 110, 135)), *made("rewired", (7, 7, 7), (9, 9, 9))]
    assert depth.slopes(rows, BLOCKS) == {
        "plain": {"held": pytest.approx(190 / 26), "peak": pytest.approx(5)},
        "rewired": {"held": 0, "peak": 0},
    }


def test_a_strategy_measured_at_one_depth_has_no_slope():
    rows = [
        Row("two", "plain", StepMemory(1, 2, "live tensors")),
        Row("four", "plain", failure="out of GPU memory"),
    ]
    assert depth.slopes(rows, BLOCKS) == {}


def test_the_order_of_the_rows_does_not_matter():
    rows = made("plain", (10, 20, 60), (100, 110, 135))
    assert depth.slopes(rows[::-1], BLOCKS) == depth.slopes(rows, BLOCKS)


def test_the_table_of_slopes_to_the_character():
    slopes = {"plain": {"held": 9876543.4, "peak": 1e7}, "rewired": {"held": 0.0, "peak": 0.0}}
    assert printed(depth.slope_table(slopes)) == [
        "bytes per block",
        " strategy      held       peak",
        " ─────────────────────────────",
        " plain    9,876,543 10,000,000",
        " rewired          0          0",
    ]


def test_a_picture_of_rows_of_which_some_failed(tmp_path):
    rows = [
        *made("plain", (10, 20, 60), (100, 110, 135))[:2],
        Row("nine", "plain", failure="out of GPU memory"),
    ]
    rows += [Row(case, "rewired", failure="no blocks") for case in BLOCKS]
    depth.plot(rows, BLOCKS, "caption", tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_depth_case_has_so_many_blocks():
    case = depth.depth_case(3, "vit_tiny_patch16_224", batch=1, size=32)
    assert len(case.factory().blocks) == case.about["blocks"] == 3
    assert case.name == "vit_tiny_patch16_224, batch 1, 3 blocks"


def test_a_model_without_a_depth_is_told():
    with pytest.raises(RevwireError, match="depth"):
        depth.depth_case(3, "resnet18")


@pytest.fixture
def command(tmp_path):
    return command_of(depth.main, "--out", tmp_path)


@pytest.mark.slow
def test_the_program_prints_and_writes_that_a_rewired_block_costs_next_to_nothing(command, tmp_path):
    result = command("-d", "3", "-d", "2", "-b", "1", "--size", "32", "--rounds", "0")
    assert result.exit_code == 0, result.output
    assert "bytes per block" in result.output
    assert (tmp_path / "depth-cpu-none.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "depth-cpu-none.json").read_text()
    read = json.loads(text)
    assert json.dumps(read, indent=1) + "\n" == text
    assert [case["blocks"] for case in read["cases"]] == [2, 3]
    found = read["bytes_per_block"]
    held = [row["held_bytes"] for row in read["rows"] if row["strategy"] == "checkpoint"]
    assert found["checkpoint"]["held"] == held[1] - held[0]
    # a block's two branches leave nothing but the few numbers that their second runs are compared with
    assert found["rewired"] == {"held": 2 * SIZE * 4, "peak": 2 * SIZE * 4}
    assert found["plain"]["held"] > found["checkpoint"]["held"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-d", "4", "-d", "4"), "two different depths"),
        (("-m", "vit_tny"), "timm has no model"),
        (("-m", "resnet18"), "depth"),
    ],
)
def test_the_program_tells_what_is_wrong_and_exits_2(command, args, message):
    result = command(*args)
    assert result.exit_code == 2
    assert message in in_one_line(result.output)
