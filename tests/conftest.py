import csv
import hashlib
import importlib
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import data
from reports import evaluation
from sources import cifar10
from storage import checkpoint
from storage.files import sha256

ROOT = Path(__file__).parent.parent
SAMPLE = Path(__file__).parent / "sample.npz"  # the first 320 training and 80 test images
PICTURES = {name: getattr(evaluation, name) for name in ("draw", "draw_batch")}

# Beside another load several threads only wait for each other.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)

CPU = ("--batch-size", "32", "--epochs", "1", "--precision", "fp32", "--device", "cpu")
SMALL = ("train_custom", "--recipe", "classic", *CPU)  # the quickest run; its name is custom_cnn


def use_sample(data_dir: Path) -> None:
    """Makes the carried sample pass for CIFAR-10 in this process, cached in `data_dir`."""
    with np.load(SAMPLE) as arrays:
        sample = {name: arrays[name] for name in cifar10.SHA256}
    cifar10.SHA256 = {name: sha256(array.tobytes()) for name, array in sample.items()}
    data_dir.mkdir(parents=True, exist_ok=True)
    np.savez(data_dir / "cifar10.npz", **sample)


@pytest.fixture
def sample():
    with np.load(SAMPLE) as arrays:
        return dict(arrays)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working folder whose `data/` holds the sample; runs there draw no pictures."""
    monkeypatch.setattr(cifar10, "SHA256", cifar10.SHA256)  # restored afterwards
    for name in PICTURES:  # they would take most of the time
        monkeypatch.setattr(evaluation, name, lambda *_: None)
    monkeypatch.chdir(tmp_path)
    use_sample(tmp_path / "data")
    return tmp_path


@pytest.fixture
def drawing(workplace, monkeypatch):
    """As `workplace`, with pictures."""
    for name, function in PICTURES.items():
        monkeypatch.setattr(evaluation, name, function)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(workplace, capsys):
    """A function that runs a script in this process, on the sample: `run("evaluate", "a.pt")`."""

    def run(script: str, *arguments: str) -> Done:
        capsys.readouterr()
        code = importlib.import_module(script).main([*map(str, arguments)])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(run):
    """A function that runs a script whose input is unusable and returns the line that says so."""

    def refused(*command: str) -> str:
        done = run(*command)
        assert (done.code, done.err.count("\n")) == (2, 1), done
        return done.err

    return refused


@pytest.fixture
def signal_at(monkeypatch):
    """A function that makes this process send itself a signal at a step from now on.

    Steps count from 1, over all trainings; a run that is not resumed makes one more, to choose its
    precision. Batches that BatchNorm's statistics alone are measured on are no steps.
    """
    epoch = data.TrainBatches.epoch

    def arrange(step: int, number: int) -> None:
        steps = count(1)

        def counted(self, *arguments):
            for batch in epoch(self, *arguments):
                if torch.is_grad_enabled() and next(steps) == step:
                    os.kill(os.getpid(), number)
                yield batch

        monkeypatch.setattr(data.TrainBatches, "epoch", counted)

    return arrange


# Runs a script, or Python alone, in a process of its own on the sample; `before` is Python that
# runs first, to inject a fault.
LAUNCH = """
import sys; from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import conftest; conftest.use_sample(Path("data"))
vars(conftest.evaluation).update(dict.fromkeys(conftest.PICTURES, lambda *_: None))
{before}
import {script}; sys.exit({script}.main(sys.argv[1:]))
"""
PIPED = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


# Warnings are errors; older torch leaves a temporary folder of its own to be removed at the end.
WARNINGS = ("-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning")


def command(script: str, *arguments: str, before: str = "") -> list[str]:
    tests = str(ROOT / "tests")
    code = LAUNCH.format(root=str(ROOT), tests=tests, before=before, script=script)
    return [sys.executable, *WARNINGS, "-c", code, *arguments]


def run_python(code: str, cwd: Path) -> str:
    """Runs Python in a process of its own on the sample; returns what it printed last."""
    words = command("train_custom", before=code + "\nsys.exit()")
    done = subprocess.run(words, cwd=cwd, **PIPED, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def start(script: str, *arguments: str, cwd: Path, before: str = "") -> subprocess.Popen:
    return subprocess.Popen(command(script, *arguments, before=before), cwd=cwd, **PIPED)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """The history of a run without the columns that depend on the machine's mood."""
    with open(run_dir / "history.csv", newline="") as file:
        timings = "images_per_second", "seconds"
        return [{k: v for k, v in row.items() if k not in timings} for row in csv.DictReader(file)]


def digest(content: Any) -> str:
    """One hash over nested dicts and lists of tensors and plain values."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, entry in value.items():
                add(key)
                add(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)
        else:
            sha.update(repr(value).encode())

    add(content)
    return sha.hexdigest()


def outcome(folder: Path | str, name: str = "custom_cnn") -> tuple:
    """What must not depend on how often a run was interrupted: weights, numbers, history."""
    content = checkpoint.load(Path(folder, f"checkpoints/{name}.pt"))
    weights = digest(dict(content["state_dict"]))
    return weights, content["metrics"], rows(Path(folder, "results", name))
