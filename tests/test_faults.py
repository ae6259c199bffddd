"""A reduced set of the torture in `benchmarks/`, and the cases that deserve a name."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import SMALL, outcome, run_python, start

from benchmarks import faults
from storage import checkpoint, files

LONG = (*SMALL, "--epochs", "200")


def test_a_killed_training_ends_in_the_same_bits(workplace):
    # In a process of its own: forking one whose OpenMP threads have run can hang.
    counts = json.loads(
        run_python(
            "import json; from benchmarks import torture\n"
            "print(json.dumps(torture.torture(1, 4, Path('data').resolve(), 1, False)))",
            cwd=workplace,
        )
    )
    assert counts["kills"] >= 2
    assert counts["inside_a_write"] >= 1
    assert counts["differences"] == counts["unreadable"] == counts["lost"] == 0


def test_a_failing_disk_costs_neither_the_run_nor_a_whole_file(workplace):
    counts = faults.inject(workplace / "data", every=29, report=False)
    assert counts["faults"] >= 5
    assert counts["ended_badly"] == counts["broken_files"] == counts["differences"] == 0


@pytest.mark.parametrize(
    ("file", "fails", "code", "words"),
    [
        ("other.resume.pt", (2, 3), 0, "goes on; the state of epoch 2, step 0 is kept"),
        ("other.pt", (1,), 1, "state is kept"),
        ("history.csv", (2,), 0, "training goes on"),  # its last line
        ("test.json", (1,), 1, "state is kept"),
        ("index.html", (2,), 0, "warning: "),
    ],
)
def test_a_full_disk_is_said_and_costs_nothing(run, monkeypatch, file, fails, code, words):
    command = (*SMALL, "--limit", "64", "--epochs", "2", "--run-name")
    assert run(*command, "whole").code == 0
    replace, targets = os.replace, []

    def fail(source, target):
        if Path(target).name == file:
            targets.append(target)
            if len(targets) in fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    done = run(*command, "other")
    assert done.code == code
    assert len(targets) >= fails[-1]
    for text in (words, str(targets[0])):
        assert text in done.out + done.err
    if code:
        assert run(*command, "other", "--resume").code == 0
    assert outcome(".", "other") == outcome(".", "whole")


def test_a_training_ends_well_where_the_file_system_cannot_flush(run, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    assert run(*SMALL, "--limit", "64").code == 0
    assert len(checkpoint.load(Path("checkpoints/custom_cnn.pt"))["classes"]) == 10


def test_second_process_of_a_name_is_refused_with_the_id_of_the_first(refused, workplace):
    first = start(*LONG, cwd=workplace)
    try:
        next(line for line in first.stdout if line.strip().startswith("epoch"))
        error = refused(*LONG)
        assert f"by another process ({first.pid}, perhaps suspended)" in error
        assert "--run-name" in error
    finally:
        first.kill()
        first.communicate()
    with files.locked(workplace / "checkpoints/custom_cnn.lock", wait=False) as obtained:
        assert obtained  # a kill leaves no lock behind


STUCK = """
import time; from storage import checkpoint; save, calls = checkpoint.save_state, []
def stuck(*arguments):
    calls.append(1)
    if len(calls) > 1: print("stuck", flush=True); time.sleep(60)
    save(*arguments)
checkpoint.save_state = stuck
"""


def test_second_ctrl_c_stops_at_once_and_the_last_state_is_good(workplace):
    training = start(*LONG, cwd=workplace, before=STUCK)
    state = workplace / "checkpoints/custom_cnn.resume.pt"
    while not state.exists() and training.poll() is None:
        time.sleep(0.02)
    training.send_signal(signal.SIGINT)
    next(line for line in training.stdout if line == "stuck\n")  # it saves once more
    training.send_signal(signal.SIGINT)
    _, error = training.communicate(timeout=20)
    assert training.returncode == 130, error
    assert "Traceback" not in error
    assert "a state saved before is untouched; continue with" in error
    assert checkpoint.load_state(state)[0]["epoch"] == 1
