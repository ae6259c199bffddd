import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import downloads
import files

ROOT = Path(__file__).parent.parent
SAMPLE = Path(__file__).parent / "sample.npz"  # the first 320 training and 80 test images


def use_sample(data_dir: Path) -> None:
    """Makes the carried sample pass for CIFAR-10 in this process, cached in `data_dir`."""
    with np.load(SAMPLE) as arrays:
        sample = dict(arrays)
    downloads.SHA256 = {name: files.sha256(array.tobytes()) for name, array in sample.items()}
    data_dir.mkdir(parents=True, exist_ok=True)
    np.savez(data_dir / "cifar10.npz", **sample)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working folder whose `data/` holds the sample."""
    monkeypatch.setattr(downloads, "SHA256", downloads.SHA256)  # restored afterwards
    monkeypatch.chdir(tmp_path)
    use_sample(tmp_path / "data")
    return tmp_path


@pytest.fixture
def sample():
    with np.load(SAMPLE) as arrays:
        return dict(arrays)


# Starts a script in a process of its own, as a user would, but on the sample; `before` is Python
# that runs first, to inject a fault.
LAUNCH = """
import sys; from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import conftest; conftest.use_sample(Path("data"))
{before}
import {script}; sys.exit({script}.main(sys.argv[1:]))
"""


def run_python(code: str, cwd: Path) -> str:
    """Runs Python in a process of its own on the sample; returns what it printed last."""
    launch = LAUNCH.split("{before}")[0] + "{before}"
    code = launch.format(root=str(ROOT), tests=str(ROOT / "tests"), before=code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def start(script: str, *arguments: str, cwd: Path, before: str = "") -> subprocess.Popen:
    code = LAUNCH.format(root=str(ROOT), tests=str(ROOT / "tests"), before=before, script=script)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
