"""Lets every write, fsync, replace and open of a training fail in turn, and fills a real disk.

After each fault the run must have ended with an exit code and one line, every file with a final
name must be whole, and repeating the command (with `--resume` where there is a state) must give
exactly the weights of the run without a fault.
"""

import argparse
import builtins
import contextlib
import errno
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import data
import figures
import files
import records
import train_custom
from benchmarks.torture import outcome

ARGUMENTS = (
    *("--recipe", "classic", "--limit", "64", "--batch-size", "32", "--precision", "fp32"),
    *("--device", "cpu", "--epochs", "2", "--run-name", "custom_cnn"),
)
CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)
KINDS = ("write", "fsync", "replace", "mkstemp", "open")


@contextlib.contextmanager
def fault(kind: str, number: int, code: int) -> Iterator[list[int]]:
    """Makes the `number`-th call of a kind fail (0: none); yields a list with the calls so far.

    "write" fails in the middle: half of the bytes reach the disk.
    """
    calls = [0]

    def failing(function: Callable) -> Callable:
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == number:
                raise OSError(code, os.strerror(code))
            return function(*arguments, **options)

        return call

    class HalfFile(io.FileIO):
        def write(self, content):
            calls[0] += 1
            if calls[0] == number:
                super().write(bytes(content)[: len(content) // 2])
                raise OSError(code, os.strerror(code))
            return super().write(content)

    def opened(file, mode="r", *arguments, **options):
        if kind == "write" and mode == "wb":
            return HalfFile(file, "w")
        return real_open(file, mode, *arguments, **options)

    real_open, real_os_open = builtins.open, os.open

    def failing_open(file, mode, *arguments, **options):
        function = real_open if isinstance(mode, str) else real_os_open
        return failing(function)(file, mode, *arguments, **options)

    real = {
        (os, "fsync"): os.fsync,
        (os, "replace"): os.replace,
        (tempfile, "mkstemp"): tempfile.mkstemp,
    }
    try:
        if kind == "write":
            files.open = opened
        elif kind == "open":  # files, locks and the folders that are synced
            files.open = os.open = failing_open
        for (module, name), function in real.items():
            if name == kind:
                setattr(module, name, failing(function))
        yield calls
    finally:
        files.__dict__.pop("open", None)
        os.open = real_os_open
        for (module, name), function in real.items():
            setattr(module, name, function)


def train(data_dir: Path) -> tuple[int, str]:
    """Runs or resumes the training in the working folder; returns exit code and stderr."""
    state = Path("checkpoints/custom_cnn.resume.pt")
    resume = ["--resume"] if state.exists() or checkpoint.previous(state).exists() else []
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = train_custom.main([*ARGUMENTS, *resume, "--data-dir", str(data_dir)])
    return code, error.getvalue()


def broken_files(folder: Path) -> list[str]:
    """Files whose name says that they are whole and whose content is not; and forgotten ones."""
    broken = [str(path) for path in folder.rglob("*.tmp")]
    for path in (*folder.rglob("*.pt"), *folder.rglob("*.pt.previous")):
        try:
            checkpoint.load(path)
        except ValueError:
            broken.append(str(path))
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            broken.append(str(path))
    return broken


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """Works in a fresh folder while the block runs."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def inject(data_dir: Path, every: int = 1, report: bool = True) -> dict[str, int]:
    """Lets each call fail in turn with each of the three errors.

    Args:
        data_dir: where CIFAR-10 is kept.
        every: inject only every n-th of these faults.
        report: print a line a kind.
    """
    counts = dict.fromkeys(("faults", "ended_badly", "broken_files", "differences"), 0)
    with quick_pictures_and_data():
        for kind in KINDS:
            inject_kind(kind, data_dir, every, counts)
            if report:
                print(f"{kind}: {counts}", flush=True)
    return counts


@contextlib.contextmanager
def quick_pictures_and_data() -> Iterator[None]:
    """Writes a few bytes for each picture, the same way, and reads the data once.

    Neither drawing nor reading is what fails here, and both would take most of the time.
    """
    save, read = figures._save, data.cifar10
    figures._save = lambda figure, path: files.write_atomically(path, lambda f: f.write(b"PNG"))
    data.cifar10 = functools.cache(read)
    try:
        yield
    finally:
        figures._save, data.cifar10 = save, read


def inject_kind(kind: str, data_dir: Path, every: int, counts: dict[str, int]) -> None:
    """Lets each call of one kind fail in turn with each of the three errors; adds to `counts`."""
    with empty_folder() as folder:
        with fault(kind, 0, 0) as calls:
            train(data_dir)
        expected = outcome(folder)
    each = [(number, code) for number in range(1, calls[0] + 1) for code in CODES]
    for number, error_code in each[::every]:
        with empty_folder() as folder:
            with fault(kind, number, error_code) as done:
                code, error = train(data_dir)
            counts["faults"] += done[0] >= number
            counts["ended_badly"] += code not in (0, 1, 2) or (code and error.count("\n") != 1)
            counts["broken_files"] += len(broken_files(folder))
            if code:
                counts["ended_badly"] += train(data_dir)[0] != 0
            counts["differences"] += outcome(folder) != expected


def fill_disk(data_dir: Path) -> dict[str, int] | None:
    """Trains on a tmpfs that is full, makes room, and goes on; None where none can be mounted."""
    with empty_folder() as folder:
        train(data_dir)
        expected = outcome(folder)
    with empty_folder() as folder:
        disk = folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
            return None
        try:
            os.chdir(disk)
            (disk / "ballast").write_bytes(bytes(1 << 20))
            code, _ = train(data_dir)  # state and checkpoint together do not fit
            counts = {"exit_code": code, "broken_files": len(broken_files(disk))}
            os.chdir(folder)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            os.chdir(disk)
            counts["exit_code_with_room"] = train(data_dir)[0]
            counts["differences"] = int(outcome(disk) != expected)
        finally:
            os.chdir(folder)
            subprocess.run(["umount", str(disk)], check=True)
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, help="write the counts to this json")
    args = parser.parse_args()
    counts = {
        "injected": inject(args.data_dir.resolve()),
        "full_disk": fill_disk(args.data_dir.resolve()),
    }
    print(f"full disk: {counts['full_disk']}")
    if args.output:
        files.write_json(args.output, records.measured(counts))
    bad = ("ended_badly", "broken_files", "differences", "exit_code_with_room")
    never_full = (counts["full_disk"] or {"exit_code": 1})["exit_code"] != 1
    sys.exit(never_full or any((part or {}).get(key) for part in counts.values() for key in bad))


if __name__ == "__main__":
    main()
