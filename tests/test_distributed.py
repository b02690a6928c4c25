"""Two processes on the CPU: gradients equal a single process on the joined batch.

No set-up asks anything special of the model: no find_unused_parameters, no static_graph (both work too).
"""

import sys
import warnings

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import revwire

DDP_KINDS = {
    "ddp": {},
    "ddp, find_unused_parameters": {"find_unused_parameters": True},
    "ddp, static_graph": {"static_graph": True},
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file store")


def build(rewired=True):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=3
    ).double()
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return revwire.rewire(model, joined_batch()) if rewired else model


def joined_batch():
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(logits):
    return logits.square().sum(1).mean()


def worst(model, wanted):
    errors = []
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        reference = wanted[name.removeprefix("module.")]
        errors.append(float((grad - reference).norm() / reference.norm()))
    return max(errors)


def work(rank, store, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        single = build()
        loss(single(joined_batch())).backward()
        wanted = {name: parameter.grad for name, parameter in single.named_parameters()}
        mine = joined_batch().chunk(2)[rank]
        found = {}
        for kind, options in DDP_KINDS.items():
            model = DistributedDataParallel(build(), **options)
            for _ in range(2):  # the second step runs on the buckets that the first one ordered
                model.zero_grad()
                loss(model(mine)).backward()
            found[kind] = worst(model, wanted)
        found["fsdp2"] = worst(sharded(mine), wanted)
        if rank == 0:
            results.update(found)
    finally:
        dist.destroy_process_group()


def sharded(mine):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = build()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        loss(model(mine)).backward()
    return model


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "gloo"
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(work, args=(store, shared), nprocs=2)
        return dict(shared)


@pytest.mark.parametrize("kind", [*DDP_KINDS, "fsdp2"])
def test_gradients_equal_a_single_process_on_the_joined_batch(results, kind):
    assert results[kind] < 1e-12
