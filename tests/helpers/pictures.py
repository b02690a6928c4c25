"""A tiny vision transformer and pictures to train it on: what the trainers are tried with.

All in float64, so that two ways of computing the same are told from two that differ. A run that stops and goes on must
give the very losses of one that did not stop; and a run must give, up to rounding, the losses of the same model with
everything kept for backward (`steps.kept`), which is plain autograd through the recurrence.
"""

import torch
from torch.utils.data import Dataset

import revwire
from tests.helpers import nets

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
    """Not rewired yet."""
    torch.manual_seed(seed)
    return nets.stir(nets.vit(dropout, depth, CLASSES).double())


def rewired(dropout=0.1, seed=0, **dials):
    return revwire.rewire(vit(dropout, seed), Pictures(2).pictures, **dials)


def assert_close(wanted, found, tolerance=1e-9):
    """Two curves of losses, up to rounding; and that training moved them at all."""
    assert len(set(wanted)) == len(wanted) > 1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=tolerance, atol=0)
