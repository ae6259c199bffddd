"""What two trainings at once cost each other, by waiting policy and number of OpenMP threads.

Threads that spin while they wait take a core from the other process; threads that sleep take long
to wake. Each line gives images/s of one training alone, then of two side by side. How the kernel
happens to place the threads decides much, so that the settings are measured in turn, several times.
"""

import os
import subprocess
import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_custom
from benchmarks import common

SETTINGS = (
    *("", "OMP_WAIT_POLICY=PASSIVE", "OMP_WAIT_POLICY=ACTIVE", "GOMP_SPINCOUNT=1000"),
    "OMP_NUM_THREADS=1",
)


def train(args: Namespace) -> None:
    """Trains for a while, from the moment a line comes on stdin; prints images/s."""
    settings = train_custom.parse(["--limit", "10000", "--precision", "bf16"])
    images = common.Job(settings, common.splits(settings, args)).images
    print("ready", sum(islice(images, 3)), flush=True)
    input()  # until all are
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < args.seconds:
        count += next(images)
    print(count / (time.perf_counter() - begin), flush=True)
    end = time.perf_counter() + 2  # so that the other ends beside a load, too
    while time.perf_counter() < end:
        next(images)


def rates(number: int, setting: str, args: Namespace) -> list[float]:
    """Images/s of that many trainings at once, under a variable of the environment."""
    environment = os.environ | dict(part.split("=") for part in setting.split())
    flags = ["--train", "--seconds", str(args.seconds), "--data-dir", str(args.data_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen([sys.executable, __file__, *flags], env=environment, **pipes)
        for _ in range(number)
    ]
    for child in children:
        child.stdout.readline()
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return [round(float(child.communicate()[0]), 1) for child in children]


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="be one of the trainings")
    args = parser.parse_args()
    if args.train:
        return train(args)
    rows = []
    for round_ in range(args.rounds):
        for setting in SETTINGS:
            alone, both = (rates(number, setting, args) for number in (1, 2))
            rows.append({"setting": setting, "round": round_, "alone": alone[0], "both": both})
            print(f"{setting:<24} alone {alone[0]}, two at once {both}", flush=True)
    common.write(args, {"images_per_second": rows})


if __name__ == "__main__":
    main()
