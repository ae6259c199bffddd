"""Peak memory and start-up of each job: a short run of every script in a process of its own.

What counts is the largest resident size the kernel has seen (`ru_maxrss`), and the seconds from the
command to the first training step. The CNN is trained on all images, fine-tuning on 2,000 alone: it
needs more memory and time for the cached features of all, whose size a run says.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common
from config.recipes import BY_NETWORK, BY_RECIPE
from storage.history import HEADER

ROOT = Path(__file__).parent.parent
SOME = "--limit 2000 --weights none --unfreeze last"
JOBS = [f"train_custom.py --recipe {recipe}" for recipe in BY_RECIPE]
JOBS += [f"finetune.py --arch {arch} {SOME}" for arch in BY_NETWORK]


def run(job: str, data_dir: Path) -> dict[str, float]:
    """Runs a script in an empty folder; returns the bytes it held at most, and its start-up."""
    command = [sys.executable, *f"{ROOT}/{job} --epochs 1 --device cpu --data-dir".split()]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, str(data_dir)], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.rstrip("\n") == HEADER:  # which the first step follows
                seconds = time.perf_counter() - begin
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{job}: exit code {os.waitstatus_to_exitcode(status)}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return {"peak_bytes": usage.ru_maxrss * unit, "startup_seconds": round(seconds, 2)}


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="jobs that contain such a word")
    parser.add_argument("--more", default="", metavar="FLAGS", help="for every job")
    args = parser.parse_args()
    rows = {}
    for job in JOBS:
        if any(word in job for word in args.only):
            rows[job] = found = run(f"{job} {args.more}", args.data_dir.resolve())
            peak = found["peak_bytes"] / 1e9
            print(f"{job}: {peak:.2f} GB, first step after {found['startup_seconds']} s")
    common.write(args, {"jobs": rows})


if __name__ == "__main__":
    main()
