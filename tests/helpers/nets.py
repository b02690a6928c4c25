"""Nets with the recurrence of each written out by hand: what rewired models are compared with.

A new model is one entry of `NETS`. No reference uses revwire: it runs ordinary autograd through the sub-modules of an
unwired copy, with streams (x, x), next = previous + F(current), and the mean of both at the end.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn

import revwire

WIDTH = 8


def x_of(*shape, seed=0, dtype=torch.float64):
    """Noise, the same at every call."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")
    return made.to(torch.get_default_device())


def stir(model, mean=0.5):
    """No weight of one dimension starts at zero or one: a norm or layer scale that is forgotten would not be seen."""
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, mean, 0.3)
    return model


def recur(x, branches):
    """The recurrence itself."""
    previous = current = x
    for branch in branches:
        previous, current = current, previous + branch(current)
    return (previous + current) / 2


class Loop(nn.Module):
    """`x = attn(x) + x; x = ff(x) + x`, as people write it."""

    def __init__(self, dropout=0.0, depth=2):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attn = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), nn.Tanh()]
            ff = [nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(dropout)]
            self.layers.append(nn.ModuleList([nn.Sequential(*attn), nn.Sequential(*ff)]))

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


class Residual(nn.Module):
    """One block, `x + body(x)`."""

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


def convolutions(dropout=0.0):
    """An nn.Sequential of residual blocks with BatchNorm."""
    return nn.Sequential(
        *(
            Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(dropout))
            for _ in range(3)
        )
    )


def vit(dropout=0.0, depth=2, classes=5):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3}
    sizes |= {"depth": depth, "num_classes": classes}
    return timm.create_model("vit_tiny_patch16_224", **sizes, drop_path_rate=dropout, proj_drop_rate=dropout)


def resnet(dropout=0.0):
    # the first block of each stage has a downsampling shortcut, so the first two stages are chains of two
    sizes = {"layers": (3, 3, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 5}
    return timm.create_model("resnet18", **sizes, drop_path_rate=dropout, drop_rate=dropout)


def convnext(dropout=0.0):
    sizes = {"depths": (2, 3, 1, 1), "dims": (8, 12, 8, 8), "num_classes": 5}
    return timm.create_model("convnext_atto", **sizes, drop_path_rate=dropout, drop_rate=dropout)


def of_loop(net, x):
    return recur(x, [branch for pair in net.layers for branch in pair])


def of_convolutions(net, x):
    return recur(x, [block.body for block in net])


def of_vit(net, x):
    branches = []
    for b in net.blocks:
        branches.append(lambda x, b=b: b.drop_path1(b.ls1(b.attn(b.norm1(x)))))
        branches.append(lambda x, b=b: b.drop_path2(b.ls2(b.mlp(b.norm2(x)))))
    return net.forward_head(net.norm(recur(net.norm_pre(net._pos_embed(net.patch_embed(x))), branches)))


def of_resnet(net, x):
    def branch(b):
        drop = b.drop_path or nn.Identity()  # the activation after the sum moves into the branch
        return lambda x: b.act2(drop(b.bn2(b.conv2(b.act1(b.bn1(b.conv1(x)))))))

    x = net.maxpool(net.act1(net.bn1(net.conv1(x))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = recur(stage[0](x), [branch(b) for b in stage[1:]])
    return net.forward_head(x)


def of_convnext(net, x):
    def branch(b):
        def run(x):
            return b.drop_path(b.mlp(b.norm(b.conv_dw(x))) * b.gamma.reshape(1, -1, 1, 1))

        return run

    x = net.stem(x)
    for stage in net.stages:
        x = stage.downsample(x)
        # one block alone is no chain and stays as it is
        x = recur(x, [branch(b) for b in stage.blocks]) if len(stage.blocks) > 1 else stage.blocks(x)
    return net.forward_head(net.norm_pre(x))


@dataclass(frozen=True)
class Net:
    """One model.

    Attributes:
        make: How to make it.
        reference: Its recurrence by hand.
        shape: What it takes.
        steps: How many steps its plan must have.
        parts: Two alike parts of its branches.
        batchnorm: Whether there are any.
    """

    make: Callable[..., nn.Module]
    reference: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    steps: int
    parts: tuple[str, str]
    batchnorm: bool = False

    def build(self, dropout=0.0, seed=0):
        """The net in float64 with branches that count: no weight starts at zero or one."""
        torch.manual_seed(seed)
        return stir(self.make(dropout).double())

    def input(self, seed=0):
        return x_of(*self.shape, seed=100 + seed)


NETS = {
    "loop": Net(Loop, of_loop, (4, 3, WIDTH), 4, ("layers.0.1", "layers.1.1")),
    "convolutions": Net(convolutions, of_convolutions, (4, 4, 5, 5), 3, ("0.body", "2.body"), batchnorm=True),
    "vit": Net(vit, of_vit, (3, 3, 16, 16), 4, ("blocks.0.attn", "blocks.1.attn")),
    "resnet": Net(resnet, of_resnet, (4, 3, 32, 32), 4, ("layer1.1.conv1", "layer1.2.conv1"), batchnorm=True),
    "convnext": Net(
        convnext, of_convnext, (3, 3, 32, 32), 5, ("stages.1.blocks.0.mlp", "stages.1.blocks.2.mlp")
    ),
}


class Reference(nn.Module):
    """A net's recurrence as a module, so that it can be called, hooked and copied like the rewired net."""

    def __init__(self, kind, net):
        super().__init__()
        self.kind, self.net = kind, net

    def forward(self, x):
        return self.kind.reference(self.net, x)


def net_of(model):
    """The net itself, also within a `Reference`."""
    return model.net if isinstance(model, Reference) else model


def loss(out):
    """A scalar that weighs every element differently."""
    return (out * torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()).sum()


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_same(wanted, found, tolerance=1e-10):
    """Every tensor equals its counterpart, relative to the largest entry; None only where both are None."""
    wanted, found = list(wanted), list(found)
    assert len(wanted) == len(found)
    for w, f in zip(wanted, found, strict=True):
        assert (w is None) == (f is None)
        if w is not None:
            assert w.shape == f.shape
            scale = float(w.detach().abs().max()) if w.numel() else 0.0
            torch.testing.assert_close(f, w, rtol=0, atol=tolerance * max(scale, 1e-3))


@functools.cache
def _rewired(name, dropout):
    kind = NETS[name]
    model = revwire.rewire(kind.build(dropout), kind.input())
    assert len(revwire.plan_of(model).steps) == kind.steps
    return model


def pair(name, dropout=0.0, seed=0, *, train=True):
    """The reference and the rewired model, of the same weights, and an input."""
    kind = NETS[name]
    net = kind.build(dropout, seed)
    model = copy.deepcopy(_rewired(name, dropout))
    model.load_state_dict(net.state_dict())
    return Reference(kind, net).train(train), model.train(train), kind.input(seed)
