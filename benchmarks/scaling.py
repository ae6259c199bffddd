"""What more processes gain: measured on this CPU, computed for GPUs.

Measured, in turn: a step on one process with one thread and with two, and on two processes of one
thread.

Computed: a GPU's compute time falls with its share of the batch, but a step is never shorter than
Python takes to launch it: CUDA graphs, which spare one GPU that, are off with several. To this
come a ring all-reduce of the gradients, 2(n-1)/n times their bytes over the bandwidth, and two
short exchanges for each BatchNorm; DDP hides a part of the ring behind the backward pass, which is
not counted. One GPU's time is that of an H200 (results/benchmarks/h200.log); ResNet-50 is taken to
reach the FLOP/s of the widest network, which flatters it.
"""

import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import nn

import engine
from benchmarks import common
from models import NETWORKS, create_model
from reports import provenance
from runtime import processes
from runtime.launch import RANK

JOB = "train_custom.py --recipe best --network widest"
SIDES = {  # number of processes, threads of each
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
# On an H200 a step of 256 images that Python launches trains 42,000 a second; by modules called.
LAUNCH = 256 / 42_000 / 31
# Images/s of the widest network, batch 500, 32 pixels, on an H200 beside another training
WIDEST = 59_300
GPUS = (1, 2, 4, 8, 16, 32, 64)
GPUS_OF_MACHINE = 8
LATENCY = 20e-6  # of an exchange, seconds


def train(args: Namespace) -> None:
    """Prints the median seconds of a step, as one of the processes."""
    with processes.joined(args.device):
        settings = common.settings_of(f"{JOB} --precision bf16")
        job = common.Job(settings, common.splits(settings, args))
        network = processes.shared(job.model)
        steps = engine.train(network, job.optimizer, job.batches, **job.options)
        times = [time.perf_counter() for _, _ in zip(range(3 + args.steps), steps, strict=False)]
    if RANK == 0:
        print(statistics.median(after - before for before, after in pairwise(times[2:])))


def measure(side: str, args: Namespace) -> float:
    """Seconds of a step on a side."""
    number, threads = SIDES[side]
    command = [sys.executable]
    if number > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command += [__file__, "--train", f"--steps={args.steps}", f"--data-dir={args.data_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def computed(name: str, model: nn.Module, second: float, args: Namespace) -> list[dict[str, Any]]:
    """What GPUs gain for a network whose step takes one of them so long."""
    leaves = [module for module in model.modules() if not list(module.children())]
    norms = [m for m in leaves if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    size = 4 * provenance.num_parameters(model)["trainable"]  # gradients are float32 with bf16, too
    inside, between = args.bandwidth
    rows = []
    for number in GPUS:
        compute = second / number
        launch = 0.0
        traffic = 0.0
        if number > 1:
            launch = LAUNCH * len(leaves)
            bandwidth = inside if number <= GPUS_OF_MACHINE else between
            ring = 2 * (number - 1) / number * size / (1e9 * bandwidth)
            traffic = ring + LATENCY * (1 + 2 * len(norms))
        gain = second / (max(compute, launch) + traffic)
        print(f"{name}, {number:>2} GPUs: x {gain:.2f}")
        seconds = {"compute": compute, "launch": launch, "traffic": traffic}
        row = {"network": name, "gpus": number, "gradient_bytes": size}
        rows.append({**row, "seconds": seconds, "speedup": gain})
    return rows


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--bandwidth",
        type=float,
        nargs=2,
        default=(400, 50),
        metavar="GB/s",
        help="between the GPUs of a machine, and between machines",
    )
    parser.add_argument("--train", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.train:
        return train(args)
    turns = [{side: measure(side, args) for side in SIDES} for _ in range(args.turns)]
    steps = {side: statistics.median(turn[side] for turn in turns) for side in SIDES}
    for side, second in steps.items():
        print(f"{side:<28} {1e3 * second:8.1f} ms a step of the widest network")

    settings = common.settings_of(JOB)
    widest = create_model("custom_cnn", NETWORKS[settings.network], 10)
    resnet = create_model("resnet50", {"image_size": 128}, 10)
    second = 128 / WIDEST * common.flop(resnet, 128) / common.flop(widest, 32)
    size = settings.batch_size
    rows = computed(f"widest network, batch {size}", widest, size / WIDEST, args)
    rows += computed("ResNet-50 at 128 pixels, batch 128", resnet, second, args)
    found = {"step_seconds": steps, "turns": turns, "gigabytes_per_second": args.bandwidth}
    common.write(args, {**found, "computed": rows})


if __name__ == "__main__":
    main()
