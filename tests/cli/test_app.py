"""The command line: what it prints where, and how it ends."""

import json
from importlib import metadata

import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import revwire
from revwire import api, checkpoint
from revwire.checkpoint import conversion
from revwire.cli import doctor
from revwire.cli.app import app
from revwire.measure import verify
from revwire.measure.report import Check, Report
from tests.helpers.checkpoints import ARGS, saved_vit
from tests.helpers.commands import in_one_line
from tests.helpers.programs import python
from tests.helpers.vits import NAME

ARGUMENTS = ("--model-args", json.dumps(ARGS))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fail(*arguments):
    """The one line on stderr of a command that ends with exit code 1."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("revwire: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def weights(tmp_path):
    return saved_vit(tmp_path / "model.safetensors")


@pytest.fixture
def failed_report(monkeypatch):
    report = Report("VisionTransformer", (Check("gradients", float("nan"), 1e-5, "norm.weight"),))
    monkeypatch.setattr(conversion, "run_checks", lambda *_, **__: report)
    monkeypatch.setattr(verify, "verify", lambda *_, **__: report)


@pytest.mark.parametrize("command", ["plan", "verify", "convert"])
def test_help_shows_an_example(command):
    assert f"Example: revwire {command} " in succeed(command, "--help").stdout


def test_without_a_command_the_help_is_shown():
    assert "convert" in run().output


def test_version():
    assert succeed("--version").stdout == f"revwire {revwire.__version__}\n"


def test_plan_of_a_name():
    result = succeed("plan", NAME, *ARGUMENTS)
    assert "4 steps in 1 chain" in result.stdout
    assert "blocks.0 .. blocks.1" in result.stdout
    assert result.stderr == ""


def test_plan_is_the_plan_of_the_library():
    with torch.device("meta"):
        model = timm.create_model(NAME, **ARGS)
    text = succeed("plan", NAME, *ARGUMENTS, "--json").stdout
    assert revwire.Plan.from_json(text) == revwire.plan(model)


def test_plan_of_part_of_a_model():
    deep = ("--model-args", json.dumps({**ARGS, "depth": 4}))
    text = succeed(
        "plan",
        NAME,
        *deep,
        "--include",
        "blocks.*",
        "--exclude",
        "blocks.0",
        "--exclude",
        "blocks.1",
        "--json",
    ).stdout
    assert {step.module for step in revwire.Plan.from_json(text).steps} == {"blocks.2", "blocks.3"}


def test_plan_of_a_file(weights):
    assert "4 steps in 1 chain" in succeed("plan", weights).stdout


def test_plan_at_another_input_size():
    text = succeed("plan", "resnet18", "--input-size", "3x64x64", "--json").stdout
    assert revwire.Plan.from_json(text).steps[0].trunk[1:] == (64, 16, 16)


def test_plan_of_a_model_with_nothing_to_rewire_answers_too():
    assert "0 steps in 0 chains" in succeed("plan", "mobilenetv1_100").stdout


def test_verify_a_name():
    report = json.loads(succeed("verify", NAME, *ARGUMENTS, "--json").stdout)
    assert report["ok"]
    assert all(check["ok"] for check in report["checks"])


def test_verify_prints_a_table(weights):
    assert "VisionTransformer: verified" in succeed("verify", weights).stdout


def test_verify_fails_with_exit_code_1(failed_report):
    result = run("verify", NAME, *ARGUMENTS, "--json")
    assert result.exit_code == 1
    assert result.stderr == "revwire: the verification failed\n"
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert report["checks"][0]["figure"] is None  # NaN, which is no JSON


def test_convert_a_file(weights):
    result = succeed("convert", weights)
    out = weights.with_name("model.revwire.safetensors")
    assert checkpoint.load(out).num_classes == 10
    for expected in ("4 steps in 1 chain", "verified", "held for backward", out.name):
        assert expected in result.stdout.replace("\n", "")
    assert result.stderr == ""


def test_convert_prints_json_alone(weights):
    out = weights.with_name("other.safetensors")
    data = json.loads(succeed("convert", weights, "-o", out, "--no-verify", "--json").stdout)
    assert data["out"] == str(out)
    assert data["out_bytes"] == out.stat().st_size
    assert data["savings"]["saved"] > 0
    assert data["report"] is None


def test_convert_is_told_the_architecture(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(timm.create_model(NAME, **ARGS).state_dict(), path)
    succeed("convert", path, "--arch", NAME, *ARGUMENTS, "--no-verify")
    assert load_file(tmp_path / "model.revwire.safetensors").keys() == torch.load(path).keys()


def test_convert_writes_nothing_that_was_not_verified(weights, failed_report):
    result = run("convert", weights)
    assert result.exit_code == 1
    assert result.stderr == "revwire: the verification failed, nothing was written\n"
    assert "gradients" in result.stdout
    assert list(weights.parent.iterdir()) == [weights]


def test_errors_are_one_line_and_exit_code_1(weights, tmp_path):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"garbage" * 9)
    assert "did you mean vit_tiny_patch16_224" in fail("plan", "vit_tny_patch16_224")
    assert "No such file" in fail("plan", "nowhere.safetensors")
    assert "is a folder" in fail("convert", ".")
    assert "does not run" in fail("plan", weights, "--input-size", "3x33x33")
    assert "not a whole safetensors file" in fail("convert", garbage)
    assert "not a whole safetensors file" in fail("plan", garbage, "--json")
    assert "does not fit resnet18" in fail("convert", weights, "--arch", "resnet18")
    assert "is the input itself" in fail("convert", weights, "-o", weights)
    assert "unknown coupling 'other'" in fail("plan", weights, "--coupling", "other")
    assert "'fast' is not one of plain, checkpoint" in fail("estimate", NAME, "-s", "fast")
    assert "'gpu' is no device that torch knows" in fail("estimate", NAME, "--device", "gpu")
    assert "is a folder" in fail("plan", ".")


def test_a_page_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "plan", pytest.fail)
    assert f"cannot write {tmp_path}: it is a folder" in fail("plan", NAME, "--html", tmp_path)
    assert "no such folder" in fail("plan", NAME, "--html", tmp_path / "no" / "page.html")


def test_a_model_is_found_beside_a_folder_of_its_name(tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    assert "4 steps in 1 chain" in succeed("plan", NAME, *ARGUMENTS).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_here_is_told():
    assert "there is no cuda device here" in fail("estimate", NAME, *ARGUMENTS, "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan",), "Missing argument"),
        (("plan", NAME, "--input-size", "224"), "is not of the form 3x224x224"),
        (("plan", NAME, "--input-size", "3x0x224"), "is not of the form 3x224x224"),
        (("plan", NAME, "--model-args", "{"), "is not JSON"),
        (("plan", NAME, "--model-args", "[]"), "is not a JSON object"),
        (("convert", "x.safetensors", "--wrong"), "No such option"),
    ],
)
def test_usage_errors_print_the_usage_and_exit_with_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert words in in_one_line(result.stderr)


@pytest.mark.slow
def test_as_a_module():
    done = python("-m", "revwire", "plan", "nowhere.safetensors")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "revwire: cannot open nowhere.safetensors: No such file or directory\n"


def test_doctor_tells_what_is_there():
    told = CliRunner().invoke(app, ["doctor", "--json"])
    assert told.exit_code == 0, told.output
    findings = {f["what"]: f for f in json.loads(told.stdout)["findings"]}
    assert findings["torch"]["found"] == torch.__version__.partition("+")[0]
    assert findings["timm"]["found"] == timm.__version__
    assert findings["self-test"]["found"] == "gradients are right"


def test_doctor_tells_what_is_not_there_and_what_is_wrong(monkeypatch):
    def version(name):
        if name == "torchvision":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(doctor, "version", version)
    broken = Report("Sequential", (Check("gradients", 1.0, 1e-5),))
    monkeypatch.setattr(verify, "verify", lambda *_: broken)
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 1
    assert "failed: gradients" in told.output
    assert "not there" in told.output


def test_help_does_not_load_torch():
    code = "import sys; from revwire.cli.app import main; sys.argv = ['revwire', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_every_public_name_is_there():
    assert set(revwire.__all__) <= set(dir(revwire))
    assert all(getattr(revwire, name) is not None for name in revwire.__all__)
    # no submodule may take the place of a function of the same name
    assert all(not hasattr(getattr(revwire, name), "__path__") for name in revwire.__all__)
    assert callable(revwire.plan)
    assert callable(revwire.verify)
    with pytest.raises(AttributeError, match="no attribute 'plans_of'"):
        _ = revwire.plans_of
