"""Checkpoints named on the Hugging Face hub, which is a folder here; adapters, which are none."""

import json
from unittest import mock

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from revwire import checkpoint
from revwire.checkpoint import hub
from revwire.cli.app import app
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import convert

NAME = "hf-hub:timm/test_vit.r160_in1k"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The hub as a folder; what was asked of it is noted. The current folder is another, and empty."""
    asked, here, there = [], tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()

    def snapshot_download(name, *, revision=None, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(here)
    return there, asked


def test_what_is_fetched_is_converted_into_the_current_folder(cached, tmp_path):
    there, asked = cached
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=4), there, safe_serialization=True)
    done = convert(f"{NAME}@v2")
    assert done.architecture.model_args["num_classes"] == 4
    assert done.out.resolve() == tmp_path / "here" / "test_vit.r160_in1k.revwire.safetensors"
    assert load_file(done.out).keys() == load_file(there / "model.safetensors").keys()
    assert not list(there.glob("*.revwire.*"))
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("timm/test_vit.r160_in1k", "v2")
    assert "model.safetensors" in patterns
    assert not any("bin" in pattern for pattern in patterns)


def test_pickles_are_fetched_where_there_is_nothing_better(cached):
    there, asked = cached
    torch.save(timm.create_model("test_vit").state_dict(), there / "pytorch_model.bin")
    (there / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    assert convert(NAME).ok
    assert "pytorch_model.bin" in asked[1][2]
    (there / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has neither model"):
        convert(NAME)


def test_other_commands_take_it_too(cached):
    there, _ = cached
    timm.models.save_for_hf(timm.create_model("test_vit"), there, safe_serialization=True)
    for arguments in (["plan"], ["estimate", "-s", "plain"]):
        result = CliRunner().invoke(app, [*arguments, NAME])
        assert result.exit_code == 0, result.stderr
    assert "chain" in CliRunner().invoke(app, ["plan", str(there)]).stdout


def answer(kind, *arguments):
    return mock.patch.object(huggingface_hub, "snapshot_download", side_effect=kind(*arguments))


def of_http(kind):
    return lambda text: kind(text, response=mock.Mock())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError, "the hub is out of reach (LocalEntryNotFoundError)"),
        (errors.OfflineModeIsEnabled, "the hub is out of reach"),
        (ConnectionError, "the hub is out of reach (ConnectionError)"),
        (of_http(errors.RepositoryNotFoundError), "the hub has no hf-hub:timm/test_vit.r160_in1k"),
        (of_http(errors.GatedRepoError), "is gated: accept its licence"),
        (errors.HFValidationError, "is no name on the hub"),
    ],
)
def test_what_goes_wrong_is_one_line(error, words):
    with answer(error, "text\nof several lines"):
        result = CliRunner().invoke(app, ["convert", NAME])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="download the folder where there is a network"):
        hub.located("hf-hub:timm/resnet18.a1_in1k")


# --- adapters ---


def with_adapters():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    return peft.get_peft_model(timm.create_model("test_vit", num_classes=3), config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_are_merged_first(tmp_path):
    model = with_adapters()
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    with pytest.raises(CheckpointError, match=r"an adapter that is not merged \(.*lora_A.*merge_and_unload"):
        convert(path)
    alone = tmp_path / "adapter"
    model.save_pretrained(alone)
    for source in (alone, alone / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="merge_and_unload"):
            convert(source)
    images = torch.randn(2, 3, 160, 160)
    merged = model.merge_and_unload()
    save_file(merged.state_dict(), path)
    done = convert(path)
    assert done.architecture.model_args == {"num_classes": 3}
    plain, _ = checkpoint.load_plain(done.out)
    assert torch.equal(plain.eval()(images), merged.eval()(images))
    save_file({f"base_model.model.{k}": v for k, v in merged.state_dict().items()}, path)
    assert convert(path).architecture == done.architecture
