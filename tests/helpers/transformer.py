"""A small transformer of two stages with transitions between them: what the dials are tried on."""

import torch
from torch import nn

from tests.helpers.nets import WIDTH, x_of

TOKENS, DEPTH = 6, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Dropout(0.2)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.mT if mask is None else q @ k.mT + mask
        return self.drop(scores.softmax(-1) @ v)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, WIDTH)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x, mask=None):
        x = x + self.attn(x, mask)
        return x + self.mlp(x)


class Stem(nn.Module):
    """A transition with everything that a second run has to get right."""

    def __init__(self, factor=1):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.factor = factor

    def forward(self, x):
        x = x[:, :: self.factor]
        return self.drop(self.norm(self.fc(x).transpose(1, 2)).transpose(1, 2).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.norm, self.head = Stem(), Stem(2), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.first = nn.ModuleList(Block() for _ in range(DEPTH))
        self.second = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, mask=None):
        x = self.stem(x)
        for block in self.first:
            x = block(x, mask)
        x = self.down(x)
        for block in self.second:
            x = block(x)
        return self.head(self.norm(x))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double().train()


def noise(batch=5):
    """What goes through it."""
    return x_of(batch, TOKENS, WIDTH)
