"""Hugging Face transformers models of the coverage sweep: small configurations with random weights.

All dimensions are small and dropout is on; what matters is the code of the blocks. Weights are never fetched.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

Inputs = dict[str, Any]

LAYERS = 3
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "attention_dropout": 0.1,
    "image_size": 32,
    "patch_size": 8,
}
_CAUSAL = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "attention_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _images(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _video(batch: int, frames: int = 4, key: str = "pixel_values") -> Inputs:
    return {key: torch.randn(batch, frames, 3, 32, 32)}


def _tokens(batch: int, length: int = 7) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": torch.randint(2, 50, (batch, length)), "attention_mask": mask, "use_cache": False}


def _sequence_to_sequence(batch: int) -> Inputs:
    return {**_tokens(batch), "decoder_input_ids": torch.randint(2, 50, (batch, 5))}


def _speech(batch: int) -> Inputs:
    decoded = torch.randint(2, 50, (batch, 5))
    return {"input_features": torch.randn(batch, 16, 40), "decoder_input_ids": decoded, "use_cache": False}


def _model(name: str, config: str | None = None, **settings: Any) -> nn.Module:
    import transformers

    base = name.removesuffix("Model").removesuffix("LMHead").removesuffix("ForCausalLM")
    base = base.removesuffix("ForConditionalGeneration")
    model: nn.Module = getattr(transformers, name)(
        getattr(transformers, config or f"{base}Config")(**settings)
    )
    return model


_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_WAV2VEC2 = {
    **_ENCODER,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
}
_WAV2VEC2 |= {
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "hidden_dropout": 0.1,
}
_WAV2VEC2 |= {
    "feat_proj_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "mask_time_prob": 0.0,
}
_WHISPER = {"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 4}
_WHISPER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50}
_WHISPER |= {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20, "dropout": 0.1}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "vocab_size": 50}
_T5 |= {"decoder_start_token_id": 0, "eos_token_id": None}
_VJEPA2 = {
    "crop_size": 32,
    "frames_per_clip": 4,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
}
_VJEPA2 |= {
    "num_attention_heads": 4,
    "pred_hidden_size": 48,
    "pred_num_hidden_layers": LAYERS,
    "drop_path_rate": 0.1,
}
_VJEPA2 |= {"pred_num_attention_heads": 4, "pred_num_mask_tokens": 2}

ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs], tuple[int, ...]]] = {
    # name: how to build it, inputs for a batch, steps of each of its chains
    "vit": (partial(_model, "ViTModel", **_ENCODER, image_size=32, patch_size=8), _images, (6,)),
    "deit": (partial(_model, "DeiTModel", **_ENCODER, image_size=32, patch_size=8), _images, (6,)),
    "dinov2": (partial(_model, "Dinov2Model", **_VISION, drop_path_rate=0.1), _images, (6,)),
    "dinov3_vit": (partial(_model, "DINOv3ViTModel", **_VISION, drop_path_rate=0.1), _images, (6,)),
    "clip_vision": (partial(_model, "CLIPVisionModel", **_VISION), _images, (6,)),
    "siglip_vision": (partial(_model, "SiglipVisionModel", **_VISION), _images, (6,)),
    "beit": (partial(_model, "BeitModel", **_ENCODER, image_size=32, patch_size=8), _images, (6,)),
    "swin": (partial(_model, "SwinModel", **_SWIN, drop_path_rate=0.1), _images, (4, 4)),
    "convnext": (
        partial(_model, "ConvNextModel", depths=[2, 2], hidden_sizes=[16, 32], num_stages=2, drop_path_rate=0.1),
        _images,
        (2, 2),
    ),
    "videomae": (
        partial(_model, "VideoMAEModel", **_ENCODER, image_size=32, patch_size=8, num_frames=4),
        _video,
        (6,),
    ),
    "timesformer": (
        partial(_model, "TimesformerModel", **_ENCODER, image_size=32, patch_size=8, num_frames=4),
        _video,
        (6,),
    ),
    "vivit": (
        partial(_model, "VivitModel", **_ENCODER, image_size=32, num_frames=4, tubelet_size=[2, 8, 8]),
        _video,
        (6,),
    ),
    "vjepa2": (partial(_model, "VJEPA2Model", **_VJEPA2), partial(_video, key="pixel_values_videos"), (6, 6)),
    "wav2vec2": (
        partial(_model, "Wav2Vec2Model", **_WAV2VEC2),
        lambda batch: {"input_values": torch.randn(batch, 400)},
        (7,),
    ),
    "wav2vec2_prenorm": (
        partial(_model, "Wav2Vec2Model", **_WAV2VEC2, do_stable_layer_norm=True, feat_extract_norm="layer"),
        lambda batch: {"input_values": torch.randn(batch, 400)},
        (6,),
    ),
    "whisper": (partial(_model, "WhisperModel", **_WHISPER), _speech, (6, 9)),
    "gpt2": (
        partial(_model, "GPT2LMHeadModel", n_embd=32, n_layer=LAYERS, n_head=4, n_positions=32, vocab_size=50,
                bos_token_id=1, eos_token_id=None, pad_token_id=0),
        _tokens,
        (6,),
    ),
    "llama": (partial(_model, "LlamaForCausalLM", **_CAUSAL), _tokens, (6,)),
    "qwen3": (partial(_model, "Qwen3ForCausalLM", **_CAUSAL, head_dim=8), _tokens, (6,)),
    "t5": (partial(_model, "T5ForConditionalGeneration", **_T5), _sequence_to_sequence, (6, 9)),
    "bert": (partial(_model, "BertModel", **_ENCODER, vocab_size=50), _tokens, (6,)),
}  # fmt: skip
