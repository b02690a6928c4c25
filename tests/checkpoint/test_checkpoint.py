"""Checkpoint files: read safely, fitted strictly, written whole or not at all."""

import argparse
import contextlib
import copy
import io
import json
import os
import stat
from unittest import mock

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import revwire
from revwire import checkpoint
from revwire.checkpoint import conversion, writer
from revwire.checkpoint.reader import read
from revwire.errors import CheckpointError, RewireError

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def small_vit(**args):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**ARGS, **args})


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_bits(left, right):
    """Equal names, dtypes, shapes and bytes; NaNs and negative zeros included."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and left[k]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(right[k].contiguous().view(-1).view(torch.uint8))
        for k in left
    )


def convert(path, out=None, **options):
    """Without verification and measurement, which have tests of their own and take most of the time."""
    with mock.patch.object(conversion, "_measure", return_value=None):
        return checkpoint.convert(path, out, verify=False, **options)


@pytest.fixture
def weights(tmp_path):
    """A checkpoint that says what it is, as examples/digits writes it."""
    path = tmp_path / "model.safetensors"
    metadata = {"format": "pt", "architecture": NAME, "model_args": json.dumps(ARGS), "dataset": "digits"}
    save_file(small_vit().state_dict(), path, metadata)
    return path


@pytest.fixture(scope="module")
def rewired(tmp_path_factory):
    """A rewired checkpoint; not to be changed."""
    path = tmp_path_factory.mktemp("rewired") / "model.safetensors"
    save_file(small_vit().state_dict(), path, {"architecture": NAME, "model_args": json.dumps(ARGS)})
    return convert(path).out


# --- converting ---


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
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in small_vit().state_dict().items()}
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


# --- the architecture ---


def bare(tmp_path, **args):
    path = tmp_path / "model.safetensors"
    save_file(small_vit(**args).state_dict(), path)
    return path


def test_the_architecture_passed_goes_before_the_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(small_vit().state_dict(), path, {"architecture": "resnet18"})
    assert convert(path, arch=NAME, model_args=ARGS).architecture.name == NAME


def test_arguments_alone_go_over_those_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    without = {k: v for k, v in ARGS.items() if k != "num_classes"}
    save_file(small_vit().state_dict(), path, {"architecture": NAME, "model_args": json.dumps(without)})
    assert convert(path, model_args={"num_classes": 10}).architecture.model_args == ARGS


def test_the_config_that_timm_writes_beside_the_file(tmp_path):
    timm.models.save_for_hf(small_vit(), tmp_path, safe_serialization=True)
    done = convert(tmp_path / "model.safetensors")
    assert done.architecture.name == NAME
    assert done.architecture.model_args["embed_dim"] == 48


def test_the_metadata_goes_before_the_config(weights):
    weights.with_name("config.json").write_text('{"architecture": "resnet18"}')
    assert convert(weights).architecture.name == NAME


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "neither its metadata nor a config.json"),
        ('{"architectures": ["ViTForImageClassification"]}', "neither its metadata nor a config.json"),
        ('{"architecture": "vit_tny_patch16_224"}', "did you mean vit_tiny_patch16_224"),
        ('{"architecture": "resnet18", "model_args": 3}', "must be JSON objects"),
        ("not json", "config.json is not JSON"),
        ("[1]", "config.json is a JSON list, not an object"),
        ('{"a":' * 100_000, "config.json is not JSON"),
    ],
)
def test_an_unknown_architecture(tmp_path, config, words):
    path = bare(tmp_path)
    if config is not None:
        path.with_name("config.json").write_text(config)
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"model_args": "{"}, "model_args in its metadata is not JSON"),
        ({"model_args": '{"pretrained": true}'}, "may not hold 'pretrained'"),
        ({"model_args": '{"checkpoint_path": "/etc/passwd"}'}, "may not hold 'checkpoint_path'"),
        ({"model_args": '{"wings": 2}'}, "timm cannot build"),
        ({"model_args": " " * 2**24 + "{}"}, "characters long"),
        ({"architecture": "hf-hub:timm/resnet18"}, "timm has no model"),
    ],
)
def test_hostile_metadata(tmp_path, metadata, words):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path, {"architecture": NAME, **metadata})
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert words in str(caught.value)


# --- the fit ---


def test_misfits_are_named_with_found_and_wanted_shapes(tmp_path):
    state = small_vit(num_classes=7).state_dict()
    del state["norm.weight"]
    state["extra.weight"] = torch.ones(2, 3)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        convert(path, arch=NAME, model_args=ARGS)
    text = str(caught.value)
    assert "missing: norm.weight (48)" in text
    assert "not in the architecture: extra.weight (2x3)" in text
    assert "of another shape: head.bias (found 7, wanted 10), head.weight (found 7x48, wanted 10x48)" in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_first_few_misfits_are_named(tmp_path):
    path = bare(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"missing: (\S+ \S+ ){2}\S+ \S+ and \d+ more; of another shape"
    ):
        convert(path, arch=NAME)


def test_a_wrong_architecture_costs_no_memory(tmp_path):
    path = bare(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):  # 4 TB, were it built to be compared
        convert(path, arch=NAME, model_args={"embed_dim": 300_000, "num_heads": 3, "depth": 1})


def test_a_number_of_another_kind_does_not_fit(tmp_path):
    state = small_vit().state_dict()
    state["norm.weight"] = state["norm.weight"].to(torch.int32)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"norm.weight \(found 48 int32, wanted 48\)"):
        convert(path, arch=NAME, model_args=ARGS)


def test_batch_counters_may_be_missing(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / "old.safetensors"
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    model, _ = checkpoint.load_plain(path, arch="resnet18")
    assert same_bits(model.state_dict(), state)


# --- loading and saving ---


def test_load_gives_the_rewired_model_ready_to_train(rewired):
    model = checkpoint.load(rewired)
    assert model.training
    assert isinstance(model, type(small_vit()))
    assert revwire.plan_of(model).to_json() == metadata_of(rewired)["revwire.plan"]
    assert same_bits(dict(model.state_dict()), load_file(rewired))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_load_computes_what_rewiring_the_original_computes(rewired):
    images = torch.randn(2, 3, 32, 32)
    expected = revwire.rewire(small_vit())(images)
    assert torch.equal(checkpoint.load(rewired)(images), expected)


def test_load_leaves_the_global_generator_alone(rewired):
    before = torch.get_rng_state()
    checkpoint.load(rewired)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_plain_undoes_a_conversion(rewired):
    model, plan = checkpoint.load_plain(rewired)
    assert plan.coupling == "re2tal"
    assert revwire.plan_of(model) is None
    assert same_bits(dict(model.state_dict()), dict(small_vit().state_dict()))


def test_load_asks_for_a_conversion_first(weights):
    with pytest.raises(CheckpointError, match=f"revwire convert {weights}"):
        checkpoint.load(weights)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"revwire.plan": "[]"}, "plan in its metadata is a JSON list"),
        ({"revwire.plan": '{"model": "X"}'}, "convert the original again (written by revwire"),
        ({"revwire.coupling": "other"}, "names two couplings, 're2tal' and 'other'"),
        ({"model_args": json.dumps({**ARGS, "depth": 1})}, "not in the architecture: blocks.1"),
    ],
)
def test_load_refuses_metadata_that_does_not_fit(rewired, tmp_path, changed, words):
    path = tmp_path / "changed.safetensors"
    save_file(load_file(rewired), path, {**metadata_of(rewired), **changed})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert words in str(caught.value)


def test_load_refuses_a_plan_of_another_model(rewired, tmp_path):
    plan = json.loads(metadata_of(rewired)["revwire.plan"])
    plan["chains"][0]["steps"][0]["module"] = "blocks.17"
    path = tmp_path / "changed.safetensors"
    save_file(load_file(rewired), path, {**metadata_of(rewired), "revwire.plan": json.dumps(plan)})
    with pytest.raises(CheckpointError, match="its plan does not fit"):
        checkpoint.load(path)


def test_save_and_load_a_model_in_training(rewired, tmp_path):
    model = checkpoint.load(rewired)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    path = tmp_path / "trained.safetensors"
    checkpoint.save(model, path)
    again = checkpoint.load(path)
    assert same_bits(dict(again.state_dict()), dict(model.state_dict()))
    assert not same_bits(dict(again.state_dict()), load_file(rewired))
    assert revwire.plan_of(again) == revwire.plan_of(model)
    assert model.training


def test_save_remembers_the_architecture_through_deepcopy(rewired, tmp_path):
    model = copy.deepcopy(checkpoint.load(rewired))
    vars(model).pop("_model_args", None)  # nothing of timm's to go by
    model.pretrained_cfg = model.default_cfg = {}
    checkpoint.save(model, tmp_path / "copy.safetensors")
    assert metadata_of(tmp_path / "copy.safetensors")["architecture"] == NAME
    assert not any("revwire" in key for key in model.state_dict())


def test_save_sees_that_the_model_was_changed(rewired, tmp_path):
    model = checkpoint.load(rewired)
    model.reset_classifier(3)
    checkpoint.save(model, tmp_path / "three.safetensors")
    assert checkpoint.load(tmp_path / "three.safetensors").num_classes == 3


def test_save_a_model_that_never_was_a_file(tmp_path):
    model = revwire.rewire(small_vit())
    before = torch.get_rng_state()
    checkpoint.save(model, tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert checkpoint.load(tmp_path / "model.safetensors").num_classes == 10


def test_save_asks_for_an_architecture_it_cannot_tell(tmp_path):
    model = revwire.rewire(small_vit(act_layer=torch.nn.SiLU))
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="pass arch="):
        checkpoint.save(model, path)
    checkpoint.save(model, path, arch=NAME, model_args={**ARGS, "act_layer": "silu"})
    assert isinstance(checkpoint.load(path).blocks[0].mlp.act, torch.nn.SiLU)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "resnet18"}, "does not fit resnet18"),
        ({"arch": "vit_tny_patch16_224"}, "did you mean vit_tiny"),
        ({"model_args": ARGS}, "belongs to arch="),
    ],
)
def test_save_refuses_a_wrong_architecture(rewired, tmp_path, options, words):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(checkpoint.load(rewired), tmp_path / "model.safetensors", **options)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_model_that_is_not_rewired(tmp_path):
    with pytest.raises(CheckpointError, match="not rewired: call revwire"):
        checkpoint.save(small_vit(), tmp_path / "model.safetensors")


# --- writing ---


def test_the_input_is_never_overwritten(weights):
    link = weights.with_name("link.safetensors")
    link.symlink_to(weights)
    before = weights.read_bytes()
    for out in (weights, link, weights.parent / "." / weights.name):
        with pytest.raises(CheckpointError, match="is the input itself"):
            convert(weights, out)
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("nowhere/model.safetensors", "does not exist"),
        (".", "it is a folder"),
        ("model.pth", r"name it \*.safetensors"),
        ("\0.safetensors", "cannot write"),
        ("x" * 300 + ".safetensors", "cannot write"),
    ],
)
def test_outputs_that_cannot_be(weights, out, words):
    with pytest.raises(CheckpointError, match=words):
        convert(weights, weights.parent / out)


@pytest.mark.parametrize("interruption", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(weights, monkeypatch, interruption):
    out = weights.with_name("out.safetensors")
    out.write_bytes(b"the old file")
    before = set(weights.parent.iterdir())

    def half(tensor):
        yield b"half of"
        raise interruption

    monkeypatch.setattr(writer, "_bytes_of", half)
    expected = CheckpointError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(weights, out)
    assert set(weights.parent.iterdir()) == before
    assert out.read_bytes() == b"the old file"


def test_shared_views_and_scalars_are_written_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "tied": base,
        "transposed": base.T,
        "row": base[1],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
    }
    writer.write(tmp_path / "x.safetensors", tensors, {"k": "v"})
    assert same_bits(load_file(tmp_path / "x.safetensors"), tensors)


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()])
def test_tensors_without_bytes_are_refused(tmp_path, tensor):
    with pytest.raises(CheckpointError, match="cannot write w"):
        writer.write(tmp_path / "x.safetensors", {"w": tensor}, {})
    assert list(tmp_path.iterdir()) == []


# --- files that are not what they should be ---


class _RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "model.pth"
    torch.save({"state_dict": small_vit().state_dict(), "x": _RunsCode(trap)}, path)
    with pytest.raises(CheckpointError, match="unpickling that could run code") as caught:
        convert(path)
    assert "weights_only" not in str(caught.value)  # torch's own message tells how to run it
    assert not trap.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files_of_tensors(tmp_path, legacy):
    state = small_vit().state_dict()
    path = tmp_path / "model.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    done = convert(path, arch=NAME, model_args=ARGS)
    assert done.out == tmp_path / "model.revwire.safetensors"
    assert same_bits(load_file(done.out), dict(state))


def test_a_training_checkpoint_of_timm(tmp_path):
    averaged = {f"module.{k}": v for k, v in small_vit().state_dict().items()}
    arguments = argparse.Namespace(
        model=NAME,
        num_classes=10,
        in_chans=None,
        model_kwargs={k: v for k, v in ARGS.items() if k != "num_classes"},
    )
    state = {k: torch.zeros_like(v) for k, v in averaged.items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        {"arch": NAME, "args": arguments, "epoch": 3, "state_dict": state, "state_dict_ema": averaged}, path
    )
    done = convert(path, tmp_path / "out.safetensors")
    assert done.entry == "state_dict_ema"
    assert same_bits(load_file(done.out), dict(small_vit().state_dict()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "is no state dict"),
        ({"epoch": 3}, "its entry 'epoch' is a int"),
        ({}, "is no state dict"),
        ([torch.ones(3)], "is no state dict"),
        ({"w": torch.eye(3).to_sparse()}, "is not a state dict"),
    ],
)
def test_torch_files_of_something_else(tmp_path, content, words):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"\x01", "not a whole safetensors file"),
        ("model.safetensors", b"garbage" * 100, "not a whole safetensors file"),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}" * 40, "not a whole safetensors file"),
        ("model.safetensors", b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("model.safetensors", b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        ("model.safetensors", b"PK\x03\x04" + bytes(100), "not a whole torch checkpoint"),
        ("model.pth", b"garbage" * 100, "not a whole torch checkpoint"),
        ("model.bin", b"\x80\x02garbage", "not a whole torch checkpoint"),
        ("model.pth", b"<html>", "a web page"),
    ],
)
def test_files_of_other_formats(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="cannot open"):
        read("\0")


@pytest.mark.parametrize("legacy", [None, False, True], ids=["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.999])
def test_truncated_files(tmp_path, legacy, part):
    path = tmp_path / "model"
    if legacy is None:
        save_file(small_vit().state_dict(), path)
    else:
        torch.save(small_vit().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=r"truncated, damaged or of another format"):
        read(path)


FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4)
)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_bits_in_a_file_raise_only_checkpoint_errors(tmp_path, kind, flips):
    path = tmp_path / "model"
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}
    if kind == "safetensors":
        save_file(tensors, path, {"architecture": NAME})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        source = read(path)
    except CheckpointError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in source.tensors.values())


@FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=2)
)
def test_flipped_bits_in_a_header_raise_only_checkpoint_errors(rewired, tmp_path, flips):
    content = bytearray(rewired.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for place, bit in flips:
        content[int(place * length)] ^= 1 << bit
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        checkpoint.load(path)


@FUZZ
@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x10" + bytes(7) + b"{"]),
)
def test_any_bytes_raise_only_checkpoint_errors(tmp_path, content, head):
    path = tmp_path / "model"
    path.write_bytes(head + content)
    with pytest.raises(CheckpointError):
        read(path)
