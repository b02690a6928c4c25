"""Whole checkpoints of every format, and ways to spoil one: bytes, headers, metadata, plans, containers."""

import json
import struct

import torch
from safetensors.torch import load_file, save_file

import revwire
from revwire import checkpoint
from tests.helpers.checkpoints import ARGS, metadata_of, vit
from tests.helpers.vits import NAME

FORMATS = ("plain.safetensors", "rewired.safetensors", "zip.pth", "legacy.pth")
JSON = (
    None, True, 0, -1, 2**31, 10**9, 2**63, 10**400, 0.5, 1e308, -1e308, float("inf"), float("nan"), "", "a", "..",
    "\0", "x" * 5000, "[red]", "\x1b]0;t\x07", [], {}, [[]], [""], [None] * 50, {"": ""},
)  # fmt: skip


def corpus(folder):
    """One whole file of each format."""
    torch.manual_seed(0)
    state = vit().state_dict()
    save_file(state, folder / FORMATS[0], {"architecture": NAME, "model_args": json.dumps(ARGS)})
    checkpoint.save(revwire.rewire(vit()), folder / FORMATS[1], arch=NAME, model_args=ARGS)
    torch.save({"state_dict": state, "epoch": 3}, folder / FORMATS[2])
    torch.save({"state_dict": state, "epoch": 3}, folder / FORMATS[3], _use_new_zipfile_serialization=False)
    return [folder / name for name in FORMATS]


def spoilt(source, out, random):
    """A file that was spoilt in one way or several; returns which."""
    ways = [_bytes, _cut, _bytes_of_head]
    if source.suffix == ".safetensors":
        ways += [_header, _metadata, _metadata]
    else:
        ways += [_container]
    way = random.choice(ways)
    way(source, out, random)
    return f"{source.name} {way.__name__.strip('_')}"


def _bytes(source, out, random, span=None):
    content = bytearray(source.read_bytes())
    span = min(span or len(content), len(content))
    at_end = random.random() < 0.5 and span < len(content)
    for _ in range(random.randint(1, 16)):
        place = random.randrange(span)
        content[-place - 1 if at_end else place] = random.choice((0, 255, 128, random.randrange(256)))
    out.write_bytes(content)


def _bytes_of_head(source, out, random):
    _bytes(source, out, random, span=2048)


def _cut(source, out, random):
    content = source.read_bytes()
    start, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
    how = random.randrange(3)
    out.write_bytes(
        content[:end]
        if how == 0
        else content[:start] + content[end:]
        if how == 1
        else content + content[start:end]
    )


def _header(source, out, random):
    """Entries of a safetensors header, its lengths and offsets."""
    content = source.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(random.randint(1, 3)):
        name = random.choice(sorted(header))
        entry = header[name]
        if random.random() < 0.3 or not isinstance(entry, dict) or not entry:
            header[random.choice((name, "", "x" * 300, "\x1b[2J", "a\0b"))] = random.choice((*JSON, entry))
        else:
            entry[random.choice(sorted(entry))] = random.choice((*JSON, "F64", [2**40, 2**40], [0, 0]))
    text = json.dumps(header).encode()
    claimed = random.choice((len(text), len(text), len(text), 0, 2**40, 2**63))
    out.write_bytes(struct.pack("<Q", claimed) + text + content[8 + length :])


def _metadata(source, out, random):
    """One place of a plan or of the arguments, a coupling, a name."""
    metadata = metadata_of(source)
    key = random.choice(sorted(metadata))
    try:
        content = json.loads(metadata[key])
        assert isinstance(content, dict)
    except (ValueError, AssertionError):
        metadata[key] = str(random.choice(JSON)).replace("\0", "0")
    else:
        for _ in range(random.randint(1, 3)):
            _replace(content, random)
        metadata[key] = json.dumps(content)
    save_file(load_file(source), out, metadata)


def _replace(content, random):
    holder = content
    while True:
        at = random.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[at], dict | list) and holder[at] and random.random() < 0.8:
            holder = holder[at]
            continue
        how = random.random()
        if how < 0.7:
            holder[at] = random.choice(JSON)
        elif isinstance(holder, dict):
            holder[random.choice(("", "x", at + "s"))] = holder.pop(at)
        else:
            holder += holder[: random.randint(0, 3)]
        return


def _container(source, out, random):
    """A state dict with something in it that none has."""
    loaded = torch.load(source, weights_only=True)
    state = dict(loaded["state_dict"])
    name = random.choice(sorted(state))
    tensor = state[name]
    odd = random.choice(
        (
            *JSON[:-8],
            tensor.to_sparse(),
            tensor.to("meta"),
            tensor.to(torch.complex64),
            tensor.flatten()[:1].expand(10**9),
            tensor.to(torch.float8_e4m3fn),
            torch.empty(0),
            {name: tensor},
            [tensor],
        )
    )
    state[random.choice((name, "", 3, "x" * 300, "module.", "\x1b[2J"))] = odd
    content = random.choice(
        (state, {"state_dict": state}, {"model": {"ema": state}}, [state], {"state_dict": [state]})
    )
    if random.random() < 0.1:
        content = dict(content) if isinstance(content, dict) else {"state_dict": {}}
        content["state_dict"] = content
    torch.save(content, out, _use_new_zipfile_serialization="zip" in source.name)
