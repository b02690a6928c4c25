"""Small files that name large things: refused before anything is unpacked or built."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from revwire import checkpoint
from revwire.checkpoint import limits
from revwire.checkpoint.metadata import parse_json
from revwire.checkpoint.reader import read
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import ARGS, convert, metadata_of, saved_vit, vit
from tests.helpers.memory import STATUS
from tests.helpers.programs import python
from tests.helpers.vits import NAME


@pytest.mark.parametrize("name", ["depth", "num_classes", "img_size", "embed_dim", "mlp_ratio"])
@pytest.mark.parametrize("value", [10**9, -(10**9), 1e308])
def test_an_argument_beyond_what_the_tensors_hold(tmp_path, name, value):
    path = saved_vit(tmp_path / "model.safetensors", model_args=json.dumps({**ARGS, name: value}))
    with pytest.raises(CheckpointError, match=f"model with {name}=.* its tensors have [0-9]+ numbers"):
        convert(path)


def test_arguments_within_each_other_count_too():
    tensors = {"w": torch.ones(8)}
    limits.check_arguments(
        {"layers": [2, 2], "norm": {"eps": 1e-6}, "size": (64, 64), "on": True}, tensors, "f"
    )
    for args in (
        {"layers": [2, 10**9]},
        {"norm": {"groups": 10**9}},
        {"size": ((1, 10**9),)},
        {"x": float("nan")},
    ):
        with pytest.raises(CheckpointError, match="does not fit a model with"):
            limits.check_arguments(args, tensors, "f")


def test_a_model_of_many_more_parts_than_tensors_is_not_built():
    tensors = {"w": torch.ones(4)}
    made = []

    def deep(count):
        made.extend(nn.Linear(1, 1) for _ in range(count))

    with limits.built_within(tensors, "f"):
        deep(100)
    made.clear()
    with (
        pytest.raises(CheckpointError, match="many times larger than the 1 tensors"),
        limits.built_within(tensors, "f"),
    ):
        deep(10**7)
    assert len(made) < 10**5
    deep(10)  # nothing is left to watch


def test_a_model_of_many_more_bytes_than_tensors_is_not_built():
    with (
        pytest.raises(CheckpointError, match="many times larger"),
        limits.built_within({"w": torch.ones(4)}, "f"),
    ):
        nn.Linear(2**20, 2**20, device="meta")
    buffers = nn.Module()
    with pytest.raises(CheckpointError, match="many times larger"), limits.built_within({}, "f"):
        buffers.register_buffer("table", torch.empty(2**40, device="meta"))


def test_other_threads_build_what_they_like():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, limits.built_within({}, "f"):
        pool.submit(nn.Linear, 2**20, 2**20, device="meta").result()


def test_a_zip_that_unpacks_to_gigabytes(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            file.write(b"\x80\x02N.")
            for _ in range(256):
                file.write(bytes(2**20))
        archive.writestr("archive/version", "3\n")
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match=r"would be \d+ unpacked"):
        read(path)


def test_tensors_that_repeat_a_few_numbers(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(1).expand(2**30)}, path)
    with pytest.raises(
        CheckpointError, match="stores 4 bytes of numbers and repeats them over tensors of 4294967296"
    ):
        read(path)
    torch.save({"w": torch.ones(1, 3).expand(5, 3)}, path)  # a few are nobody's bomb
    assert read(path).tensors["w"].sum() == 15


def test_tied_weights_are_no_bomb(tmp_path):
    path, table = tmp_path / "tied.pth", torch.randn(2048, 4096)
    torch.save({f"head{i}": table for i in range(4)}, path)
    assert len(read(path).tensors) == 4


def test_a_state_dict_that_holds_itself(tmp_path):
    own: dict = {}
    own["state_dict"] = own
    torch.save(own, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match="is no state dict"):
        read(tmp_path / "own.pth")


@pytest.mark.parametrize(
    "odd",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to_sparse_csr(),
        lambda t: t.to("meta"),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "meta", "nested", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_kinds_that_no_state_dict_has(tmp_path, odd):
    torch.save({"w": odd(torch.eye(4)), "b": torch.ones(4)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth"):
        read(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested more than"),
        ('{"a": 1' + "0" * 400 + "}", "bits; at most 63"),
        ('{"a": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"a": {"b": [1e999]}}', "not finite"),
        ('{"a": NaN}', "not finite"),
        ('{"a": "' + "x" * limits.JSON_CHARACTERS + '"}', "characters long"),
        ("[]", "not an object"),
    ],
)
def test_json_that_code_would_choke_on(text, words):
    with pytest.raises(CheckpointError, match=words):
        parse_json(text, "the metadata")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def rewired(tmp_path_factory):
    import revwire

    path = tmp_path_factory.mktemp("rewired") / "model.safetensors"
    checkpoint.save(revwire.rewire(vit()), path, arch=NAME, model_args=ARGS)
    return path


@given(
    key=st.sampled_from(["revwire.plan", "revwire.coupling", "architecture", "model_args"]), data=st.data()
)
def test_metadata_with_anything_in_any_place(rewired, tmp_path_factory, key, data):
    """One leaf, branch or text of the metadata is another: an error of ours, or a model."""
    metadata = metadata_of(rewired)
    if key in {"revwire.plan", "model_args"}:
        content = json.loads(metadata[key])
        place, holder = [], content
        while isinstance(holder, dict | list) and holder:
            at = data.draw(
                st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
            )
            place.append((holder, at))
            if data.draw(st.booleans()):
                break
            holder = holder[at]
        owner, at = place[-1]
        owner[at] = data.draw(json_values)
        metadata[key] = json.dumps(content)
    else:
        metadata[key] = data.draw(st.text(max_size=30))
    path = tmp_path_factory.mktemp("odd") / "model.safetensors"
    save_file(load_file(rewired), path, metadata)
    try:
        model = checkpoint.load(path)
    except CheckpointError:
        return
    # without `img_size` it is of its library's own size, and its positions are resampled to that
    model(torch.randn(2, 3, *model.patch_embed.img_size)).sum().backward()


PEAK = """
import sys
from revwire import checkpoint
from revwire.errors import CheckpointError
from tests.helpers.memory import peak_mib
try:
    checkpoint.load(sys.argv[1])
