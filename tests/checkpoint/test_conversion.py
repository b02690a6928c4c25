"""Converting: every byte is kept, the plan is added, and nothing is written that was not verified."""

import io
import json
import stat

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import revwire
from revwire import checkpoint
from revwire.checkpoint import conversion
from revwire.errors import RewireError
from tests.helpers.checkpoints import ARGS, convert, metadata_of, same_bits, vit
from tests.helpers.vits import NAME


def test_convert_keeps_every_byte_and_adds_the_plan(weights):
    done = convert(weights)
    assert done.ok
    assert done.out == weights.with_name("model.revwire.safetensors")
    assert same_bits(load_file(weights), load_file(done.out))
    metadata = metadata_of(done.out)
    assert metadata["architecture"] == NAME
    assert json.loads(metadata["model_args"]) == ARGS
    assert metadata["format"] == "pt"
    assert metadata["dataset"] == "digits"  # what the source said is kept
    assert metadata["revwire.coupling"] == "re2tal"
    assert metadata["revwire.version"] == revwire.__version__
    assert revwire.Plan.from_json(metadata["revwire.plan"]) == done.plan
    assert len(list(done.plan.steps)) == 2 * ARGS["depth"]


def test_convert_verifies_and_measures_what_training_saves(weights):
    done = checkpoint.convert(weights)
    assert done.report.ok
    assert 0 < done.savings.rewired.held < done.savings.plain.held
    assert done.savings.saved == done.savings.plain.held - done.savings.rewired.held
    assert (done.source_bytes, done.out_bytes) == (weights.stat().st_size, done.out.stat().st_size)
    data = json.loads(json.dumps(done.to_dict()))
    assert data["architecture"] == NAME
    assert data["savings"]["saved"] == done.savings.saved
    Console(width=200, file=(text := io.StringIO())).print(done)
    assert "held for backward" in text.getvalue()
    assert "model.revwire.safetensors" in text.getvalue()


def test_convert_leaves_the_global_generator_alone(weights):
    before = torch.get_rng_state()
    checkpoint.convert(weights, verify=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_converted_file_is_like_any_other(weights):
    usual = weights.with_name("usual")
    usual.touch()
    out = convert(weights).out
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_a_converted_file_can_be_converted_again(weights):
    first = convert(weights).out
    again = convert(first, weights.with_name("again.safetensors")).out
    assert metadata_of(again) == metadata_of(first)
    assert same_bits(load_file(first), load_file(again))


def test_special_values_and_half_precision_survive_bit_by_bit(tmp_path):
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in vit().state_dict().items()}
    state["head.bias"][:3] = torch.tensor([float("nan"), -0.0, 1e-40])
    path = tmp_path / "half.safetensors"
    save_file(state, path, {"architecture": NAME, "model_args": json.dumps(ARGS)})
    out = convert(path).out
    assert same_bits(state, load_file(out))
    model = checkpoint.load(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_bits(state, model.state_dict())


def test_the_verification_decides_whether_a_file_is_written(weights, monkeypatch):
    class Failed:
        ok = False

        def to_dict(self):
            return {"ok": False}

    monkeypatch.setattr(conversion, "run_checks", lambda *_, **__: Failed())
    done = checkpoint.convert(weights)
    assert not done.ok
    assert done.out is None
    assert done.to_dict()["report"] == {"ok": False}
    assert list(weights.parent.iterdir()) == [weights]


def test_convert_tells_what_it_does(weights):
    said = []
    convert(weights, progress=said.append)
    assert said[0] == "reading model.safetensors"
    assert said[-1] == "writing model.revwire.safetensors"


def test_a_model_without_chains_is_refused(tmp_path):
    path = tmp_path / "vgg.safetensors"
    state = timm.create_model("mobilenetv1_100", num_classes=2).state_dict()
    save_file(state, path, {"architecture": "mobilenetv1_100", "model_args": '{"num_classes": 2}'})
    with pytest.raises(RewireError, match="nothing in mobilenetv1_100"):
        convert(path)
    assert list(tmp_path.iterdir()) == [path]
