"""One detector for several processes: by DDP each has all weights, by FSDP2 each has a part of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from examples.re2tal.detector import Detector
    from examples.re2tal.distributed.world import World

Parallel = Literal["ddp", "fsdp2"]


def spread(detector: Detector, world: World, parallel: Parallel) -> nn.Module:
    """The detector, with gradients averaged over all processes.

    Args:
        detector: The same in all processes, on its device.
        world: The processes.
        parallel: *ddp*: each has all weights; *fsdp2*: each has a part, and gathers those of a block for its time.
    """
    if world.size == 1:
        return detector
    if parallel == "ddp":
        # the trainer shares buffers itself, by World.agree: FSDP2 never does, and averages are taken after it
        return DistributedDataParallel(detector, broadcast_buffers=False, gradient_as_bucket_view=True)
    # what travels between rewired blocks must not be cast to the dtype of the parameters
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in _blocks(detector.backbone):
        fully_shard(block, mp_policy=policy)
    return fully_shard(detector, mp_policy=policy)


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """All weights of a sharded model are there inside the block, so processes need not run it equally often."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(True, recurse=False)


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """What a sharded backbone gathers at a time: the outermost items of its lists that are no lists themselves."""
    for child in backbone.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for item in child:
                if isinstance(item, nn.Sequential | nn.ModuleList):
                    yield from _blocks(nn.ModuleList([item]))
                elif any(p.requires_grad for p in item.parameters()):
                    yield item
        else:
            yield from _blocks(child)
