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
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
from errors import UnusableInput
from storage import checkpoint, files
from storage.run_files import RunFiles

ROOT = Path(files.__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "custom_cnn-modern.pt"


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


@pytest.mark.parametrize("number", [*files.UNSUPPORTED, errno.EIO])
def test_a_file_system_that_cannot_flush_is_no_obstacle_but_a_failing_disk_is(
    tmp_path, monkeypatch, number
):
    path = tmp_path / "a"
    files.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", fail_with(number))
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            files.write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
    else:
        files.write_atomically(path, b"new")
        assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_read_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", fail_with(errno.EACCES))  # as on Windows
    files.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_lock_excludes_others_and_names_its_holder(tmp_path):
    path = tmp_path / "name.lock"
    with files.locked(path, wait=False) as first:
        assert first
        with files.locked(path, wait=False) as second:
            assert not second
        with files.locked(path, wait=False) as third:
            assert not third  # the one refused has not let others in
        assert files.holder(path) == str(os.getpid())
    with pytest.raises(ValueError, match="failed"), files.locked(path, wait=False):
        raise ValueError("a start that failed")
    with files.locked(path, wait=False) as again:
        assert again
    if os.name != "nt":
        assert names_in(tmp_path) == []


def test_lock_files_that_come_and_go_never_let_two_in(tmp_path):
    inside = []
    most = []

    def enter():
        for _ in range(20):
            with files.locked(tmp_path / "a.lock", wait=True) as obtained:
                assert obtained
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 60


@pytest.mark.parametrize("wait", [False, True])
def test_a_killed_process_leaves_no_lock(tmp_path, wait):
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
        if wait:
            threading.Timer(0.3, other.send_signal, [signal.SIGKILL]).start()
        else:
            other.send_signal(signal.SIGKILL)
            other.wait()
        with files.locked(path, wait=wait) as obtained:
            assert obtained
            assert files.holder(path) == str(os.getpid())


def test_a_persons_file_where_a_lock_goes_is_kept_and_a_killed_runs_is_not(tmp_path):
    run = RunFiles("bike", tmp_path, tmp_path / "results")
    path = tmp_path / "bike.lock"
    path.write_text("combination: left, right\n")
    with pytest.raises(UnusableInput, match=r"bike.lock: is no lock of a run"), run.held():
        pass
    assert path.read_text() == "combination: left, right\n"
    for left in ("", "4194999"):  # a kill before or after the process's id was written
        path.write_text(left)
        with run.held():
            assert files.holder(path) == str(os.getpid())
        assert not path.exists()


@pytest.mark.parametrize("number", files.UNSUPPORTED)
def test_a_file_system_without_locks_costs_one_warning(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")
    files._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    for name in ("a.lock", "b.lock"):
        with files.locked(tmp_path / name, wait=False) as obtained:
            assert obtained
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "do not start a run of the same name twice" in told


def test_telling_on_a_closed_terminal_ends_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        files.tell("nobody hears")


def test_the_network_that_comes_with_the_clone_loads_to_the_bit():
    network, content = checkpoint.load_checkpoint(CHECKPOINT)
    expected = torch.load(CHECKPOINT, weights_only=True)
    state = network.state_dict()
    assert state.keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        assert torch.equal(state[name], value.to(state[name].dtype))  # half as many bits there
    assert not network.training
    assert len(content["classes"]) == 10
    assert "state_dict" not in content
    assert checkpoint.is_checkpoint(CHECKPOINT)


def test_a_loaded_model_classifies_pictures_as_they_are():
    model = checkpoint.load_model(str(CHECKPOINT))
    network, content = checkpoint.load_checkpoint(CHECKPOINT)
    paths = sorted((ROOT / "tests" / "samples").glob("*.png"))
    pictures = [Image.open(path).convert("RGB").resize((model.side, model.side)) for path in paths]
    images = torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))
    stats = data.ChannelStats(tuple(content["mean"]), tuple(content["std"]))
    with torch.inference_mode():
        logits = model(images)
        expected = network(next(data.inputs(images, stats, model.side)))
    assert torch.equal(logits, expected)
    names = [model.classes[label] for label in logits.argmax(1)]
    right = [name in path.name for name, path in zip(names, paths, strict=True)]
    assert sum(right) > len(paths) / 2


@pytest.fixture
def content():
    """A finished checkpoint of a small network."""
    arguments = {"widths": (8, 8, 8, 8, 8, 8), "hidden": (8, 8)}
    return {
        "name": "it",
        "arch": "custom_cnn",
        "surgery": arguments,
        "classes": ["cat", "dog", "\x1b[31mred\n"],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "image_size": 48,
        "config": {"limit": None},
        "metrics": {"temperature": None},
        "environment": {},
        "state_dict": checkpoint.create_model("custom_cnn", arguments, 3).state_dict(),
    }


