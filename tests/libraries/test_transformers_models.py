"""Folders of Hugging Face transformers: converted, loaded again, and given back as `from_pretrained` reads them."""

import builtins
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import revwire
from benchmarks.shared.small_transformers import ZOO
from revwire import checkpoint, libraries
from revwire.cli.app import app
from revwire.errors import CheckpointError, RevwireError, RewireError
from revwire.libraries import Architecture
from tests.helpers.checkpoints import convert, metadata_of

transformers = pytest.importorskip("transformers")

KINDS = ["vit", "convnext", "videomae", "clip_vision", "gpt2", "bert"]


def build(name):
    """A model of random weights, none of them at the value that a fresh start has."""
    torch.manual_seed(0)
    model = ZOO[name][0]().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def first(output):
    return output[0]


@pytest.fixture
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]


@pytest.fixture
def folder(tmp_path):
    """A folder as `save_pretrained` leaves it."""

    def save(name, **options):
        model = build(name)
        model.save_pretrained(tmp_path / "model", **options)
        return model, tmp_path / "model"

    return save


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(folder, name):
    model, path = folder(name)
    done = convert(path)
    assert done.out == path / "model.revwire.safetensors"
    assert done.architecture.spec == f"transformers/{type(model).__name__}"
    assert tuple(len(chain.steps) for chain in done.plan.chains) == ZOO[name][2]
    inputs = ZOO[name][1](2)
    rewired = revwire.load(done.out)
    assert rewired.training
    assert revwire.plan_of(rewired) == done.plan
    again = revwire.unwire(rewired).eval()
    assert torch.equal(first(again(**inputs)), first(model(**inputs)))
    back = checkpoint.to_original(done.out)
    assert back.out == path / "model.original"
    assert "another function" in back.warning
    assert load_file(back.out / "model.safetensors").keys() == load_file(path / "model.safetensors").keys()
    theirs = type(model).from_pretrained(back.out, local_files_only=True)
    assert torch.equal(first(theirs(**inputs)), first(model(**inputs)))
    assert checkpoint.to_original(done.out).out == back.out  # once more, over what the first time wrote


def test_verified_and_measured(folder):
    _, path = folder("vit")
    done = checkpoint.convert(path)
    assert done.report.ok
    assert done.savings.batch == 2
    assert min(done.savings.plain.held, done.savings.rewired.held) > 0


def test_trained_and_saved_under_the_names_of_the_library(folder, tmp_path):
    model, path = folder("gpt2")
    rewired = revwire.load(convert(path, coupling="bdia").out)
    inputs = ZOO["gpt2"][1](2)
    rewired(**inputs).logits.square().mean().backward()
    torch.optim.SGD(rewired.parameters(), lr=0.1).step()
    out = tmp_path / "trained.safetensors"
    checkpoint.save(rewired, out)
    assert load_file(out).keys() == load_file(path / "model.safetensors").keys()  # without the tied head
    back = checkpoint.to_original(out, tmp_path / "back")
    assert back.warning == ""
    theirs = type(model).from_pretrained(back.out, local_files_only=True).eval()
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert torch.equal(theirs(**inputs).logits, rewired.eval()(**inputs).logits)
    assert not torch.equal(theirs(**inputs).logits, model(**inputs).logits)


def test_files_of_several_parts_and_pickles(folder):
    model, path = folder("bert", max_shard_size="20KB")
    assert (path / "model.safetensors.index.json").is_file()
    wanted = convert(path).out
    state = model.state_dict()
    names = list(state)
    for file in path.glob("model*"):
        file.unlink() if file != wanted else None
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, own in parts.items():
        torch.save({name: state[name] for name in own}, path / file)
    index = path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: f for f, own in parts.items() for name in own}}))
    done = convert(path)
    assert done.out == path / "pytorch_model.revwire.safetensors"
    assert done.source_bytes == sum((path / file).stat().st_size for file in parts)
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(done.out).items())


def test_old_files(folder):
    """Names that files of older versions have: constants among the weights, no prefix before a head's model."""
    model, path = folder("gpt2")
    file = path / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(state, file, {"format": "pt"})
    done = convert(path)
    assert load_file(done.out).keys() == state.keys()
    inputs = ZOO["gpt2"][1](2)
    again = revwire.unwire(revwire.load(done.out)).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_half_precision_and_memory_of_its_own(folder):
    _, path = folder("vit")
    file = path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    out = convert(path).out
    model = revwire.load(out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = {name: tensor.clone() for name, tensor in load_file(out).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(out).items())


def test_the_global_generator_stays(folder):
    _, path = folder("vit")
    before = torch.get_rng_state()
    revwire.load(convert(path).out)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in KINDS])
def test_inputs_are_known(name):
    model = build(name)
    inputs = libraries.example_inputs(model)
    assert tuple(len(chain.steps) for chain in revwire.plan(model).chains) == ZOO[name][2]
    again = libraries.example_inputs(model)
    assert all(
        torch.equal(again[key], value) for key, value in inputs.items() if isinstance(value, torch.Tensor)
    )


def test_inputs_of_pretraining_and_of_two_towers():
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    video = transformers.VideoMAEConfig(
        **settings, image_size=32, patch_size=8, num_frames=4, decoder_hidden_size=32,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=48,
    )  # fmt: skip
    assert (
        libraries.example_inputs(transformers.VideoMAEForPreTraining(video)) is None
    )  # which patches to mask?
    vision, text = {**settings, "image_size": 32, "patch_size": 8}, {**settings, "vocab_size": 50}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    assert len(revwire.plan(clip).chains) == 2


