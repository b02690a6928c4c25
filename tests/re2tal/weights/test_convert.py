"""The command that says what a file of weights holds, and what runs take from such files."""

import json
import re

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from examples.re2tal import convert
from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.config import Config, ConfigError, read_config
from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.build import build_head
from examples.re2tal.training.setup import detector_of, resolved
from examples.re2tal.weights.families import found_in, load_head, note
from tests.re2tal import tiny
from tests.re2tal.weights.made import CASES, SLOWFAST, stored
from tests.re2tal.weights.test_heads_of_others import renamed

HEAD = {"channels": 16, "levels": 3, "stem": 1, "heads": 2, "window": None}


def command(*arguments):
    app = typer.Typer()
    app.command()(convert.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def detector_file(path, classes=20):
    """A detector as OpenTAD saves it: a rewired SlowFast under an ActionFormer."""
    source = path.with_name("backbone.safetensors")
    backbone, _ = stored("SlowFast in a detector", source)
    tensors = {n: t for n, t in load_file(source).items() if n.startswith("module.backbone.")}
    head = build_head("actionformer", in_channels=288, classes=classes, **HEAD)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    tensors |= {f"module.{name}": tensor for name, tensor in renamed(head, "OpenTAD").items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save({"epoch": 9, "state_dict": other, "state_dict_ema": tensors}, path)
    return backbone, head


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_is_the_same_network(case, tmp_path):
    path, target = tmp_path / "weights.safetensors", tmp_path / "out.safetensors"
    backbone, _ = stored(case, path)
    name, options = CASES[case][0]
    done = command(path, "--out", target)
    assert done.exit_code == 0, done.output
    assert found_in(path)[1].layout.name in done.output
    assert f"wrote {len(backbone.state_dict())} tensors to {target}" in done.output
    assert "left out: " in done.output
    loaded = build_backbone(name, weights=target, **options)
    clip = torch.randn(1, 3, 16, 32, 32)
    torch.testing.assert_close(loaded.eval()(clip), backbone.eval()(clip), rtol=0, atol=0)
    assert (loaded.mean, loaded.std) == (backbone.mean, backbone.std)
    assert found_in(target)[1].layout.rewired == ("rewired" in case or "detector" in case)


def test_what_is_printed_is_what_a_run_needs(tmp_path):
    path = tmp_path / "weights.safetensors"
    stored("rewired SlowFast", path)
    out = command(path).output
    target = tmp_path / "weights.re2tal.safetensors"
    assert "SlowFast, rewired by Re2TAL" in out
    assert "left out: cls_head.fc_cls.bias (6), cls_head.fc_cls.weight (6x8)" in out
    options = json.loads(re.search(r"'backbone\.options=(.*?)'", out)[1])
    assert f"backbone.name=slowfast_r50 backbone.weights={target} " in out
    assert options == SLOWFAST[1]
    assert "memory.strategy=rewired" in out
    assert "guess" not in out
    build_backbone("slowfast_r50", weights=target, **options)
    stored("mmaction2 VideoMAE", path)
    assert "num_attention_heads is a guess, no tensor tells" in command(path).output


def test_a_detector_is_converted_with_its_head(tmp_path):
    path, target = tmp_path / "epoch_9.pth.tar", tmp_path / "epoch_9.re2tal.safetensors"
    backbone, head = detector_file(path)
    for source, out in ((path, target), (target, tmp_path / "again.safetensors")):
        done = command(source, "--out", out)
        assert done.exit_code == 0, done.output
        assert "left out" not in done.output
        assert f"detector.weights={out}" in done.output
        tensors = load_file(out)
        for prefix, module in (("backbone.", backbone), ("head.", head)):
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensors[prefix + name], tensor)
    assert "(entry state_dict_ema)" in command(path).output


def test_a_file_that_notes_its_sizes_needs_no_options(tmp_path):
    """As `pretrain` writes it."""
    path, target = tmp_path / "backbone.safetensors", tmp_path / "out.safetensors"
    backbone = build_backbone("slowfast_r50", **SLOWFAST[1], wiring="re2tal")
    save_file(backbone.state_dict(), path, metadata=note({**SLOWFAST[1], "wiring": "re2tal"}, rewired=True))
    done = command(path, "--out", target)
    assert done.exit_code == 0, done.output
    assert f"backbone.name=slowfast_r50 backbone.weights={target} memory.strategy=rewired" in done.output
    for file in (path, target):
        loaded = build_backbone("slowfast_r50", weights=file)
        assert all(torch.equal(loaded.state_dict()[n], t) for n, t in backbone.state_dict().items())


def test_a_head_alone_is_converted(tmp_path):
    head = build_head("actionformer", in_channels=6, classes=20, **HEAD)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    path, target = tmp_path / "epoch_9.pth.tar", tmp_path / "head.safetensors"
    torch.save({"state_dict": renamed(head, "ActionFormer")}, path)
    done = command(path, "--out", target)
    assert done.exit_code == 0, done.output
    assert "ActionFormer of its own repository" in done.output
    assert "load_head takes it" in done.output
    fresh = build_head("actionformer", in_channels=6, classes=20, normalizer=7, **HEAD)
    load_head(fresh, path)
    assert float(fresh.normalizer) == 7  # not in the file
    for name, parameter in head.named_parameters():
        assert torch.equal(fresh.get_parameter(name), parameter)
        assert torch.equal(load_file(target)[name], parameter)


def test_errors_are_one_line(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"layer": torch.zeros(1)}, path)
    done = command(path)
    assert done.exit_code == 1
    assert "are of no layout known here" in done.output
    stored("mmaction2 Video Swin", path)
    assert "would be written over" in command(path, "--out", path).output
    done = command(path, "--out", tmp_path / "none" / "out.safetensors")
    assert done.exit_code == 1
    assert "cannot write" in done.output
    assert not list(tmp_path.glob("*.part"))


