"""Writing large checkpoints, and the disk in the way: little memory, whole files or none, one line that says why."""

import errno
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import revwire
from revwire.checkpoint import disk, writer
from revwire.errors import CheckpointError
from tests.helpers.memory import STATUS
from tests.helpers.programs import python, started

MIB = 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four hundred MiB in tensors of eight."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_file({f"t{i}": torch.full((2 * MIB,), float(i)) for i in range(50)}, path, {"k": "v"})
    return path


COPY = """
import sys
from pathlib import Path
from revwire.checkpoint.reader import read
from revwire.checkpoint.writer import write
from tests.helpers.memory import peak_mib

source, out = read(sys.argv[1]), Path(sys.argv[2])
before = peak_mib()
write(out, source.tensors, source.metadata)
print(peak_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_a_file_is_written_within_little_memory(large, tmp_path):
    out = tmp_path / "out.safetensors"
    done = python("-c", COPY, large, out)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 + 200
    written = load_file(out)
    assert written.keys() == load_file(large).keys()
    assert all(written[f"t{i}"].eq(i).all() for i in range(50))


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_a_large_tensor_alone_is_not_copied(tmp_path):
    path, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.ones(75 * MIB)}, path)
    done = python("-c", COPY, path, out)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 + 50
    assert out.stat().st_size == path.stat().st_size


LIMITED = """
import resource, sys
from pathlib import Path
from revwire.checkpoint.reader import read
from revwire.checkpoint.writer import write
from revwire.errors import CheckpointError

source = read(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
try:
    write(Path(sys.argv[2]), source.tensors, source.metadata)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_refuses_in_the_middle_leaves_nothing(large, tmp_path):
    out = tmp_path / "out.safetensors"
    done = python("-c", LIMITED, large, out)
    assert done.stdout == f"cannot write {out}: File too large\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: resource_like(free=3 * MIB))
    with pytest.raises(CheckpointError, match=r"the disk is full, the file takes 4 MiB and 3 MiB are free"):
        writer.write(tmp_path / "out.safetensors", {"w": torch.ones(MIB)}, {})
    assert list(tmp_path.iterdir()) == []


def resource_like(free):
    return type("Usage", (), {"free": free})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, r"Read-only file system: name another output"),
        (errno.EACCES, r"Permission denied: name another output"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_disk_says_is_one_line(tmp_path, monkeypatch, code, words):
    def refuse(*_, **__):
        raise OSError(code, disk.os.strerror(code))

    monkeypatch.setattr(disk.os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=words) as caught:
        writer.write(tmp_path / "out.safetensors", {"w": torch.ones(3)}, {})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    try:
        (folder / "probe").touch()
    except OSError:
        with pytest.raises(CheckpointError, match="Permission denied: name another output"):
            writer.write(folder / "out.safetensors", {"w": torch.ones(3)}, {})
    else:
        pytest.skip("the superuser writes everywhere")


TERMINATED = """
import os, sys
from revwire.cli.app import main

def slowly(_):
    print("writing", flush=True)
    sys.stdin.read()

os.fsync = slowly
sys.argv[1:] = ["convert", sys.argv[1], "--to", "original"]
main()
"""


@pytest.mark.slow
def test_a_terminated_conversion_leaves_nothing(tmp_path):
    rewired = tmp_path / "model.revwire.safetensors"
    net = timm.create_model("resnet18")
    plan = revwire.plan(net, torch.zeros(1, 3, 64, 64))
    metadata = {"architecture": "resnet18", "revwire.plan": plan.to_json(), "revwire.coupling": plan.coupling}
    save_file(net.state_dict(), rewired, metadata)
    with started("-c", TERMINATED, rewired) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2  # the folder of the file that is not done is there
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        process.stdin.close()
    assert list(tmp_path.iterdir()) == [rewired]


def test_an_older_files_permissions_are_kept(tmp_path):
    out = tmp_path / "out.safetensors"
    writer.write(out, {"w": torch.ones(3)}, {})
    usual = out.stat().st_mode
    out.chmod(0o640)
    writer.write(out, {"w": torch.zeros(3)}, {})
    assert out.stat().st_mode & 0o777 == 0o640
    assert not load_file(out)["w"].any()
    other = tmp_path / "other.safetensors"
    writer.write(other, {"w": torch.ones(3)}, {})
    assert other.stat().st_mode == usual


def test_a_link_goes_on_pointing(tmp_path):
    far, link = tmp_path / "far", tmp_path / "link.safetensors"
    far.mkdir()
    link.symlink_to(far / "real.safetensors")
    writer.write(link, {"w": torch.ones(3)}, {})
    assert link.is_symlink()
    assert load_file(far / "real.safetensors")["w"].all()
    assert [path.name for path in far.iterdir()] == ["real.safetensors"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    disk.write_text(out, "old")
    monkeypatch.setattr(disk.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    with pytest.raises(CheckpointError, match=r"cannot write .*page\.html: no"):
        disk.write_text(out, "new")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
