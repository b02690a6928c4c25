"""DDP and FSDP2 as torchrun starts them: two processes, gloo, no option that asks anything of the model.

That gradients are a single process's on the joined batch is the least. A memory-free backward could still wait with all
communication for its end, or hold on to what FSDP frees: so when gradients are sent and parameters are gathered is
compared, event by event, with plain autograd's backward through the same recurrence.
"""

import json
import sys

import pytest

from tests.helpers.programs import python
from tests.helpers.torchrun_worker import DEPTH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the first of both processes found."""
    folder = tmp_path_factory.mktemp("torchrun")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.helpers.torchrun_worker"]
    done = python(*launch, *worker, folder, env={"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["ddp"]["events"] == second["ddp"]["events"]
    return first


def test_gradients_are_a_single_process_s_on_the_joined_batch(results):
    assert results["ddp"]["error"] < 1e-12
    assert results["ddp"]["accumulated"] < 1e-12
    assert results["fsdp2"]["error"] < 1e-12
    assert results["fsdp2 accumulates"]["error"] < 1e-12


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_ddp_s_options_are_not_needed_and_work(results, option):
    assert results["options"][option] < 1e-12


def test_batchnorm_under_ddp(results):
    """Two steps: gradients, weights and running statistics are those of plain autograd through the recurrence."""
    assert results["batchnorm"] < 1e-10


def test_ddp_sends_while_backward_goes_on(results):
    """Bucket by bucket, in between the gradients of the blocks, just where plain autograd's backward sends them."""
    found, plain = results["ddp"]["events"]
    assert found == plain
    of_blocks = [event for event in found if event.startswith("gradient")]
    assert of_blocks == [f"gradient {i}" for i in reversed(range(DEPTH))]
    for i in range(1, DEPTH):
        between = found[found.index(f"gradient {i}") : found.index(f"gradient {i - 1}")]
        assert "bucket" in between


def test_fsdp2_gathers_a_block_once_more_in_backward(results):
    """And frees it before the backward of the block two below: what a second run reads is gathered for it alone."""
    found, plain = results["fsdp2"]["events"]
    assert found == plain
    turn = found.index("backward")
    for i in range(DEPTH):
        for part in (found[:turn], found[turn:]):
            assert part.count(f"gather blocks.{i}") == 1
            assert part.count(f"free blocks.{i}") == 1
    assert results["fsdp2"]["between"] == [False] * DEPTH


def test_at_a_second_run_no_more_than_its_block_and_the_next_one_are_gathered(results):
    runs = results["fsdp2"]["open"]
    assert [index for index, _ in runs] == list(reversed(range(DEPTH)))
    for index, unsharded in runs:
        assert index in unsharded
        assert set(unsharded) <= {index, index - 1}


def test_unwire_does_not_take_fsdp2_s_class_away(results):
    assert "its class was replaced by FSDP" in results["fsdp2 accumulates"]["unwire"]


def test_fsdp2_with_bfloat16_parameters(results):
    """Right with `cast_forward_inputs=False`, as near as plain autograd is; without it, said so."""
    mixed = results["mixed"]
    assert 0 < mixed["replayed"] <= 1.5 * mixed["kept"] < 0.5
    assert "cast_forward_inputs=False" in mixed["refused"]
