import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from examples.re2tal.config import FOLDER, ConfigError, read_config
from examples.re2tal.heads.build import build_head
from examples.re2tal.sections import thresholds


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_shipped_configurations_are_sound(name):
    config = read_config(name)
    head = build_head(config.head.name, in_channels=8, classes=3, **config.head.options)
    assert config.clip.positions % 2 ** (head.levels - 1) == 0
    assert config.backbone.weights or config.backbone.name in {"convnet", "slowfast_r101"}


def test_settings_are_overridden_one_by_one():
    config = read_config(
        "synthetic", ["optim.epochs=3", "memory.chunks=2", "head.options.levels=4", "seed=7"]
    )
    assert (config.optim.epochs, config.memory.chunks, config.head.options["levels"], config.seed) == (
        3,
        2,
        4,
        7,
    )
    assert config.memory.dials() == {"chunks": 2}
    assert config.optim.batch == read_config("synthetic").optim.batch


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.epoch=3", r"optim\.epoch: there is no such setting; did you mean epochs\?"),
        ("optimizer.lr=3", "optimizer: there is no such setting; did you mean optim"),
        ("zzz=3", "zzz: there is no such setting; there are output, data"),
        ("optim.epochs=many", r"optim\.epochs: .*integer"),
        ("optim.lr=-1", r"optim\.lr: .*greater than 0"),
        ("memory.strategy=reversible", r"memory\.strategy: .*'rewired'"),
        ("clip.positions=50", "multiple of clip.positions"),
        ("optim.warmup=10", "leaves nothing of 10 epochs"),
        ("evaluation.tiou=0.5:0.9", "write 0.5:0.05:0.95"),
        ("optim.lr", "'optim.lr' is not key=value"),
        ("optim.lr.head=3", r"optim\.lr\.head: there are no settings below optim\.lr"),
        ("seed=[", "is not YAML"),
        ("data.class_agnostic=true", "set both, or none"),
        ("evaluation.video_classes=scores.json", "set both, or none"),
    ],
)
def test_a_wrong_setting_is_named(override, told):
    with pytest.raises(ConfigError, match=told):
        read_config("synthetic", [override])


def test_a_dial_needs_rewiring():
    with pytest.raises(ConfigError, match=r"memory\.chunks is a dial of memory\.strategy=rewired"):
        read_config("synthetic", ["memory.strategy=plain", "memory.chunks=2"])


def test_a_missing_file_says_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match=r"there are .*synthetic"):
        read_config("imaginary")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml"):
        read_config(tmp_path / "empty.yaml")
    (tmp_path / "torn.yaml").write_bytes(b"\xff\xfe\x00output")
    with pytest.raises(ConfigError, match=r"torn\.yaml cannot be read"):
        read_config(tmp_path / "torn.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="there is no file"):
        read_config(tmp_path / "folder.yaml")


def test_a_written_configuration_comes_back(tmp_path):
    config = read_config("synthetic", ["optim.epochs=4"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert read_config(path) == config


@given(first=st.integers(1, 18), count=st.integers(1, 10))
def test_thresholds_include_the_last(first, count):
    last = min(20, first + count)
    found = thresholds(f"{first / 20}:0.05:{last / 20}")
    assert np.allclose(found, np.arange(first, last + 1) / 20)


@pytest.mark.parametrize(
    "text", ["", "a", "0.5:0:0.9", "0.5:-0.1:0.9", "0.9:0.1:0.5", "0,0.5", "0.5:0.1:1.5"]
)
def test_what_are_no_thresholds(text):
    with pytest.raises(ValueError, match="are no thresholds"):
        thresholds(text)
