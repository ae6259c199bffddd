"""A reduced set of the torture in `benchmarks/`, and the cases that deserve a name."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python, start
from PIL import Image
from test_training import SMALL, rows

import checkpoint
import cli
import downloads
import evaluate
import files
import finetune
import pictures
import train_custom
from benchmarks import faults, fuzz, mutations

RUN = (*SMALL, "--limit", "256", "--epochs", "40")


def test_killed_training_ends_in_the_same_bits(workplace):
    # In a process of its own: forking one whose OpenMP threads have run can hang.
    counts = json.loads(
        run_python(
            "import json; from benchmarks import torture\n"
            "print(json.dumps(torture.torture(1, 5, Path('data').resolve(), 1, False)))",
            cwd=workplace,
        )
    )
    assert counts["kills"] >= 3
    assert counts["inside_a_write"] >= 1
    assert counts["differences"] == counts["unreadable"] == counts["lost"] == 0


def test_a_failing_disk_costs_neither_the_run_nor_a_whole_file(workplace):
    counts = faults.inject(workplace / "data", every=29, report=False)
    assert counts["faults"] >= 5
    assert counts["ended_badly"] == counts["broken_files"] == counts["differences"] == 0


@pytest.mark.parametrize(
    ("file", "number", "code", "words"),
    [
        ("other.resume.pt", 1, 0, "training goes on"),
        ("other.pt", 1, 1, "state is kept"),
        ("history.csv", 3, 0, "training goes on"),  # its last line
    ],
)
def test_a_full_disk_is_said_and_costs_nothing(
    workplace, capsys, monkeypatch, file, number, code, words
):
    arguments = [*SMALL, "--epochs", "2", "--run-name"]
    assert train_custom.main([*arguments, "whole"]) == 0
    replace, targets = os.replace, []

    def fail_once(source, target):
        if Path(target).name == file:
            targets.append(target)
            if len(targets) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    capsys.readouterr()
    assert train_custom.main([*arguments, "other"]) == code
    printed = "".join(capsys.readouterr())
    assert words in printed
    assert str(targets[0]) in printed
    if code:
        assert train_custom.main([*arguments, "other", "--resume"]) == 0
    one, other = (
        checkpoint.load(workplace / f"checkpoints/{name}.pt") for name in ("whole", "other")
    )
    assert checkpoint.digest(dict(one["state_dict"])) == checkpoint.digest(
        dict(other["state_dict"])
    )
    one, other = (rows(workplace / f"results/{name}/history.csv") for name in ("whole", "other"))
    assert one == other


def test_two_processes_that_write_the_table_of_results_leave_it_whole(workplace):
    for name in ("a", "b"):
        for file, content in (("config", {"arch": name}), ("test", {"top1": 0.5})):
            files.write_json(workplace / f"results/{name}/{file}.json", content)
    code = (
        "import sys, reports; from pathlib import Path\n"
        "for _ in range(50): reports.write_results_readme(Path('results'))"
    )
    command = [sys.executable, "-c", code]
    writers = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)
    ]
    path, whole = workplace / "results/README.md", set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            whole.add(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(whole) == 1
    assert whole.pop().count("| [") == 2


def test_damaged_and_hostile_files_give_clear_errors(monkeypatch):
    monkeypatch.setattr(downloads, "SHA256", downloads.SHA256)
    monkeypatch.setattr(downloads, "BATCH_SIZE", downloads.BATCH_SIZE)
    results = fuzz.fuzz(count=40, seed=7)
    for kind, outcomes in results.items():
        assert set(outcomes) <= {"clear error", "correct"}, (kind, outcomes)
        assert outcomes["clear error"] >= 5, kind


@pytest.mark.parametrize("damage", ["truncated", "flipped", "zeroed"])
def test_damaged_newest_state_is_reported_and_the_one_before_it_used(tmp_path, damage):
    path = tmp_path / "r.resume.pt"
    for step in (1, 2):
        state = dict.fromkeys(checkpoint.STATE) | {"step": step, "model": torch.arange(1000.0)}
        checkpoint.save_state(path, state)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
    else:
        content[:] = bytes(len(content))
    path.write_bytes(content)
    state, problems = checkpoint.load_state(path)
    assert state["step"] == 1
    assert len(problems) == 1
    assert "r.resume.pt" in problems[0]
    # The damaged file has been replaced: a save that fails now leaves a good one.
    assert checkpoint.load_state(path)[0]["step"] == 1


def test_second_process_of_a_name_is_refused_while_the_first_lives(workplace, capsys):
    first = start("train_custom", *RUN, cwd=workplace)
    try:
        for line in first.stdout:
            if line.strip().startswith("epoch"):
                break
        assert train_custom.main(list(RUN)) == 2
        assert "by another process" in capsys.readouterr().err
    finally:
        first.kill()
        first.communicate()
    with files.locked(workplace / "checkpoints/custom_cnn.lock", wait=False) as obtained:
        assert obtained  # a kill leaves no lock behind


def test_second_ctrl_c_stops_at_once_and_the_last_state_is_good(workplace):
    stuck = (
        "import checkpoint, time; save = checkpoint.save_state; calls = []\n"
        "checkpoint.save_state = lambda *a: (calls.append(1), len(calls) > 1 and time.sleep(60),"
        " save(*a))"
    )
    run = start("train_custom", *RUN, cwd=workplace, before=stuck)
    state = workplace / "checkpoints/custom_cnn.resume.pt"
    while not state.exists() and run.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, error = run.communicate(timeout=10)
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert checkpoint.load_state(state)[0]["epoch"] == 1


@pytest.mark.parametrize(
    "arguments",
    [("--unfreeze", "last"), ("--unfreeze", "head", "--no-cache")],
    ids=["cache", "plain"],
)
def test_finetuning_with_dropout_resumes_to_the_same_bits(workplace, monkeypatch, arguments):
    common = (
        *(
            "--arch",
            "mobilenet_v3_small",
            "--weights",
            "none",
            "--image-size",
            "32",
            "--limit",
            "96",
        ),
        *("--batch-size", "32", "--epochs", "2", "--precision", "fp32", "--device", "cpu"),
        *("--save-every", "0.0001", *arguments),
    )
    assert finetune.main([*common, "--run-name", "whole"]) == 0
    save, calls = checkpoint.save_state, []

    def save_and_stop(path, content):
        save(path, content)
        calls.append(content["step"])
        if len(calls) == 2:
            raise cli.Stopped(signal.SIGTERM, "--resume")

    monkeypatch.setattr(checkpoint, "save_state", save_and_stop)
    assert finetune.main([*common, "--run-name", "halves"]) == 143
    monkeypatch.setattr(checkpoint, "save_state", save)
    assert calls[-1] > 0  # it stopped within an epoch
    assert finetune.main([*common, "--run-name", "halves", "--resume"]) == 0
    one, other = (
        checkpoint.load(workplace / f"checkpoints/{name}.pt") for name in ("whole", "halves")
    )
    assert checkpoint.digest(dict(one["state_dict"])) == checkpoint.digest(
        dict(other["state_dict"])
    )
    assert one["metrics"] == other["metrics"]


def test_checkpoint_with_code_is_refused_and_not_run(tmp_path, capsys):
    trace, path = tmp_path / "executed", tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "x": mutations.Code(trace)}, path)
    assert evaluate.main([str(path)]) == 2
    message = capsys.readouterr().err
    assert "not a readable checkpoint" in message
    assert "GLOBAL" in message
    assert not trace.exists()


def test_small_checkpoint_that_stands_for_many_bytes_is_refused(tmp_path):
    path, tensor = tmp_path / "many.pt", torch.zeros(1000)
    torch.save({"format": checkpoint.FORMAT, "x": [tensor] * 1000}, path)
    with pytest.raises(ValueError, match="many times"):
        checkpoint.load(path)


def test_compressed_checkpoint_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(mutations.compressed(mutations.saved({"format": checkpoint.FORMAT})))
    with pytest.raises(ValueError, match="compressed"):
        checkpoint.load(path)


def test_picture_of_a_billion_pixels_is_refused(tmp_path):
    path = tmp_path / "big.png"
    path.write_bytes(fuzz.huge_png())
    with pytest.raises(ValueError, match="pixels"):
        pictures.load(path)


def test_write_leaves_the_old_file_when_it_fails_half_way(tmp_path):
    path = tmp_path / "a.bin"
    files.write_atomically(path, b"old")

    def break_off(file):
        file.write(b"new, but")
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, break_off)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_picture_modes_orientation_and_transparency(tmp_path):
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, :30] = 255  # white on the left
    image = Image.fromarray(half)
    for mode in ("RGB", "L", "P", "CMYK", "1", "LA", "RGBA", "I;16"):
        suffix = "tif" if mode in ("CMYK",) else "png"
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        if mode == "I;16":
            Image.fromarray(half[..., 0].astype(np.uint16) * 257).save(path)
        else:
            image.convert(mode).save(path)
        loaded = pictures.load(path)
        assert loaded.shape == (32, 32, 3)
        assert loaded[:, :12].mean() > 245, mode
        assert loaded[:, 20:].mean() < 10, mode
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    turned = pictures.load(tmp_path / "turned.png")
    assert turned[:12].mean() > 245
    assert turned[20:].mean() < 10
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert pictures.load(tmp_path / "clear.png").min() == 255
