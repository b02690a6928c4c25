"""An experiment that takes seconds, on videos that are made for it."""

import json
from pathlib import Path

from examples.re2tal.config import Config
from examples.re2tal.data import synth

OPTIONS = {"channels": 16, "levels": 3, "stem": 1}


def data(folder: Path, training: int = 8, held_out: int = 4) -> Path:
    """Videos and annotations, as `examples.re2tal.data.synth` makes them."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    wanted = synth.videos(training, held_out, 0)
    database = {video.id: synth.make(video, folder / "videos") for video in wanted}
    (folder / "annotations.json").write_text(json.dumps({"version": "test", "database": database}))
    return folder


def settings(data: Path, output: Path, **sections) -> dict:
    """Settings as a YAML file holds them; `sections` are merged in."""
    own = {
        "output": str(output),
        "data": {"annotations": str(data / "annotations.json"), "videos": str(data / "videos")},
        "clip": {"frames": 32, "positions": 16, "size": [16, 16], "rate": 4},
        "backbone": {"name": "convnet", "options": {"width": 4}},
        "head": {"name": "convolutional", "options": OPTIONS},
        "optim": {
            "epochs": 3,
            "warmup": 1,
            "batch": 2,
            "lr": 1e-3,
            "backbone_lr": 1e-3,
            "ema": 0.9,
            "amp": "none",
        },
        "loader": {"workers": 0},
        "evaluation": {"batch": 2},
    }
    for name, values in sections.items():
        own[name] = {**own.get(name, {}), **values} if isinstance(values, dict) else values
    return own


def config(data: Path, output: Path, **sections) -> Config:
    """The same, checked."""
    return Config.model_validate(settings(data, output, **sections))
