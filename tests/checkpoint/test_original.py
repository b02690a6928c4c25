"""The way back: rewired checkpoints as timm's own."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import revwire
from revwire import checkpoint
from revwire.cli.app import app
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import ARGS, metadata_of, vit
from tests.helpers.vits import NAME


@pytest.fixture
def trained(tmp_path):
    """Saves a model after a step of training with a coupling."""

    def make(coupling, **options):
        model = revwire.rewire(vit(), coupling=coupling, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        path = tmp_path / "model.revwire.safetensors"
        checkpoint.save(model, path)
        return model, path

    return make


def test_timm_loads_it_as_its_own(trained):
    model, path = trained("re2tal")
    done = checkpoint.to_original(path)
    assert done.out == path.with_name("model.original.safetensors")
    again = timm.create_model(NAME, checkpoint_path=str(done.out), **ARGS)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    metadata = metadata_of(done.out)
    assert not any("revwire" in key for key in metadata)
    assert metadata["architecture"] == NAME
    with pytest.raises(CheckpointError, match="is not a rewired checkpoint"):
        checkpoint.load(done.out)


def test_trained_with_bdia_it_computes_what_was_trained(trained):
    model, path = trained("bdia")
    done = checkpoint.to_original(path)
    assert done.warning == ""
    again = timm.create_model(NAME, checkpoint_path=str(done.out), **ARGS).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model.eval()(images))


@pytest.mark.parametrize("coupling", ["re2tal", "momentum(gamma=0.5)", "dr2net(alpha=1,beta=0.125)"])
def test_another_function_is_warned_of(trained, coupling):
    model, path = trained(coupling)
    done = checkpoint.to_original(path)
    assert "another function" in done.warning
    assert coupling.partition("(")[0] in done.warning
    again = timm.create_model(NAME, checkpoint_path=str(done.out), **ARGS).eval()
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(again(images), model.eval()(images), atol=1e-3)  # the warning is true


def test_on_the_command_line(trained):
    _, path = trained("re2tal")
    result = CliRunner().invoke(app, ["convert", str(path), "--to", "original"])
    assert result.exit_code == 0, result.output
    assert "warning: " in result.stdout
    assert "timm.create_model('vit_tiny_patch16_224'" in result.stdout
    out = path.with_name("other.safetensors")
    arguments = ["convert", str(path), "--to", "original", "-o", str(out), "--json"]
    data = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert data["out"] == str(out)
    assert data["coupling"] == "re2tal"
    assert load_file(out).keys() == load_file(path).keys()


def test_what_cannot_be_turned_back(trained, tmp_path):
    _, path = trained("re2tal")
    plain = tmp_path / "plain.safetensors"
    save_file(vit().state_dict(), plain)
    with pytest.raises(CheckpointError, match="is not a rewired checkpoint"):
        checkpoint.to_original(plain)
    with pytest.raises(CheckpointError, match="is the input itself"):
        checkpoint.to_original(path, path)
    other = tmp_path / "other.revwire.safetensors"
    save_file({"a": torch.ones(1)}, other, metadata_of(path))
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.to_original(other)
    assert not other.with_name("other.original.safetensors").exists()
