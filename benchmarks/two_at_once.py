"""What two trainings at once cost each other, by the waiting policy of the OpenMP threads.

Threads that spin while they wait take a core from the other process; threads that sleep take long
to wake. Each line gives images/s of one training alone, then of two side by side.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from files import write_json
from records import environment

POLICIES = {
    "as it is": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_WAIT_POLICY=ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}
CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from benchmarks.throughput import our_steps
from data import Augmentation, Split, TrainBatches
from models import MODERN, create_model
images = torch.randint(0, 256, (4096, 32, 32, 3), dtype=torch.uint8)
split = Split(images, torch.randint(0, 10, (4096,)))
batches = TrainBatches(split, 256, [0.5] * 3, [0.25] * 3, Augmentation("random", 2), 0)
model = create_model("custom_cnn", MODERN).to(memory_format=torch.channels_last)
steps = our_steps(batches, model, "bf16")
for _ in range(3):
    next(steps)
begin, count = time.perf_counter(), 0
while time.perf_counter() - begin < {seconds}:
    count += next(steps)
print(count / (time.perf_counter() - begin))
"""


def rates(number: int, policy: dict[str, str], seconds: float) -> list[float]:
    """Images/s of that many trainings at once."""
    code = CHILD.format(root=str(Path(__file__).parent.parent), seconds=seconds)
    command = [sys.executable, "-c", code]
    children = [
        subprocess.Popen(command, env=os.environ | policy, stdout=subprocess.PIPE, text=True)
        for _ in range(number)
    ]
    return [round(float(child.communicate()[0]), 1) for child in children]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    rows = {}
    for name, policy in POLICIES.items():
        rows[name] = {number: rates(number, policy, args.seconds) for number in (1, 2)}
        print(f"{name:<24} alone {rows[name][1]}, two at once {rows[name][2]}", flush=True)
    if args.output:
        content = {"environment": environment(torch.device("cpu")), "images_per_second": rows}
        write_json(args.output, content)


if __name__ == "__main__":
    main()
