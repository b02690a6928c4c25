"""What one GPU of N needs for a training step of large models, sharded by FSDP2: the table of docs/distributed.md.

    python -m benchmarks.sizing
    torchrun --standalone --nproc-per-node 2 -m benchmarks.sizing --check

`revwire.estimate` tells what a step needs on one device. FSDP2 divides parameters, gradients and optimizer state by the
number of processes and leaves activations as they are; what it gathers for a time comes on top, see `on_each`. The
second command runs the step of a small model in two processes and compares the bytes with that.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import timm
import torch
import typer
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import revwire
from benchmarks.shared import result_files
from revwire.measure.live_bytes import LiveBytes
from revwire.measure.strategies import treated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

MODELS = {
    "vit_large_patch16_224": 64,
    "vit_huge_patch14_224": 64,
    "vit_giant_patch14_224": 64,
    "vit_gigantic_patch14_224": 64,
}
"""timm's models, and the images in a step of one process."""
WAYS = ("plain", "checkpoint", "rewired", "lean")
PROCESSES = (1, 8, 16, 64)
PATH = result_files.RESULTS / "sizing.json"
_SMALL_MODEL = {"depth": 12, "embed_dim": 384, "num_heads": 6, "img_size": 64, "num_classes": 100}
"""Arguments of the model whose step `--check` measures."""


def on_each(row: Mapping[str, Any], processes: int) -> float:
    """Bytes of one process: its share of the state, its activations, and what is gathered for a time.

    At its most, in backward, a process has whole the parameters of the block at work and of the one gathered ahead, the
    gradients of the block at work and of the one being reduced, and parameters and gradients of what is in no block.
    """
    state = row["model"] + row["gradients"] + row["optimizer"]
    if processes == 1:
        return float(row["peak"])
    gathered = 4 * row["block"] + 2 * row["rest"]
    return float(state / processes + row["activations"] + row["inputs"] + gathered)


def sized(name: str, batch: int, way: str, *, amp: bool = True, **options: Any) -> dict[str, Any]:
    """One model's step on one device, done in one way, and the bytes of its largest block and of what is in none."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, **options)
        images = torch.empty(batch, *_shape(model))
    found = revwire.estimate(
        model,
        images,
        strategies=[way],
        autocast=torch.bfloat16 if amp else None,
        device="cpu",
    )
    row = asdict(found[way])
    kept = {k: row[k] for k in ("peak", "model", "gradients", "optimizer", "inputs", "activations")}
    block = max(_bytes(b) for b in model.blocks)
    parameters = sum(p.numel() for p in model.parameters())
    rest = _bytes(model) - sum(_bytes(b) for b in model.blocks)
    return {
        "model_name": name,
        "batch": batch,
        "way": way,
        "parameters": parameters,
        **kept,
        "block": block,
        "rest": rest,
    }


def _shape(model: nn.Module) -> tuple[int, int, int]:
    side: Any = model.patch_embed
    return (3, *side.img_size)


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


class _Resized(LiveBytes):
    """Live bytes that see at once when a storage was emptied, as FSDP2 empties what it gathered."""

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        _ = self.live  # counts anew what was resized
        return super().__torch_dispatch__(*args, **kwargs)


def measured(way: str, batch: int) -> int:
    """Most live bytes of this process in a step of the small model that two processes share."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    images = torch.randn(batch, 3, _SMALL_MODEL["img_size"], _SMALL_MODEL["img_size"])
    model: Any = treated(timm.create_model("vit_small_patch16_224", **_SMALL_MODEL), images, way)
    with _Resized() as meter:  # from here on: sharding copies this process's part, and lets go of the whole
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            meter.reset_peak()
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return meter.peak + images.nbytes


def check() -> list[dict[str, Any]]:
    """Predicted and measured bytes of a small model's step in the processes that torchrun started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = []
        for way in WAYS:
            row = sized("vit_small_patch16_224", 16, way, amp=False, **_SMALL_MODEL)
            told, real = on_each(row, dist.get_world_size()), measured(way, 16)
            found.append({"way": way, "predicted": round(told), "measured": real})
        return found if dist.get_rank() == 0 else []
    finally:
        dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/distributed.md, GiB."""
    heads = [f"{n} GPU{'s' if n > 1 else ''}" for n in PROCESSES]
    lines = [f"| model, images a GPU | way | activations | {' | '.join(heads)} |", "|---|---|" + "---|" * 5]
    for row in rows:
        cells = [row["activations"], *(on_each(row, n) for n in PROCESSES)]
        figures = " | ".join(f"{cell / 2**30:.1f}" for cell in cells)
        name = f"{row['model_name']}, {row['batch']}"
        lines.append(f"| {name} | {row['way']} | {figures} |")
    return lines


def checked_table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the table below it, MiB."""
    lines = ["| way | added up | measured | ratio |", "|---|---|---|---|"]
    for row in rows:
        told, real = row["predicted"], row["measured"]
        lines.append(f"| {row['way']} | {told / 2**20:.0f} | {real / 2**20:.0f} | {told / real:.2f} |")
    return lines


def main(
    checking: Annotated[
        bool, typer.Option("--check", help="Compare with a step of two processes; under torchrun.")
    ] = False,
) -> None:
    """Size training steps of large models by estimates, for one GPU of several."""
    if checking:
        found = check()
        if found:
            document = json.loads(PATH.read_text("utf-8"))
            document["checked"] = {**result_files.origin("benchmarks.sizing"), "rows": found}
            result_files.write(document, PATH)
            print(json.dumps(found, indent=1))
        return
    rows = [sized(name, batch, way) for name, batch in MODELS.items() for way in WAYS]
    result_files.write({**result_files.origin("benchmarks.sizing"), "rows": rows}, PATH)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    typer.run(main)