except CheckpointError as error:
    print(peak_mib(), error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_a_depth_of_a_billion_costs_no_memory(rewired, tmp_path):
    metadata = metadata_of(rewired)
    path = tmp_path / "deep.safetensors"
    for depth in (10**9, 60_000):
        args = {**json.loads(metadata["model_args"]), "depth": depth}
        save_file(load_file(rewired), path, {**metadata, "model_args": json.dumps(args)})
        done = python("-c", PEAK, path, timeout=120)
        assert done.returncode == 0, done.stderr
        peak, _, words = done.stdout.partition(" ")
        assert int(peak) < 1500
        assert "does not fit" in words


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("place", ["file", "index", "shard", "config"])
def test_a_pipe_is_not_waited_for(tmp_path, place):
    state = timm.create_model("test_vit", num_classes=2).state_dict()
    names = {"file": "model.safetensors", "index": "model.safetensors.index.json", "config": "config.json"}
    pipe = tmp_path / names.get(place, "part.safetensors")
    os.mkfifo(pipe)
    path = pipe
    if place == "config":
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    elif place == "shard":
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": dict.fromkeys(state, pipe.name)}))
    with pytest.raises(
        CheckpointError, match="it is a pipe; a checkpoint in a pipe is read from standard input"
    ):
        convert(path)


def test_a_device_is_no_checkpoint():
    if not Path("/dev/zero").exists():
        pytest.skip("no devices here")
    with pytest.raises(CheckpointError, match="it is a device"):
        read("/dev/zero")


def test_a_shard_of_no_name(tmp_path):
    for name in ("", ".", "..", "a\0b"):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="not followed"):
            read(index)


@pytest.mark.slow
def test_a_checkpoint_through_standard_input(tmp_path):
    path, out = saved_vit(tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    call = [sys.executable, "-m", "revwire", "convert", "-", "--no-verify"]
    done = subprocess.run([*call, "-o", out], input=path.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {path.name, out.name}
    assert checkpoint.load(out)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    done = subprocess.run(call, input=path.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 1
    assert b"name one (-o FILE)" in done.stderr
