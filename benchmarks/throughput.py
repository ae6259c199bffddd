"""Training throughput of this repository against the plain loop of PyTorch's CIFAR-10 tutorial.

All sides train the same network at the same batch size in one process, a few steps in turn, so
that a machine that slows down slows all. The plain side is what most repositories do: a dataset of
PIL images, ToTensor, Normalize and RandomHorizontalFlip sample by sample, a DataLoader with two
workers, float32. A third side is this trainer under `torch.compile`, and the seconds that its first
two steps take longer; further ones are the recipe's smaller images. Images/s are medians over the
turns; FLOP/s are those of images of 32x32 pixels, counted as in `common.flop`.
"""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import common
from config.recipes import BY_RECIPE
from config.settings import sizes
from models import create_model
from runtime.device import now


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The machine's FLOP/s in a square matrix product, best of five."""
    size = 4096 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(5):
        begin = now(device)
        a @ b
        times.append(now(device) - begin)
    return 2 * size**3 / min(times)


def measure(recipe: str, args: Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    """Times the sides on a recipe's network."""
    device = args.device
    settings = common.settings_of(f"train_custom.py --recipe {recipe}")
    if args.batch_size:
        settings = replace(settings, batch_size=args.batch_size)
    splits = common.splits(settings, args)
    job = common.Job(settings, splits)
    # More steps than are needed, in the number format that the job has chosen.
    endless = replace(settings, epochs=10_000, precision=job.precision, small_first="")

    def ours(**changes: Any) -> Iterator[int]:
        return common.Job(replace(endless, **changes), splits).images

    network = create_model("custom_cnn", job.arguments, len(splits.classes))
    sides = {
        "plain": common.plain_steps(
            splits.train, splits.stats, network, settings.batch_size, device
        ),
        "ours": ours(),
        "compiled": ours(compile=True),
    }
    for _, side in sizes(settings.small_first):
        sides[f"ours, {side} pixels"] = ours(small_first=f"0.999:{side}")
    starts = {}
    for name, images in sides.items():
        begin = now(device)
        common.throughput(images, 2, device)
        starts[name] = now(device) - begin
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, images in sides.items():
            common.throughput(images, 4, device)  # of workers that idled some batches are ready
            rates[name].append(common.throughput(images, args.steps, device))
            time.sleep(1)  # they make the next ones now, not beside the other side
    medians = {name: statistics.median(values) for name, values in rates.items()}
    begin = now(device)
    count = sum(len(labels) for _, labels in job.batches.epoch(settings.epochs - 1))
    augmenting = (now(device) - begin) / count  # seconds an image
    done = common.flop(job.model, job.batches.side) * medians["ours"]
    return {
        "recipe": recipe,
        "multiplications": common.flop(job.model, job.batches.side, training=False) // 2,
        "training_pflop": round(common.training_flop(job.model, job.batches) / 1e15, 4),
        "batch_size": settings.batch_size,
        "precision": job.precision,
        "images_per_second": {name: round(value, 1) for name, value in medians.items()},
        "compile_seconds": round(starts["compiled"] - starts["ours"], 1),
        "ratio": round(medians["ours"] / medians["plain"], 2),
        "flop_per_second": round(done),
        "utilisation": round(done / peaks[job.precision], 3),
        "augmentation_share": round(augmenting * medians["ours"], 4),
    }


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--only", nargs="+", choices=BY_RECIPE, default=BY_RECIPE)
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=8, help="in a turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks = {name: round(matrix_rate(dtype, args.device)) for name, dtype in types.items()}
    rows = []
    for recipe in args.only:
        rows.append(measure(recipe, args, peaks))
        print(rows[-1], flush=True)
    common.write(args, {"matrix_product_flop_per_second": peaks, "rows": rows})


if __name__ == "__main__":
    main()
