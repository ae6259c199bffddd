"""The examples run as README says: one from the repository, one from a folder of its own."""

import re
import runpy
import shutil
import subprocess
import sys

from conftest import PIPED, ROOT


def test_the_whole_training_on_one_page_runs(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minimal.py", "--limit", "100", "--epochs", "2"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(ROOT / "examples/minimal.py"))
    *epochs, test = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    assert re.fullmatch(r"test accuracy \d+\.\d\d%", test)


def test_engine_and_data_lifted_into_an_empty_folder_learn_from_arrays(tmp_path):
    for name in ("engine.py", "data.py", "examples/lifted.py"):
        shutil.copy(ROOT / name, tmp_path)
    words = [sys.executable, "-W", "error", "lifted.py"]
    done = subprocess.run(words, cwd=tmp_path, **PIPED, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"test accuracy (\d+)%", done.stdout)[1]) > 90, done.stdout
