import argparse
import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from errors import UnusableInput
from storage import checkpoint, files, tensorfile

ROOT = Path(files.__file__).parent.parent


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_write_that_fails_half_way_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "a.bin"
    files.write_atomically(path, b"old")

    def break_off(file):
        file.write(b"new, but")
        fail_with(errno.ENOSPC)()

    with pytest.raises(OSError, match=r"No space left on device: '.*a\.bin'"):
        files.write_atomically(path, break_off)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_written_file_has_ordinary_permissions_where_none_can_be_changed(tmp_path, monkeypatch):
    for function in ("chmod", "fchmod"):
        monkeypatch.setattr(os, function, fail_with(errno.EPERM))
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot open folders")
@pytest.mark.parametrize("number", [*files.UNSUPPORTED, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_obstacle_but_a_failing_disk_is(
    tmp_path, monkeypatch, number
):
    fsync, path = os.fsync, tmp_path / "a"

    def sync_files_alone(descriptor):
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            fail_with(number)()
        fsync(descriptor)

    if number == errno.EACCES:  # a folder that may be written and not read
        monkeypatch.setattr(os, "open", fail_with(number))
    monkeypatch.setattr(os, "fsync", sync_files_alone)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            files.write_atomically(path, b"new")
    else:
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_lock_excludes_others_names_its_holder_and_leaves_no_file(tmp_path):
    path = tmp_path / "name.lock"
    with files.locked(path, wait=False) as first:
        assert first
        assert files.holder(path) == str(os.getpid())
        with files.locked(path, wait=False) as second:
            assert not second
        assert path.exists()  # the one refused has not removed it
    with pytest.raises(ValueError, match="failed"), files.locked(path, wait=False):
        raise ValueError("a start that failed")
    if os.name != "nt":
        assert names_in(tmp_path) == []
        assert files.holder(path) == ""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / "name.lock"
    code = f"""
import sys, time; from pathlib import Path
from storage.files import locked
with locked(Path({str(path)!r}), wait=False): print("held", flush=True); time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    with other:
        other.stdout.readline()
        with files.locked(path, wait=False) as obtained:
            assert not obtained
        assert files.holder(path) == str(other.pid)
        other.send_signal(signal.SIGKILL)
        other.wait()
    with files.locked(path, wait=False) as obtained:
        assert obtained
        assert files.holder(path) == str(os.getpid())


def test_lock_files_that_come_and_go_never_let_two_in(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # as often as possible
    inside, most, entered = [], [], []

    def enter():
        for _ in range(40):
            with files.locked(tmp_path / "a.lock", wait=True) as obtained:
                assert obtained
                inside.append(1)
                most.append(len(inside))
                os.sched_yield() if hasattr(os, "sched_yield") else None
                inside.pop()
                entered.append(1)

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 120
    assert max(most) == 1


@pytest.mark.skipif(files.fcntl is None, reason="flock")
@pytest.mark.parametrize("number", files.UNSUPPORTED)
def test_a_file_system_without_locks_costs_one_warning(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(files, "_unlocked", [])
    monkeypatch.setattr(files.fcntl, "flock", fail_with(number))
    for name in ("a.lock", "b.lock"):
        with files.locked(tmp_path / name, wait=False) as obtained:
            assert obtained
    told = capsys.readouterr().err
    assert told.count("\n") == told.count("cannot lock") == 1
    assert "a.lock" in told
    assert "do not start a run of the same name twice" in told
    assert names_in(tmp_path) == []


def test_telling_on_a_closed_terminal_ends_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        files.tell("nobody hears")


CLASSES = ["cat", "dog", "\x1b[31mred\n"]


class Tiny(nn.Module):
    """Stands in for a network of the table; remembers what it was shown."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer, self.shown = nn.Linear(3, num_classes), []

    def forward(self, x):
        self.shown.append(tuple(x.shape))
        return self.layer(x.mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch):
    """Content of a finished checkpoint, whose network is a small stand-in."""
    monkeypatch.setattr(
        checkpoint, "create_model", lambda arch, surgery, num_classes: Tiny(num_classes)
    )
    return {
        **{"name": "it", "arch": "tiny", "surgery": {}, "classes": CLASSES},
        **{"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 48},
        **{"config": {"limit": None}, "metrics": {"temperature": None}, "environment": {}},
        "state_dict": Tiny(3).state_dict(),
    }


def test_the_network_that_comes_with_the_clone_loads_to_the_bit(tmp_path):
    path = next((ROOT / "checkpoints").glob("*.pt"))
    model, content = checkpoint.load_model(path)
    whole = torch.load(path, weights_only=True)
    assert len(content["classes"]) == 10
    assert "num_classes" not in content["surgery"]  # the class names say it
    state = model.state_dict()
    assert state.keys() == whole["state_dict"].keys()
    assert all(torch.equal(state[key], value) for key, value in whole["state_dict"].items())
    assert not model.training
    assert checkpoint.is_checkpoint(path)
    del whole["sha256"]
    checkpoint.save(tmp_path / "again.pt", whole)
    assert checkpoint.load(tmp_path / "again.pt").keys() == whole.keys()


def test_a_checkpoint_of_other_classes_and_image_size_is_rebuilt_and_run_once(tmp_path, tiny):
    path = tmp_path / "it.pt"
    checkpoint.save(path, tiny)
    model, content = checkpoint.load_model(path)
    assert content["classes"] == CLASSES
    assert "state_dict" not in content
    assert model.shown == [(1, 3, 48, 48)]
    del tiny["image_size"]
    checkpoint.save(path, tiny)
    assert checkpoint.load_model(path)[0].shown == [(1, 3, 32, 32)]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"classes": ["only"]}, "'classes' is missing or odd"),
        ({"classes": ["c"] * 1001}, "'classes' is missing or odd"),
        ({"classes": ["a", 2, "c"]}, "'classes' is missing or odd"),
        ({"classes": ["a", "b", "c", "d"]}, "shape (4, 3)"),
        ({"std": [0.2, 0.0, 0.2]}, "'std'"),
        ({"mean": [float("nan")] * 3}, "'mean'"),
        ({"name": "../it"}, "'name'"),
        ({"image_size": 10**6}, "'image_size'"),
        ({"metrics": {"temperature": 0.0}}, "'metrics'"),
        ({"state_dict": {}}, "'layer.weight' is missing"),
        ({"state_dict": Tiny(3).state_dict() | {"\x1b[2J": torch.ones(1)}}, r"'\x1b[2J'"),
        ({"state_dict": {"layer.weight": torch.full((3, 3), float("nan"))}}, "not finite"),
    ],
)
def test_a_checkpoint_with_odd_content_is_refused_by_name(tmp_path, tiny, change, found):
    path = tmp_path / "it.pt"
    checkpoint.save(path, tiny | change)
    with pytest.raises(UnusableInput, match=r"it\.pt is no whole checkpoint") as caught:
        checkpoint.load_model(path)
    assert found in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_state_of_an_unfinished_run_is_no_checkpoint_and_says_so(tmp_path):
    path = tmp_path / "it.resume.pt"
    checkpoint.save_state(path, dict.fromkeys(checkpoint.STATE))
    with pytest.raises(UnusableInput, match="state of an unfinished run: finish it with --resume"):
        checkpoint.load_model(path)


