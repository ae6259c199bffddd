"""Lets every write, fsync, replace, link, unlink, mkdir and open of a training fail in turn.

After each fault the run must have ended with an exit code and one line, every file with a final
name must be whole, and repeating the command, which resumes, must give exactly the weights of the
run without a fault. Then a training fills a real disk.
"""

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
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.figure import Figure

import train_custom
from benchmarks import common
from benchmarks.torture import outcome
from errors import UnusableInput
from sources import cifar10
from storage import checkpoint, files

ARGUMENTS = (
    "--recipe classic --limit 64 --batch-size 32 --precision fp32 --device cpu --epochs 2 "
    "--run-name custom_cnn --resume"
)
CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)
KINDS = ("write", "fsync", "replace", "link", "unlink", "mkdir", "open")


@contextlib.contextmanager
def fault(kind: str, number: int, code: int) -> Iterator[list[int]]:
    """Makes the `number`-th call of a kind fail (0: none); yields a list with the calls so far.

    "write" fails in the middle: half of the bytes reach the disk.
    """
    calls = [0]

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                if kind == "write":
                    file, content = arguments
                    function(file, bytes(content)[: len(content) // 2])
                raise OSError(code, os.strerror(code))
            return function(*arguments, **options)

        return call

    class HalfFile(io.FileIO):
        write = failing(io.FileIO.write)

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "xb":  # as `files.write_atomically` opens
            return HalfFile(path, "x")
        return builtins.open(path, mode, *arguments, **options)

    with contextlib.ExitStack() as stack:
        if kind == "write":
            stack.enter_context(mock.patch.object(files, "open", opened, create=True))
        else:
            stack.enter_context(mock.patch.object(os, kind, failing(getattr(os, kind))))
        if kind == "open":  # files; `os.open` is for locks and for the folders that are synced
            here = failing(builtins.open)
            stack.enter_context(mock.patch.object(files, "open", here, create=True))
        yield calls


def train(data_dir: Path) -> tuple[int, str]:
    """Begins or resumes the training in the working folder; returns exit code and stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = train_custom.main([*ARGUMENTS.split(), "--data-dir", str(data_dir)])
    return code, error.getvalue()


def broken_files(folder: Path) -> list[str]:
    """Files whose name says that they are whole and whose content is not; and forgotten ones."""
    broken = [str(path) for path in folder.rglob("*.tmp")]
    for pattern, read in {
        "*.pt": checkpoint.load,
        "*.pt.previous": checkpoint.load,
        "*.json": lambda path: json.loads(path.read_text()),
    }.items():
        for path in folder.rglob(pattern):
            try:
                read(path)
            except (UnusableInput, ValueError):
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
        report: print a line a kind, and one for each fault that did harm.
    """
    counts = dict.fromkeys(("faults", "ended_badly", "broken_files", "differences"), 0)
    # Neither drawing nor reading is what fails here, and both would take most of the time.
    with (
        mock.patch.object(Figure, "savefig", lambda self, file, **_: file.write(b"PNG")),
        mock.patch.object(cifar10, "cifar10", functools.cache(cifar10.cifar10)),
    ):
        for kind in KINDS:
            with empty_folder() as folder, fault(kind, 0, 0) as calls:
                train(data_dir)
                expected = outcome(folder)
            each = [(number, code) for number in range(1, calls[0] + 1) for code in CODES]
            for number, code in each[::every]:
                found = inject_one(kind, number, code, data_dir, expected)
                counts = {key: counts[key] + value for key, value in found.items()}
                if report and did_harm(found):
                    print(f"{kind} {number} {errno.errorcode[code]}: {found}", flush=True)
            if report:
                print(f"{kind}: {counts}", flush=True)
    return counts


def inject_one(
    kind: str, number: int, code: int, data_dir: Path, expected: tuple[Any, ...]
) -> dict[str, int]:
    """Lets one call fail, then repeats the command; returns what to add to the counts."""
    with empty_folder() as folder:
        with fault(kind, number, code) as calls:
            exit_code, error = train(data_dir)
        broken = broken_files(folder)
        badly = exit_code not in (0, 1, 2)
        if exit_code:
            again, _ = train(data_dir)
            badly = badly or error.count("\n") != 1 or again != 0
        different = outcome(folder) != expected
    return {
        "faults": int(calls[0] >= number),
        "ended_badly": int(badly),
        "broken_files": len(broken),
        "differences": int(different),
    }


def did_harm(counts: dict[str, int]) -> bool:
    """Whether anything in the counts is not as it must be."""
    harm = ("ended_badly", "broken_files", "differences", "exit_code_with_room")
    never_full = counts.get("exit_code", 1) != 1
    return never_full or any(counts.get(key) for key in harm)


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
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--every", type=int, default=1, help="inject only every n-th fault")
    args = parser.parse_args()
    data_dir = args.data_dir.resolve()
    counts = {"injected": inject(data_dir, args.every), "full_disk": fill_disk(data_dir)}
    print(f"full disk: {counts['full_disk']}")
    common.write(args, counts)
    full = counts["full_disk"]
    sys.exit(did_harm(counts["injected"]) or (full is not None and did_harm(full)))


if __name__ == "__main__":
    main()
