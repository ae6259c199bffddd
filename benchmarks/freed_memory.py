"""What it gains to keep freed memory (`runs.device.prepare`), on a CPU, job by job.

Steps of each job in a process of its own, with freed memory kept and with the C library left as it
is, in turn; images/s after three first steps, medians over the turns.
"""

import json
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import finetune
import train_custom
from benchmarks import common

JOBS = [f"train_custom.py --recipe {recipe}" for recipe in ("classic", "modern", "speedrun")]
JOBS += ["finetune.py --arch resnet18"]
SIDES = "kept", "given back"


def steps(job: str, side: str, args: Namespace) -> float:
    """Images/s of a job's steps in this process."""
    if side != SIDES[0]:
        common.prepare = lambda: None
    script, *flags = job.split()
    parse = finetune.parse if script == "finetune.py" else train_custom.parse
    settings = parse([*flags, "--precision", "bf16"])
    images = common.Job(settings, common.splits(settings, args)).images
    common.rate(images, 3, args.device)
    return common.rate(images, max(4, 3000 // settings.batch_size), args.device)


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs=2, metavar=("JOB", "SIDE"), help="print its images/s")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(steps(*args.only, args)))
        return
    rows = {}
    for job in JOBS:
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.turns):
            for side in SIDES:
                command = [sys.executable, __file__, "--data-dir", args.data_dir, "--only", job]
                done = subprocess.run([*command, side], stdout=subprocess.PIPE, check=True)
                rates[side].append(json.loads(done.stdout.splitlines()[-1]))
        medians = {side: round(statistics.median(values), 1) for side, values in rates.items()}
        rows[job] = medians | {"ratio": round(medians[SIDES[0]] / medians[SIDES[1]], 3)}
        print(f"{job}: {rows[job]}", flush=True)
    common.write(args, {"images_per_second": rows})


if __name__ == "__main__":
    main()
