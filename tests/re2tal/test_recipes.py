"""The recipe sets what is not set, and nothing else."""

import pytest

from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.config import Config, ConfigError, read_config
from examples.re2tal.errors import Re2TALError
from examples.re2tal.training.setup import backbone_of
from tests.re2tal import tiny

ROWS = ("swin_t_thumos14", "slowfast101_thumos14", "swin_t_activitynet", "slowfast101_activitynet")


@pytest.mark.parametrize("name", ROWS)
def test_shipped_rows_have_the_recipes_numbers(name):
    config = read_config(name)
    clip, optim, head, found = config.clip, config.optim, config.head.options, config.evaluation
    anet = name.endswith("activitynet")
    assert config.recipe == "opentad"
    assert (clip.frames, clip.positions) == ((768, 192) if anet else (1024, 512))
    assert (clip.by, clip.stride, clip.fit, clip.size) == ("frame", 4, "crop", (224, 224))
    assert (clip.augment.crop, clip.augment.short_side) == (0.08, 256)
    assert (optim.epochs, optim.cosine) == ((15, None) if anet else (120, 1500))
    assert (optim.batch, optim.lr, optim.backbone_lr) == ((8, 1e-3, 1e-5) if anet else (2, 1e-4, 1e-5))
    assert (optim.ema, optim.ema_warmup, optim.warmup_from) == (0.999, False, "zero")
    assert head["window"] is None
    assert (head["loss_weight"], head["label_smoothing"]) == ((2.0, 0.1) if anet else (1.0, 0.0))
    assert head.get("positions") == (192 if anet else None)
    assert (found.sigma, found.limit, found.voting) == ((0.7, 100, 0.9) if anet else (0.7, 2000, None))
    assert found.vote_weight == "score"
    assert config.backbone.freeze_norms
    assert config.backbone.drop_path == (0.2 if name.startswith("swin") else None)
    assert config.data.class_agnostic is anet


def test_what_is_set_is_kept():
    changes = ["clip.by=time", "head.options.window=19", "optim.cosine=null", "evaluation.dialect=revwire"]
    config = read_config("swin_t_thumos14", changes)
    assert (config.clip.by, config.clip.rate) == ("time", 15)
    assert config.head.options["window"] == 19
    assert config.head.options["dialect"] == "opentad"
    assert config.optim.cosine is None
    assert config.evaluation.dialect == "revwire"


def test_a_recipe_survives_being_written():
    config = read_config("swin_t_activitynet", ["optim.epochs=9"])
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("recipe=mmaction", r"recipe: .*'revwire' or 'opentad'"),
        ("optim.cosine=100", r"optim\.cosine \(100\) is shorter than 120"),
        ("clip.augment.short_side=200", r"short_side \(200\) is smaller than clip\.size"),
    ],
)
def test_a_wrong_setting_is_named(change, told):
    with pytest.raises(ConfigError, match=told):
        read_config("swin_t_thumos14", [change])


def test_drop_path_rises_to_the_last_block(tmp_path):
    def setting(name, rate):
        return tiny.config(tmp_path, tmp_path, backbone={"name": name, "drop_path": rate, "options": {}})

    rates = [
        m.p for m in backbone_of(setting("swin3d_t", 0.22)).modules() if type(m).__name__ == "StochasticDepth"
    ]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    with pytest.raises(Re2TALError, match="the backbone convnet has no drop path"):
        backbone_of(setting("convnet", 0.1))
    assert build_backbone("convnet").channels