class Code:
    """Unpickled, it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def torchscript():
    """The parts of an archive of torch.jit, which torch itself warns to make."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"net/{name}", b"3\n")
    return file.getvalue()


def unknown_name(name):
    """A file of torch.save that names something with control characters in it."""
    source, file = zipfile.ZipFile(io.BytesIO(saved({}))), io.BytesIO()
    with source, zipfile.ZipFile(file, "w") as archive:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                content = b"\x80\x02c" + name + b"\nNet\n."
            archive.writestr(member.filename, content)
    return file.getvalue()


NOT_OURS = {
    "module": (saved(nn.Linear(1, 1)), "a pickled torch.nn.modules.linear.Linear"),
    "old module": (
        saved(nn.Linear(1, 1), _use_new_zipfile_serialization=False),
        "a pickled torch.nn.modules.linear.Linear",
    ),
    "namespace": (saved({"args": argparse.Namespace(lr=1)}), "a pickled argparse.Namespace"),
    "numpy scalar": (saved({"accuracy": np.float64(0.9)}), "multiarray.scalar"),
    "escapes": (unknown_name(b"\x1b[2Jmine"), r"a pickled \x1b[2Jmine.Net"),
    "torchscript": (torchscript(), "a TorchScript archive"),
    "state dict": (saved(nn.Linear(1, 1).state_dict()), "a state dict alone"),
    "list": (saved([1, 2]), "holds a list"),
    "other": (saved({"epoch": 1}), "its format is None, not 'cifar10-pytorch/1'"),
    "newer": (saved({"format": "cifar10-pytorch/2"}), "its format is 'cifar10-pytorch/2'"),
    "not signed": (saved({"format": checkpoint.FORMAT}), "does not match its own SHA-256"),
    "complex": (saved({"format": checkpoint.FORMAT, "x": 1j}), "more than plain values"),
    "text": (b"<html>", "no file that torch.save wrote"),
    "empty": (b"", "no file that torch.save wrote"),
    "cut": (saved({"x": torch.ones(999)})[:-200], "damaged, or no file that torch.save wrote"),
    "many": (saved({"x": [torch.zeros(1000)] * 1000}), "the same tensor many times"),
}


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_no_checkpoint_is_said_without_the_advice_of_torch(tmp_path, kind):
    content, found = NOT_OURS[kind]
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UnusableInput) as caught:
        checkpoint.load_model(path)
    message = str(caught.value)
    assert found in message
    assert "x.pt" in message
    assert message.endswith("give one that train_custom.py or finetune.py wrote")
    assert message.isprintable()
    assert "PyTorch 2.6" not in message
    assert "weights_only" not in message