def test_a_checkpoint_that_is_saved_opens_with_its_classes_and_size(tmp_path, content):
    path = tmp_path / "it.pt"
    checkpoint.save(path, content)
    model = checkpoint.load_model(path)
    assert model.classes == content["classes"]
    assert model.side == 48
    assert not any(module.training for module in model.modules())
    assert model(torch.zeros(2, 30, 30, 3, dtype=torch.uint8)).shape == (2, 3)


@pytest.mark.parametrize("key", checkpoint.FINISHED)
def test_a_checkpoint_that_lacks_something_is_refused_by_name(tmp_path, content, key):
    del content[key]
    checkpoint.save(tmp_path / "it.pt", content)
    with pytest.raises(UnusableInput, match=rf"it\.pt is no whole checkpoint: it lacks '{key}'"):
        checkpoint.load_model(tmp_path / "it.pt")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"arch": "resnet9"}, "architecture 'resnet9' is unknown"),
        ({"surgery": {"depth": 3}}, "do not fit architecture custom_cnn"),
        ({"classes": ["a", "b"]}, "weights do not fit its network (size mismatch"),
        ({"state_dict": {"\x1b[2J": torch.ones(1)}}, r"\x1b[2J"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_with_what_does_not_fit(
    tmp_path, content, change, found
):
    checkpoint.save(tmp_path / "it.pt", content | change)
    with pytest.raises(UnusableInput) as caught:
        checkpoint.load_model(tmp_path / "it.pt")
    assert found in str(caught.value)
    assert str(caught.value).isprintable()


class Code:
    """Unpickled, it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def torchscript():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises another way to export
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), file)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}
NOT_OURS = {
    "module": (saved(nn.Linear(1, 1)), "a pickled torch.nn.modules.linear.Linear"),
    "old module": (saved(nn.Linear(1, 1), **OLD), "a pickled torch.nn.modules.linear.Linear"),
    "namespace": (saved({"args": argparse.Namespace(lr=1)}), "a pickled argparse.Namespace"),
    "numpy scalar": (saved({"accuracy": np.float64(0.9)}), "multiarray.scalar"),
    "torchscript": (torchscript(), "a TorchScript archive"),
    "state dict": (saved(nn.Linear(1, 1).state_dict()), "a state dict alone"),
    "list": (saved([1, 2]), "holds a list"),
    "other": (saved({"epoch": 1}), "its format is None, not 'cifar10-pytorch/1'"),
    "newer": (saved({"format": "cifar10-pytorch/2"}), "its format is 'cifar10-pytorch/2'"),
    "unfinished": (
        saved({"format": checkpoint.FORMAT} | dict.fromkeys(checkpoint.STATE)),
        "the state of an unfinished run: finish it with --resume",
    ),
    "text": (b"<html>", "no file that torch.save wrote"),
    "empty": (b"", "no file that torch.save wrote"),
    "cut": (saved({"x": torch.ones(999)})[:-200], "it is damaged (File is not a zip file)"),
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
    for path, reason in ((tmp_path / "a\n.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UnusableInput, match=f"{reason}.*give .*train_custom.py") as caught:
            checkpoint.load_model(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("pickled", [saved, pickle.dumps, lambda code: saved(code, **OLD)])
def test_code_in_a_checkpoint_is_not_run(tmp_path, pickled):
    path = tmp_path / "evil.pt"
    path.write_bytes(pickled(Code(tmp_path / "trace")))
    with pytest.raises(UnusableInput):
        checkpoint.load_model(path)
    assert not (tmp_path / "trace").exists()


def test_a_flipped_bit_is_found_or_does_not_reach_what_is_read(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"weight": torch.arange(40.0), "classes": ["cat", "dog"]})
    content = path.read_bytes()
    found = 0
    for position in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            read = checkpoint.load(path)
        except files.Unreadable:
            found += 1
        else:
            assert read["classes"] == ["cat", "dog"]
            assert torch.equal(read["weight"], torch.arange(40.0))
    assert found > 100  # the others are padding, or said twice


def a_state(step):
    return dict.fromkeys(checkpoint.STATE) | {"step": step, "model": torch.arange(1000.0) + step}


def save_states(path):
    for step in (1, 2):
        checkpoint.save_state(path, a_state(step))


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
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "zeroed":
        path.write_bytes(bytes(len(content)))
    elif damage == "missing":
        path.unlink()
    else:
        checkpoint.save(path, {"step": 2})
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
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
def test_a_shortage_while_resuming_does_not_take_the_older_state(
    tmp_path, monkeypatch, error, kind
):
    path = tmp_path / "r.resume.pt"
    save_states(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        for load in (checkpoint.load_state, checkpoint.load):
            with pytest.raises(kind):
                load(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert checkpoint.load_state(path)[0]["step"] == 2


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
