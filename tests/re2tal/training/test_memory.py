import pytest
import torch

from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.training.memory import WAYS, estimates_of

TINY = [
    "clip.size=[32,32]",
    "clip.frames=16",
    "clip.positions=8",
    "head.options.levels=3",
    "head.options.channels=32",
    "backbone.weights=null",
]
TOKENS = "num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 4, intermediate_size: 64"


@pytest.mark.parametrize("backbone", ["videomae_l", "vjepa2_l"])
def test_every_way_of_an_experiment_is_estimated(backbone):
    changes = [*TINY, f"backbone.name={backbone}", f"backbone.options={{size: 32, {TOKENS}}}"]
    ways = {way: WAYS[way] for way in ("plain", "rewired")}
    estimates = estimates_of("videomae_l_thumos14", overrides=changes, ways=ways)
    assert not [row.failure for row in estimates.rows if row.failure]
    assert all(row.peak > row.model > 0 for row in estimates.rows)


def test_the_table_of_positions_moves_with_the_model():
    """transformers keeps it as a plain attribute, which stays where it was made."""
    backbone = build_backbone("videomae_b", size=32, num_hidden_layers=1)
    table = backbone.model.embeddings.position_embeddings
    assert any(buffer is table for buffer in backbone.buffers())
    assert "model.embeddings.position_embeddings" not in backbone.state_dict()
    assert backbone.to(torch.float64).model.embeddings.position_embeddings.dtype == torch.float64