def test_a_path_without_a_file_to_read_is_refused(tmp_path):
    for path, reason in ((tmp_path / "a\n.pt", "No such file"), (tmp_path, "it is no file")):
        with pytest.raises(UnusableInput, match=f"{reason}.*give .*train_custom.py") as caught:
            checkpoint.load_model(path)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="fifo")
def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(UnusableInput, match="it is no file"):
        checkpoint.load_model(tmp_path / "x.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "evil.pt"
    for content in (saved({"x": Code(tmp_path / "trace")}), pickle.dumps(Code(tmp_path / "trace"))):
        path.write_bytes(content)
        with pytest.raises(UnusableInput):
            checkpoint.load_model(path)
    assert not (tmp_path / "trace").exists()


def test_a_compressed_checkpoint_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10 << 20))
    with pytest.raises(UnusableInput, match="compressed"):
        checkpoint.load_model(path)


def a_state(step):
    return dict.fromkeys(checkpoint.STATE) | {"step": step, "model": torch.arange(1000.0) + step}


def save_states(path):
    for step in (1, 2):
        checkpoint.save_state(path, a_state(step))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("links", [True, False])
def test_two_whole_states_lie_on_the_disk_after_each_save(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    path = tmp_path / "r.resume.pt"
    save_states(path)
    for step in (3, 4):
        checkpoint.save_state(path, a_state(step))
        assert checkpoint.load(path)["step"] == step
        assert checkpoint.load(files.previous(path))["step"] == step - 1
    checkpoint.remove_state(path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeroed", "missing", "no state"])
def test_a_damaged_newest_state_is_reported_and_the_one_before_it_used(tmp_path, damage):
    path = tmp_path / "r.resume.pt"
    save_states(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
    elif damage == "zeroed":
        content[:] = bytes(len(content))
    if damage == "missing":
        path.unlink()
    elif damage == "no state":
        checkpoint.save(path, {"step": 2})
    else:
        path.write_bytes(content)
    state, problems = checkpoint.load_state(path)
    assert state["step"] == 1
    assert len(problems) == (damage != "missing")
    assert all("r.resume.pt" in problem for problem in problems)
    # The damaged file has been replaced: a save that fails now leaves a good one.
    assert checkpoint.load_state(path)[0]["step"] == 1
    path.write_bytes(b"")
    with pytest.raises(UnusableInput, match="no saved state is whole"):
        checkpoint.load_state(path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("Unable to allocate 4 GiB"), MemoryError),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            MemoryError,
        ),
        (RuntimeError("not enough memory: you tried to allocate 4000 bytes."), MemoryError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
def test_a_shortage_while_resuming_does_not_take_the_older_state(
    tmp_path, monkeypatch, error, kind
):
    path = tmp_path / "r.resume.pt"
    save_states(path)
    before = contents(tmp_path)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        for load in (checkpoint.load_state, checkpoint.load):
            with pytest.raises(kind):
                load(path)
    assert contents(tmp_path) == before
    assert checkpoint.load_state(path)[0]["step"] == 2


def test_a_file_that_asks_for_more_memory_than_it_has_bytes_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(saved({}, _use_new_zipfile_serialization=False))

    def fail(*_, **__):
        torch.empty(10**15)

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match="damaged"):
        tensorfile.read(path)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(("room", "kept"), [(2.5, 3), (1.5, 2)])
def test_on_a_full_disk_the_older_state_gives_way_before_the_newer(
    tmp_path, monkeypatch, links, room, kept
):
    path = tmp_path / "r.resume.pt"
    save_states(path)
    size, write = path.stat().st_size, checkpoint.write_atomically

    def write_in_little_room(target, content):
        inodes = {entry.stat().st_ino: entry.stat().st_size for entry in tmp_path.iterdir()}
        if sum(inodes.values()) + len(content) > room * size:
            fail_with(errno.ENOSPC)()
        write(target, content)

    monkeypatch.setattr(checkpoint, "write_atomically", write_in_little_room)
    if not links:
        monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    if kept == 2:
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_state(path, a_state(3))
    else:
        checkpoint.save_state(path, a_state(3))
    assert checkpoint.load_state(path)[0]["step"] == kept
