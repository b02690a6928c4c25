"""Whose numbers hold where an experiment does not set its own.

`recipe: opentad` are the numbers of OpenTAD's end-to-end configurations of Re2TAL (`configs/re2tal`, the same for
Video Swin and SlowFast): those of THUMOS-14 where a clip is a window, those of ActivityNet-1.3 where it is the whole
video. Any of them can be set otherwise in the file or on the command line. Where ours do better, `clip.by=time` and
`evaluation.dialect=revwire` bring them back one by one.
"""

from __future__ import annotations

from typing import Any

_ALWAYS: dict[str, Any] = {
    "clip": {
        "size": [224, 224],
        "by": "frame",
        "fit": "crop",
        "augment": {
            "short_side": 256,
            "crop": 0.08,
            "flip": True,
            "jitter": 0.5,
            "hue": 0.1,
            "rand_augment": 2,
            "magnitude": 27,
        },
    },
    "backbone": {"freeze_norms": True},
    "head": {
        "name": "actionformer",
        "options": {
            "dialect": "opentad",
            "levels": 6,
            "stem": 2,
            "heads": 4,
            "window": None,
            "drop_path": 0.1,
            "scale": 1e-4,
        },
    },
    "optim": {
        "warmup": 5,
        "warmup_from": "zero",
        "least_lr": 1e-8,
        "backbone_lr": 1e-5,
        "weight_decay": 0.05,
        "decay_backbone": "all",
        "clip": 1.0,
        "ema": 0.999,
        "ema_warmup": False,
        "amp": "fp16",
    },
    "evaluation": {
        "dialect": "opentad",
        "drop_duplicates": True,
        "topk": 2000,
        "min_score": 0.001,
        "sigma": 0.7,
        "vote_weight": "score",
    },
}

_WINDOW: dict[str, Any] = {
    # the rate is that of the strides in videos of 30 frames a second, for clip.by=time
    "clip": {"sampling": "window", "frames": 1024, "positions": 512, "stride": 4, "rate": 15, "overlap": 0.5},
    "head": {"options": {"channels": 512, "normalizer": 100, "label_smoothing": 0.0, "loss_weight": 1.0}},
    # the rate falls as if there were 1,500 epochs: it hardly falls
    "optim": {"epochs": 120, "cosine": 1500, "batch": 2, "lr": 1e-4},
    "evaluation": {"tiou": "0.3:0.1:0.7", "batch": 2, "threshold": 0.001, "limit": 2000},
}

_RESIZE: dict[str, Any] = {
    "data": {"class_agnostic": True, "shortest": 0.01},
    "clip": {"sampling": "resize", "frames": 768, "positions": 192},
    "head": {
        "options": {
            "channels": 256,
            "positions": 192,
            "normalizer": 200,
            "label_smoothing": 0.1,
            "loss_weight": 2.0,
        }
    },
    "optim": {"epochs": 15, "batch": 8, "lr": 1e-3},
    # where there is one class, every point is a candidate
    "evaluation": {"tiou": "0.5:0.05:0.95", "batch": 8, "threshold": 0.0, "limit": 100, "voting": 0.9},
}


def with_recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an experiment, with those of its recipe where it has none; unknown recipes bring none."""
    if settings.get("recipe") != "opentad":
        return settings
    clip = settings.get("clip")
    whole = isinstance(clip, dict) and clip.get("sampling") == "resize"
    return _under(settings, _under(_RESIZE if whole else _WINDOW, _ALWAYS))


def _under(settings: Any, defaults: Any) -> Any:
    """`settings`, section by section with `defaults` where they have nothing."""
    if not isinstance(settings, dict) or not isinstance(defaults, dict):
        return settings
    return {**defaults, **{key: _under(value, defaults.get(key)) for key, value in settings.items()}}
