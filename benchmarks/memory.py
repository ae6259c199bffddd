"""Peak memory and start-up of each job: a short run of every script in a process of its own.

What counts is the largest resident size the kernel has seen (`ru_maxrss`), and the seconds from the
command to the first training step. The CNN is trained on all images, fine-tuning on 2,000 alone: it
needs more memory and time for the cached features of all, whose size a run says.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from files import write_json
from history import HEADER
from models import ARCHS
from records import measured
from train_custom import RECIPES

ROOT = Path(__file__).parent.parent
SHORT = ("--epochs", "1", "--device", "cpu")
SOME = ("--limit", "2000", "--weights", "none", "--unfreeze", "last")
JOBS = {
    **{
        f"train_custom.py, {recipe}": ("train_custom.py", "--recipe", recipe, *SHORT)
        for recipe in RECIPES
    },
    **{f"finetune.py, {arch}": ("finetune.py", "--arch", arch, *SHORT, *SOME) for arch in ARCHS},
}


def run(arguments: tuple[str, ...], data_dir: Path) -> dict[str, float]:
    """Runs a script in an empty folder; returns the bytes it held at most, and its start-up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.rstrip("\n") == HEADER:  # which the first step follows
                seconds = time.perf_counter() - begin
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak, "startup_seconds": round(seconds, 2)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    rows = {}
    for name, arguments in JOBS.items():
        rows[name] = run(arguments, args.data_dir.resolve())
        peak, seconds = rows[name].values()
        print(f"{name:<34} {peak / 1e9:.2f} GB, first step after {seconds:.1f} s", flush=True)
    if args.output:
        write_json(args.output, measured({"jobs": rows}))


if __name__ == "__main__":
    main()