def test_on_the_command_line(folder):
    _, path = folder("vit")
    run = CliRunner().invoke
    result = run(app, ["convert", str(path), "--no-verify"])
    assert result.exit_code == 0, result.output
    assert "transformers/ViTModel" in result.stdout
    assert "hidden_size" not in result.stdout
    assert "6 steps in 1 chain" in run(app, ["plan", str(path)]).stdout
    assert "6 steps" in run(app, ["plan", str(path), "--input-size", "3x32x32"]).stdout
    assert (
        "does not run on the example inputs"
        in run(app, ["plan", str(path), "--input-size", "3x64x32"]).stderr
    )
    estimate = run(app, ["estimate", str(path), "-b", "3", "-s", "plain"])
    assert "3x3x32x32" in estimate.stdout
    out = path / "model.revwire.safetensors"
    back = run(app, ["convert", str(out), "--to", "original", "-o", str(path.parent / "new")])
    assert back.exit_code == 0, back.output
    assert "transformers.ViTModel.from_pretrained(" in back.stdout


def changed(path, **entries):
    file = path / "config.json"
    config = json.loads(file.read_text())
    config.update(entries)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_type": "vitt"}, "has no model_type 'vitt'; did you mean vit"),
        ({"model_type": 3}, "model_type must be a string, not 3"),
        ({"architectures": "ViTModel"}, "must be a list of class names"),
        ({"architectures": [["x"]]}, "must be a list of class names"),
        ({"architectures": ["NoSuchModel"]}, "has no model class 'NoSuchModel'"),
        ({"architectures": ["Trainer"]}, "has no model class 'Trainer'"),
        ({"architectures": ["os.system"]}, "has no model class 'os.system'"),
        ({"architectures": ["BertModel"]}, "BertModel is no model of model_type 'vit'"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "names code of its own to run"),
        ({"quantization_config": {"quant_method": "x"}}, "weights are quantised"),
        ({"hidden_size": "wide"}, "cannot build transformers/ViTModel"),
        ({"hidden_size": -4}, "cannot build transformers/ViTModel"),
        ({"num_attention_heads": 0}, "cannot build transformers/ViTModel"),
        ({"patch_size": None, "image_size": {"a": 1}}, "cannot build transformers/ViTModel"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, and the file has"),
        ({"num_labels": 10**9}, "num_labels: 1000000000"),
        ({"hidden_size": 400_000, "num_attention_heads": 4}, "many times larger"),
        ({"hidden_size": 40}, "of another shape: "),
        ({"num_hidden_layers": 4}, "missing: "),
        ({"num_hidden_layers": 2}, "not in the architecture: "),
    ],
)
def test_hostile_configurations(folder, entries, words):
    _, path = folder("vit")
    changed(path, **entries)
    before = set(path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert words in str(caught.value)
    assert set(path.iterdir()) == before


def test_nothing_is_fetched(folder):
    """Entries that would have transformers fetch kernels or backbones are not heard."""
    _, path = folder("vit")
    changed(path, _attn_implementation="someone/kernels", attn_implementation="someone/kernels")
    changed(path, use_pretrained_backbone=True, transformers_weights="/etc/passwd", dtype="float99")
    assert convert(path).ok


def test_without_a_class_the_model_of_the_type(folder):
    _, path = folder("convnext")
    changed(path, architectures=None)
    assert convert(path).architecture.spec == "transformers/ConvNextModel"


@pytest.mark.parametrize("text", ['{"a":' * 100_000, '{"model_type": "vit"' + " " * 2**24 + "}", "[]"])
def test_configurations_that_are_none(folder, text):
    _, path = folder("vit")
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not JSON|at most|JSON list"):
        convert(path)


def test_metadata_that_was_changed(folder):
    _, path = folder("vit")
    out = convert(path).out
    for changes, says in (
        ({"architecture": "transformers/os"}, "has no model class 'os'"),
        ({"model_args": "{}"}, "must be a config.json, with its model_type"),
        ({"model_args": '{"model_type": 3}'}, "must be a config.json, with its model_type"),
    ):
        other = out.with_name("other.safetensors")
        save_file(load_file(out), other, {**metadata_of(out), **changes})
        with pytest.raises(CheckpointError, match=says):
            checkpoint.load(other)


def test_a_model_whose_inputs_are_not_known(tmp_path):
    config = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    config |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    kind = transformers.TimeSeriesTransformerConfig(**config, prediction_length=4, context_length=8)
    transformers.TimeSeriesTransformerModel(kind).save_pretrained(tmp_path)
    with pytest.raises(RewireError, match=r"is called with is not known; load it with transformers"):
        convert(tmp_path)


def test_a_head_that_the_configuration_does_not_have(tmp_path):
    model = build("vit")
    model.pooler.dense = torch.nn.Linear(32, 7)
    revwire.rewire(model)
    with pytest.raises(CheckpointError, match="its config builds another model"):
        checkpoint.save(model, tmp_path / "m.safetensors")


def test_without_transformers(folder, monkeypatch):
    _, path = folder("vit")
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "transformers":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"pip install 'revwire\[transformers\]'"):
        convert(path)
    with pytest.raises(RevwireError, match=r"pip install 'revwire\[transformers\]'"):
        Architecture("ViTModel", {}, "transformers").build()


def test_a_folder_with_more_in_it_is_not_written_over(folder):
    _, path = folder("vit")
    out = convert(path).out
    with pytest.raises(CheckpointError, match="there is more in it"):
        checkpoint.to_original(out, path)
    assert checkpoint.to_original(out, path / "weights.safetensors").out.is_file()
