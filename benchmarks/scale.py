"""Training throughput of the default network by batch size, and of every pretrained network.

Images/s are medians over turns of a few steps, the cases in rotation, so that a machine that slows
down slows them all. The pretrained networks train whole, at their default image size.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import finetune
import train_custom
from benchmarks import common
from config.recipes import BY_NETWORK

BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048)


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--images", type=int, default=2048, help="in a turn, at least")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=BATCH_SIZES)
    parser.add_argument("--archs", nargs="*", default=BY_NETWORK, choices=BY_NETWORK)
    args = parser.parse_args()
    cases = [(train_custom, ["--batch-size", str(size)]) for size in args.batch_sizes]
    cases += [(finetune, ["--arch", arch, "--weights", "none"]) for arch in args.archs]
    rows, running = [], []
    for script, flags in cases:
        settings = script.parse([*flags, "--small-first", ""])
        job = common.Job(settings, common.splits(settings, args))
        names = {"network": getattr(settings, "arch", "custom_cnn"), "image_size": job.batches.side}
        rows.append(names | {"batch_size": settings.batch_size, "precision": job.precision})
        running.append((job.images, []))
    for _ in range(args.turns):
        for row, (images, rates) in zip(rows, running, strict=True):
            next(images)
            rates.append(common.rate(images, -(-args.images // row["batch_size"]), args.device))
    for row, (_, rates) in zip(rows, running, strict=True):
        row["images_per_second"] = round(statistics.median(rates), 1)
        print(row)
    common.write(args, {"rows": rows})


if __name__ == "__main__":
    main()