def test_a_note_that_nobody_can_read_is_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    backbone = build_backbone("slowfast_r50", **SLOWFAST[1])
    for text in ("nonsense", "[]", '{"options": 3, "rewired": true}'):
        save_file(backbone.state_dict(), path, metadata={"re2tal": text})
        with pytest.raises(Re2TALError, match="what nobody can read; write it again"):
            found_in(path)
    save_file(backbone.state_dict(), path, metadata=note({"widht": 3}, rewired=False))
    with pytest.raises(Re2TALError, match=r"backbone slowfast_r50: .*widht"):
        build_backbone("slowfast_r50", weights=path, **SLOWFAST[1])


def config(tmp_path, strategy="rewired", **sections):
    return tiny.config(
        tmp_path,
        tmp_path / "run",
        **{
            "clip": {"frames": 16, "positions": 8, "size": [32, 32]},
            "backbone": {"name": "slowfast_r50", "options": SLOWFAST[1]},
            "head": {"name": "actionformer", "options": HEAD},
            "memory": {"strategy": strategy},
            **sections,
        },
    )


def test_a_run_takes_the_wiring_from_its_file_and_keeps_it(tmp_path):
    path = tmp_path / "weights.safetensors"
    stored("rewired SlowFast", path)
    given = {"backbone": {"name": "slowfast_r50", "weights": str(path), "options": SLOWFAST[1]}}
    run = resolved(config(tmp_path, **given))
    assert run.backbone.options == {**SLOWFAST[1], "wiring": "re2tal"}
    assert resolved(run) == run
    run.output.mkdir()
    (run.output / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    path.unlink()
    assert resolved(config(tmp_path, **given)) == run
    assert resolved(read_config(run.output / "config.yaml")) == run
    assert detector_of(run, 20, weights=False).backbone.blocks[0].multipathway_fusion.norm is None


@pytest.mark.parametrize("strategy", ["plain", "checkpoint", "frozen"])
def test_weights_of_a_rewired_network_are_not_run_otherwise(strategy, tmp_path):
    path = tmp_path / "weights.safetensors"
    stored("rewired SlowFast", path)
    given = {"backbone": {"name": "slowfast_r50", "weights": str(path), "options": SLOWFAST[1]}}
    with pytest.raises(
        Re2TALError, match=f"another function under memory.strategy={strategy}; give memory.strategy=rewired"
    ):
        resolved(config(tmp_path, strategy, **given))
    stored("mmaction2 SlowFast", path)
    assert resolved(config(tmp_path, strategy, **given)).backbone.options["wiring"] == "mmaction2"


def test_a_run_starts_from_a_whole_detector(tmp_path):
    path = tmp_path / "epoch_9.pth.tar"
    backbone, head = detector_file(path)
    backbone_too = {"name": "slowfast_r50", "weights": "replaced", "options": SLOWFAST[1]}
    run = resolved(config(tmp_path, backbone=backbone_too, detector={"weights": str(path)}))
    detector = detector_of(run, 20)
    for own, wanted in ((detector.backbone, backbone), (detector.head, head)):
        state = own.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())
    with pytest.raises(
        Re2TALError, match=r"does not fit the head; of another shape: rpn_head.cls_head.weight \(20x16x3"
    ):
        detector_of(resolved(config(tmp_path, detector={"weights": str(path)})), 7)
    stored("rewired SlowFast", tmp_path / "alone.safetensors")
    alone = {"weights": str(tmp_path / "alone.safetensors")}
    with pytest.raises(
        Re2TALError, match=r"holds no head that is known here .*; load its backbone alone: backbone\.weights="
    ):
        detector_of(resolved(config(tmp_path, detector=alone)), 20)


def test_two_ways_to_start_are_one_too_many(tmp_path):
    settings = tiny.settings(tmp_path, tmp_path, detector={"weights": "a.pth"}, start_from="runs/a")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="two models to start from; give one of them"):
        read_config(path)
    assert Config.model_validate({**settings, "start_from": None}).detector.weights is not None
