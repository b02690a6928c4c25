"""A tiny vision transformer and pictures to train it on: what the trainers are tried with.

All in float64, so that two ways of computing the same are told from two that differ. A run that stops and goes on must
give the very losses of one that did not stop; and a run must give, up to rounding, the losses of the same model with
everything kept for backward (`couplings.kept`), which is plain autograd through the recurrence.
"""

import timm
import torch
from torch import nn
from torch.utils.data import Dataset

import revwire

CLASSES = 4
SIZE = 16


class Pictures(Dataset):
    """So many pictures of noise, each with a class."""

    def __init__(self, count=16):
        generator = torch.Generator().manual_seed(5)
        self.pictures = torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.pictures[index], self.labels[index]


def vit(dropout=0.1, seed=0, depth=3):
    """Not rewired yet; no weight of one dimension is zero or one."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=8,
        embed_dim=12,
        depth=depth,
        num_heads=3,
        num_classes=CLASSES,
        proj_drop_rate=dropout,
        drop_path_rate=dropout,
    ).double()
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def rewired(dropout=0.1, seed=0, **dials):
    return revwire.rewire(vit(dropout, seed), Pictures(2).pictures, **dials)


def assert_close(wanted, found, tolerance=1e-9):
    """Two curves of losses, up to rounding; and that training moved them at all."""
    assert len(set(wanted)) == len(wanted) > 1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=tolerance, atol=0)
