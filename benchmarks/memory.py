"""Peak memory of each job: a short run of every script in a process of its own.

What counts is the largest resident size the kernel has seen (`ru_maxrss`). The data set lies in
memory whole, whatever the limit; a frozen trunk's cached features come on top, as a run says.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from files import write_json
from models import ARCHS
from records import environment

ROOT = Path(__file__).parent.parent
SHORT = ("--epochs", "1", "--limit", "2000")
JOBS = {
    "train_custom.py, modern": ("train_custom.py", *SHORT),
    "train_custom.py, classic": ("train_custom.py", "--recipe", "classic", *SHORT),
    **{
        f"finetune.py, {arch}": ("finetune.py", "--arch", arch, "--weights", "none", *SHORT)
        for arch in ARCHS
    },
}


def peak(arguments: tuple[str, ...], data_dir: Path) -> int:
    """Runs a script in an empty folder; returns the bytes it held at most."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)], cwd=folder, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    rows = {}
    for name, arguments in JOBS.items():
        rows[name] = peak(arguments, args.data_dir.resolve())
        print(f"{name:<34} {rows[name] / 1e9:.2f} GB", flush=True)
    if args.output:
        content = {"environment": environment(torch.device("cpu")), "peak_bytes": rows}
        write_json(args.output, content)


if __name__ == "__main__":
    main()
