"""Weights and pictures by a formula, so that a fixture holds outputs alone."""

from zlib import crc32

import torch


def fill(tensors):
    """Give every tensor numbers that follow from its name, of the scale that common initialisations have.

    Tables of positions stay as the network computes them.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or name.endswith("pos_embed"):
            continue
        values = torch.sin(
            torch.arange(tensor.numel(), dtype=torch.float64) * 12.9898 + crc32(name.encode()) % 1000
        ).reshape(tensor.shape)
        if tensor.ndim > 1:
            values *= (2 / tensor[0].numel()) ** 0.5
        else:  # norms: weights and variances about one, biases and means about zero
            values = values * 0.25 + (1 if name.endswith(("weight", "running_var")) else 0)
        tensor.data.copy_(values)


def clip(frames, height, width):
    """(1, 3, frames, height, width)."""
    values = torch.cos(torch.arange(3 * frames * height * width, dtype=torch.float64) * 0.37)
    return values.reshape(1, 3, frames, height, width)
