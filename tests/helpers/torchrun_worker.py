"""What torchrun starts twice for `test_torchrun.py`: writes what it found, as JSON, into the folder it is given."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.parallel import DistributedDataParallel

import revwire
from tests.helpers.nets import NETS
from tests.helpers.pictures import Pictures, vit
from tests.helpers.steps import kept

DEPTH = 4
BATCH = 8


def build(*, replay=True):
    model = revwire.rewire(vit(dropout=0.0, depth=DEPTH), Pictures(2).pictures)
    return model if replay else kept(model)


def loss(logits):
    return logits.square().sum(1).mean()


def joined():
    return Pictures(BATCH).pictures


def mine():
    return joined().chunk(2)[dist.get_rank()]


def gradients(model):
    """By the name in the model itself, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.")] = whole
    return found


def single(steps=1):
    """Plain autograd through the recurrence, in one process, on the joined batch."""
    model = build(replay=False)
    for _ in range(steps):
        loss(model(joined())).backward()
    return gradients(model)


def worst(model, wanted):
    found = gradients(model)
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def noting_gradients(model, events):
    for index, block in enumerate(model.blocks):
        block.attn.qkv.weight.register_hook(lambda _g, index=index: events.append(f"gradient {index}"))


def ddp():
    """Gradients, also of two batches with one reduction, and when buckets are sent."""
    found = {"events": []}
    for replay in (True, False):
        model, events = build(replay=replay), []
        noting_gradients(model, events)
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.01)

        def send(state, bucket, events=events):
            events.append("bucket")
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, send)
        for _ in range(3):  # from the second step on, buckets are in the order in which gradients come
            events.clear()
            wrapped.zero_grad()
            loss(wrapped(mine())).backward()
        found["events"].append(list(events))
        if replay:
            found["error"] = worst(wrapped, single())
            wrapped.zero_grad()
            with wrapped.no_sync():
                loss(wrapped(mine())).backward()
            loss(wrapped(mine())).backward()
            found["accumulated"] = worst(wrapped, single(steps=2))
    return found


def ddp_options():
    """Whatever DDP is asked to do beside: right gradients, in the first step and on the buckets that it ordered."""
    found, wanted = {}, single()
    for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view"):
        wrapped = DistributedDataParallel(build(), **{option: True})
        errors = []
        for _ in range(2):
            wrapped.zero_grad()
            loss(wrapped(mine())).backward()
            errors.append(worst(wrapped, wanted))
        found[option] = max(errors)
    return found


def ddp_batchnorm():
    """How far a ResNet's gradients, weights and statistics are from those of the same with everything kept."""
    states = []
    for replay in (True, False):
        model = NETS["resnet"].build()
        model = revwire.rewire(model, NETS["resnet"].input())
        model = model if replay else kept(model)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for seed in range(2):
            optimizer.zero_grad()
            loss(wrapped(NETS["resnet"].input(seed).chunk(2)[dist.get_rank()])).backward()
            optimizer.step()
        states.append(
            {**gradients(model), **{f"{n} after": t.double() for n, t in model.state_dict().items()}}
        )
    found, wanted = states
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-3)) for n in wanted)


def shard(model, **policy):
    mesh = init_device_mesh("cpu", (2,))
    options = {"mesh": mesh, **policy}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def groups(model):
    """The parameter group of each block."""
    return [block._get_fsdp_state()._fsdp_param_group for block in model.blocks]


def noting_gathers(events):
    """Note when the parameters of a group are gathered and freed."""

    def noting(change, word):
        def noted(self):
            before = self._sharded_state
            change(self)
            if self._sharded_state != before:
                events.append(f"{word} {self._module_fqn or 'model'}")

        return noted

    FSDPParamGroup._to_unsharded = noting(FSDPParamGroup._to_unsharded, "gather")
    FSDPParamGroup._to_sharded = noting(FSDPParamGroup._to_sharded, "free")


def fsdp2():
    """Gradients; what is gathered when, beside that of plain autograd; and what is there while a branch runs again."""
    events, found = [], {"events": [], "open": []}
    noting_gathers(events)
    for replay in (True, False):
        model = shard(build(replay=replay))
        for index, block in enumerate(model.blocks):

            def note(*_, index=index, model=model):
                if events and "backward" in events:
                    unsharded = [i for i, group in enumerate(groups(model)) if group.is_unsharded]
                    found["open"].append((index, unsharded))

            block.attn.qkv.register_forward_hook(note)
        for _ in range(2):
            events.clear()
            found["open"].clear() if replay else None
            model.zero_grad()
            out = loss(model(mine()))
            found["between"] = [group.is_unsharded for group in groups(model)]
            events.append("backward")
            out.backward()
        found["events"].append(list(events))
        if replay:
            found["error"] = worst(model, single())
    return found


def fsdp2_accumulates():
    """Two batches with one reduction; and what `unwire` says of a class that FSDP2 put on top."""
    model = shard(build())
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        loss(model(mine())).backward()
    try:
        revwire.unwire(model)
    except revwire.RewireError as error:
        return {"error": worst(model, single(steps=2)), "unwire": str(error)}


def mixed():
    """bfloat16 parameters: how far from float64 the gradients are, replayed and kept; and what is refused."""
    wanted, found = single(), {}
    exact = torch.cat([g.flatten() for g in wanted.values()])
    for cast, replay in ((False, True), (False, False), (True, True)):
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=cast
        )
        model = shard(build(replay=replay).float(), mp_policy=policy)
        pictures = mine().bfloat16()
        if cast:
            try:
                model(pictures)
            except revwire.RewireError as error:
                found["refused"] = str(error)
            continue
        loss(model(pictures).float()).backward()
        grads = torch.cat([g.double().flatten() for g in gradients(model).values()])
        found["replayed" if replay else "kept"] = float((grads - exact).norm() / exact.norm())
    return found


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch's own, of process groups on the CPU
    warnings.filterwarnings("ignore", module=r"torch\..*")
    dist.init_process_group("gloo")
    parts = {
        "ddp": ddp,
        "options": ddp_options,
        "batchnorm": ddp_batchnorm,
        "fsdp2": fsdp2,
        "fsdp2 accumulates": fsdp2_accumulates,
        "mixed": mixed,
    }
    results = {name: part() for name, part in parts.items()}
    name = f"{os.environ['RANK']}.json"
    (Path(sys.argv[1]) / name).write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo's now and then aborts a process that ends in order


if __name__ == "__main__":
    main()
