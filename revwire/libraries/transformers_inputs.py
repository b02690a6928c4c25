"""What a model of Hugging Face transformers is called with, told by its configuration and its forward's signature."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from revwire.libraries.noise import Noise

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

_SIDE = 224  # of images, where a configuration has none: convolutional nets take any
_LENGTH = 16  # of texts
_SAMPLES = 16_000  # of sound: one second
_FRAMES = ("num_frames", "frames_per_clip")
_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD


def inputs_for(model: nn.Module, kind: type, batch: int) -> dict[str, Any] | None:
    """Keyword arguments for a model, the same at every call; the global generator stays where it was.

    None where its main input is of no kind known here, or the forward wants more than that (the masks of pretraining).

    Args:
        model: The model; its parameters decide dtype and device.
        kind: The class of transformers that it is of.
        batch: Number of inputs.
    """
    made = _Inputs(model, batch)
    parameters = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    main = getattr(model, "main_input_name", "input_ids")
    if main not in made.ways:
        return None
    inputs: dict[str, Any] = {main: made.ways[main]()}
    config = made.config
    if hasattr(model, "logit_scale") and main == "input_ids" and "pixel_values" in parameters:
        inputs["pixel_values"] = made.images()  # of two towers, CLIP's way
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = made.tokens()
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    wanted = [each.name for each in parameters.values() if each.default is each.empty and each.kind is _NAMED]
    return inputs if inputs.keys() >= {*wanted[1:]} else None


class _Inputs:
    """Makes inputs of each kind for one model."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.config: Any = model.config
        self._batch, self._dtype, self._device = batch, like.dtype, like.device
        self._random = Noise()
        self.ways: dict[str, Callable[[], Tensor]] = {
            "pixel_values": self.images,
            "pixel_values_videos": self.images,
            "input_ids": self.tokens,
            "input_values": lambda: self._noise(_SAMPLES),
            "input_features": self._spectrogram,
        }

    def images(self) -> Tensor:
        """(batch, channels, height, width), of video models (batch, frames, channels, height, width)."""
        channels = self._first(("num_channels", "in_channels", "in_chans"), 3)
        size = self._vision("image_size", None) or self._vision("crop_size", None) or _SIDE
        height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
        frames = self._first(_FRAMES, 0)
        return self._noise(*((frames,) if frames else ()), channels, height, width)

    def tokens(self) -> Tensor:
        """Token numbers, none of those at the beginning, which pad and separate."""
        text = self.config.get_text_config()
        vocabulary = getattr(text, "vocab_size", 0) or 2
        positions = getattr(text, "max_position_embeddings", None) or _LENGTH
        length = min(_LENGTH, positions - 2) if positions > 2 else positions
        first = min(4, vocabulary - 1)
        made = self._random.integers(first, vocabulary, (self._batch, length))
        return made.to(self._device)

    def _spectrogram(self) -> Tensor:
        """Whisper's: twice as many frames as positions."""
        bins = self._first(("num_mel_bins",), 80)
        return self._noise(bins, 2 * self._first(("max_source_positions",), 1500))

    def _noise(self, *size: int) -> Tensor:
        made = self._random.normal((self._batch, *size))
        return made.to(device=self._device, dtype=self._dtype)

    def _vision(self, name: str, default: Any) -> Any:
        """An entry of the configuration, or of its vision tower's."""
        tower = getattr(self.config, "vision_config", None)
        return getattr(self.config, name, getattr(tower, name, default))

    def _first(self, names: tuple[str, ...], default: int) -> int:
        found = (self._vision(name, None) for name in names)
        return next((value for value in found if isinstance(value, int)), default)
