"""What more processes gain: measured on this CPU, computed for GPUs.

Measured, in turn: a step on one process with one thread and with two, on two processes of one
thread, and on two that keep BatchNorm's statistics to themselves.

Computed: a GPU's compute time falls with its share of the batch, but a step is never shorter than
Python takes to launch it: CUDA graphs, which spare one GPU that, are off with several. To this
come a ring all-reduce of the gradients, 2(n-1)/n times their bytes over the bandwidth, and two
short exchanges for each BatchNorm; DDP hides a part of the ring behind the backward pass, which is
not counted. One GPU's time is that of an H200 (results/benchmarks/h200.log); ResNet-50 is taken to
reach the FLOP/s of `best`, which flatters it. More GPUs pay as long as twice as many are
one and a half times as fast.
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
from torch.nn.modules.batchnorm import _BatchNorm

import engine
import train_custom
from benchmarks import common
from models import NETWORKS, create_model
from reports import provenance
from runs import loading
from runtime import launch, processes

# Number of processes, threads of each, flags.
SIDES = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
    "2 processes, own BatchNorm": (2, 1, "--own-batchnorm"),
}
# On an H200 a step of 256 images that Python launches trains 42,000 a second; by modules called.
LAUNCH = 256 / 42_000 / 31
BEST = 59_300  # images/s of `best`, batch 500, 32 pixels, on an H200 beside another training
GPUS = 1, 2, 4, 8, 16, 32, 64  # eight to a machine
LATENCY = 20e-6  # of an exchange, seconds


def train(args: Namespace) -> None:
    """Prints the median seconds of a step, as one of the processes."""
    if args.own_batchnorm:
        processes._BatchNorm = ()  # no layer is one
    with processes.joined(args.device):
        settings = train_custom.parse(["--recipe", "best", "--precision", "bf16"])
        job = common.Job(settings, common.splits(settings, args))
        steps = engine.train(
            *(processes.shared(job.model), job.optimizer, job.batches),
            precision=job.precision,
            **loading.learning(settings),
        )
        times = [time.perf_counter() for _ in zip(range(3 + args.steps), steps, strict=False)]
    if not launch.RANK:
        print(statistics.median(after - before for before, after in pairwise(times[2:])))


def measure(side: str, args: Namespace) -> float:
    """Seconds of a step on a side."""
    number, threads, *flags = SIDES[side]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    flags += ["--train", f"--steps={args.steps}", f"--data-dir={args.data_dir}"]
    command = [sys.executable, *(launcher if number > 1 else []), __file__, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def computed(name: str, model: nn.Module, second: float, args: Namespace) -> list[dict[str, Any]]:
    """What GPUs gain for a network whose step takes one of them so long."""
    leaves = [module for module in model.modules() if not list(module.children())]
    exchanges = 1 + 2 * sum(isinstance(module, _BatchNorm) for module in leaves)
    size = 4 * provenance.num_parameters(model)["trainable"]  # gradients are float32 with bf16, too
    rows, pays = [], {"launched": 1, "launching free": 1}
    for number in GPUS:
        compute, launch = second / number, (number > 1) * LAUNCH * len(leaves)
        ring = 2 * (number - 1) / number * size / (1e9 * args.bandwidth[number > 8])
        traffic = ring + (number > 1) * exchanges * LATENCY
        seconds = {"compute": compute, "launch": launch, "traffic": traffic}
        whole = {"launched": max(compute, launch), "launching free": compute}
        gains = {how: second / (time + traffic) for how, time in whole.items()}
        print(f"{name}, {number:>2} GPUs: " + ", ".join(f"{h} x {g:.2f}" for h, g in gains.items()))
        for how, gain in gains.items():
            if rows and pays[how] == number // 2 and gain > 1.5 * rows[-1]["speedup"][how]:
                pays[how] = number
        about = {"network": name, "gpus": number, "gradient_bytes": size}
        rows.append({**about, "seconds": seconds, "speedup": gains})
    print(f"{name}: gradients {size / 1e6:.0f} MB; pays up to so many GPUs: {pays}", flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, nargs=2, default=(400, 50), metavar="GB/s")
    parser.add_argument("--train", action="store_true", help="be one of the processes")
    parser.add_argument("--own-batchnorm", action="store_true", help="statistics for each process")
    args = parser.parse_args()
    if args.train:
        return train(args)
    turns = [{side: measure(side, args) for side in SIDES} for _ in range(args.turns)]
    steps = {side: statistics.median(turn[side] for turn in turns) for side in SIDES}
    for side, second in steps.items():
        print(f"{side:<28} {1e3 * second:8.1f} ms a step of best")

    settings = train_custom.parse(["--recipe", "best"])
    best = create_model("custom_cnn", NETWORKS[settings.network], 10)
    resnet = create_model("resnet50", {"image_size": 128}, 10)
    second = 128 / BEST * common.flop(resnet, 128) / common.flop(best, 32)
    size = settings.batch_size
    rows = computed(f"best, batch {size}", best, size / BEST, args)
    rows += computed("ResNet-50 at 128 pixels, batch 128", resnet, second, args)
    found = {"step_seconds": steps, "turns": turns, "gigabytes_per_second": args.bandwidth}
    common.write(args, found | {"computed": rows})


if __name__ == "__main__":
    main()
