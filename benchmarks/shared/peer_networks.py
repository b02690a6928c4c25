"""One stack of residual branches, and the ways to train it that `benchmarks.peers` compares.

What each way computes is described there. Here are the recurrences under plain autograd, written out, and for each
package the few lines that put the same branch modules on its chain. A package is imported only when its way is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revwire

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

GAMMA = 0.9
_LAST = -1  # the dimension in which two streams are joined


def attention_branch(dim: int, heads: int) -> nn.Module:
    """LayerNorm and attention, as in a vision transformer."""
    return nn.Sequential(nn.LayerNorm(dim), Attention(dim, num_heads=heads, qkv_bias=True))


def mlp_branch(dim: int) -> nn.Module:
    """LayerNorm and an MLP of four times the width, as in a vision transformer."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Stack(nn.Module):
    """Branches on Re2TAL's recurrence, under plain autograd."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """`s[k+1] = s[k-1] + F_k(s[k])`, both streams `x` at first; the mean of the last two."""
        before, now = x, x
        for branch in self.branches:
            before, now = now, before + branch(now)
        return (before + now) * 0.5


class Residual(Stack):
    """Branches as an ordinary residual network, under plain autograd."""

    def forward(self, x: Tensor) -> Tensor:
        """`x = x + F_k(x)`."""
        for branch in self.branches:
            x = x + branch(x)
        return x


class Checkpointed(Stack):
    """The ordinary residual network, with a checkpoint around each block of two branches."""

    def forward(self, x: Tensor) -> Tensor:
        """`x = x + F_k(x)`."""
        for first, second in _blocks(self):
            x = checkpoint(_block, x, first, second, use_reentrant=False)
        return x


def _block(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    x = x + first(x)
    return x + second(x)


class Momentum(Stack):
    """Branches as a Momentum ResNet, under plain autograd."""

    def forward(self, x: Tensor) -> Tensor:
        """`v = gamma v + (1 - gamma) F_k(x)`, `x = x + v`, v = 0 at first."""
        velocity = torch.zeros_like(x)
        for branch in self.branches:
            velocity = GAMMA * velocity + (1 - GAMMA) * branch(x)
            x = x + velocity
        return x


class TwoStreams(nn.Module):
    """A package's chain over two streams joined in the last dimension, as a network from one tensor to one."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        """`x` as both streams in, the mean of both out."""
        one, other = self.chain(torch.cat([x, x], _LAST)).chunk(2, _LAST)
        return (one + other) * 0.5


class Block(nn.Module):
    """One residual block, as `revwire.rewire` finds it in any network."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """`x + F(x)`."""
        return x + self.branch(x)


def _blocks(stack: Stack) -> Iterator[tuple[nn.Module, nn.Module]]:
    return zip(stack.branches[::2], stack.branches[1::2], strict=True)


def plain(stack: Stack) -> nn.Module:
    """The stack itself."""
    return stack


def memcnn(stack: Stack) -> nn.Module:
    """An invertible coupling for each block, which clears its input."""
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    couplings = [AdditiveCoupling(Fm=f, Gm=g, split_dim=_LAST) for f, g in _blocks(stack)]
    wrapped = [InvertibleModuleWrapper(c, keep_input=False, keep_input_inverse=False) for c in couplings]
    return TwoStreams(nn.Sequential(*wrapped))


def revtorch(stack: Stack) -> nn.Module:
    """One sequence of reversible blocks."""
    from revtorch.revtorch import ReversibleBlock, ReversibleSequence

    blocks = [ReversibleBlock(f, g, split_along_dim=_LAST) for f, g in _blocks(stack)]
    return TwoStreams(ReversibleSequence(nn.ModuleList(blocks)))


def revlib(stack: Stack) -> nn.Module:
    """One reversible sequence, in the package's default memory mode."""
    from revlib import ReversibleSequential

    return TwoStreams(ReversibleSequential(*stack.branches, split_dim=_LAST))


def momentumnet(stack: Stack) -> nn.Module:
    """A Momentum ResNet that reconstructs its activations."""
    from momentumnet import MomentumNet

    network: nn.Module = MomentumNet(list(stack.branches), gamma=GAMMA, use_backprop=False)
    return network


def rewired(stack: Stack) -> nn.Module:
    """The ordinary residual network, through revwire's public API."""
    network = nn.Sequential(*(Block(branch) for branch in stack.branches))
    weight = next(network.parameters())  # a LayerNorm's: as long as a token is wide
    return revwire.rewire(network, weight.new_zeros(2, 4, len(weight)))


Build = Callable[[Stack], nn.Module]


@dataclass(frozen=True)
class Way:
    """One way to train the stack.

    Attributes:
        build: From the plain stack to the network to train, which runs the very same branch modules.
        package: Distribution that it needs beside revwire's own dependencies.
        recurrence: The same function under plain autograd, to compare gradients with.
    """

    build: Build
    package: str = ""
    recurrence: type[Stack] = Stack


WAYS = {
    "plain": Way(plain),
    "checkpoint": Way(lambda stack: Checkpointed(stack.branches), recurrence=Residual),
    "memcnn": Way(memcnn, "memcnn"),
    "RevTorch": Way(revtorch, "RevTorch"),
    "revlib": Way(revlib, "revlib"),
    "momentumnet": Way(momentumnet, "momentumnet", Momentum),
    "revwire": Way(rewired),
}
"""What is compared, in the order of the rows; a further package is one more entry."""
