"""Training throughput of the default network by batch size, and of every architecture.

Images/s are medians over turns of a few steps, the cases in rotation, so that a machine that slows
down slows them all. The pretrained networks train whole, at their default image size.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_custom
from benchmarks.throughput import our_steps, rate
from compute import choose_precision, select_device
from data import load_splits
from files import write_json
from models import ARCHS, create_model
from records import measured

BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)
ARCH_BATCH_SIZE = 128


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--images", type=int, default=2048, help="in a turn, at least")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    device = select_device(args.device)
    splits = load_splits(args.data_dir, val_fraction=0, limit=None, seed=0, device=device)
    cases = [("custom_cnn", 32, size) for size in BATCH_SIZES]
    cases += [(name, row.image_size, ARCH_BATCH_SIZE) for name, row in ARCHS.items()]
    rows, running = [], []
    for name, image_size, batch_size in cases:
        config = train_custom.parse(["--batch-size", str(batch_size)])
        model, batches = train_custom.begin(config, splits, device)
        if name in ARCHS:
            model = create_model(name, {"image_size": image_size})
            model = model.to(device, memory_format=torch.channels_last)
        precision, _ = choose_precision("auto", model, next(batches.epoch(0)), device)
        rows.append(
            {
                "network": name,
                "image_size": image_size,
                "batch_size": batch_size,
                "precision": precision,
            }
        )
        running.append(our_steps(batches, model, config, precision))
    rates: list[list[float]] = [[] for _ in rows]
    for _ in range(args.turns):
        for values, row, steps in zip(rates, rows, running, strict=True):
            next(steps)
            values.append(rate(steps, -(-args.images // row["batch_size"]), device))
    for values, row in zip(rates, rows, strict=True):
        row["images_per_second"] = round(statistics.median(values), 1)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if args.output:
        write_json(args.output, measured({"rows": rows}, device))


if __name__ == "__main__":
    main()
