"""What two trainings at once cost each other, by waiting policy and number of OpenMP threads.

Threads that spin while they wait take a core from the other process; threads that sleep take long
to wake. Each line gives images/s of one training alone, then of two side by side. How the kernel
happens to place the threads decides much, so that the settings are measured in turn, several times.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from files import write_json
from records import measured

SETTINGS = {
    "as it is": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_WAIT_POLICY=ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import train_custom
from benchmarks.throughput import our_steps
from data import load_splits
device = torch.device("cpu")
splits = load_splits(Path({data!r}), val_fraction=0, limit=10000, seed=0, device=device)
config = train_custom.parse([])
model, batches = train_custom.begin(config, splits, device)
steps = our_steps(batches, model, config, "bf16")
for _ in range(3):
    next(steps)
print("ready", flush=True)
input()  # until all are
begin, count = time.perf_counter(), 0
while time.perf_counter() - begin < {seconds}:
    count += next(steps)
print(count / (time.perf_counter() - begin), flush=True)
end = time.perf_counter() + 2  # so that the other ends beside a load, too
while time.perf_counter() < end:
    next(steps)
"""


def rates(number: int, setting: dict[str, str], args: argparse.Namespace) -> list[float]:
    """Images/s of that many trainings at once."""
    root = str(Path(__file__).parent.parent)
    code = CHILD.format(root=root, data=str(args.data_dir.resolve()), seconds=args.seconds)
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, env=os.environ | setting, **pipes) for _ in range(number)]
    for child in children:
        child.stdout.readline()
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return [round(float(child.communicate()[0]), 1) for child in children]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    rows = []
    for round_ in range(args.rounds):
        for name, setting in SETTINGS.items():
            alone, both = (rates(number, setting, args) for number in (1, 2))
            rows.append({"setting": name, "round": round_, "alone": alone[0], "both": both})
            print(f"{name:<24} alone {alone[0]}, two at once {both}", flush=True)
    if args.output:
        write_json(args.output, measured({"images_per_second": rows}))


if __name__ == "__main__":
    main()
