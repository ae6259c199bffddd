"""What saving the state and renewing the live page cost each recipe, as shares of its training.

Saves are counted by the rule of `runs.training`: at most one an epoch, none before 20 times its own
duration has passed, and one every few minutes. The page is written by the rule of `reports.live`:
once in three seconds, and none before 200 times its own duration has passed.
"""

import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_custom
from benchmarks import common
from config.recipes import BY_RECIPE
from reports import pages
from reports.live import MOST_POINTS
from storage import checkpoint


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--only", nargs="+", choices=BY_RECIPE, default=BY_RECIPE)
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    args = parser.parse_args()
    rows = []
    for recipe in args.only:
        settings = train_custom.parse(["--recipe", recipe])
        job = common.Job(settings, common.splits(settings, args))
        common.rate(job.images, 2, args.device)  # which fills the moments
        epoch = job.batches.num_images / common.rate(job.images, args.steps, args.device)
        row = {"epoch": 1, "step": 1, "lr": 1e-3, "train_loss": 1.0, "val_accuracy": 0.9}
        content = {"name": recipe, "command": "", "status": "running", "updated": 0.0}
        content |= {"config": settings.plain(), "history": [row] * settings.epochs}
        content |= {"steps": [(step, 1.0, 1e-3) for step in range(MOST_POINTS)]}
        state = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}
        times, renewals = [], []
        with tempfile.TemporaryDirectory(dir=".") as folder:
            path = Path(folder) / "it.resume.pt"
            for _ in range(10):
                begin = time.perf_counter()
                checkpoint.save_state(path, state)
                times.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                pages.write(Path(folder), content)
                renewals.append(time.perf_counter() - begin)
            size = path.stat().st_size
        save, training = statistics.median(times), epoch * settings.epochs
        renewal = statistics.median(renewals)
        saves = settings.epochs / max(1, math.ceil(20 * save / epoch))
        saves += training / (60 * settings.save_every)
        rows.append(
            {
                "recipe": recipe,
                "megabytes": round(size / 1e6, 1),
                "seconds_per_save": round(save, 3),
                "epoch_seconds": round(epoch, 1),
                "share_of_training": round(saves * save / training, 5),
                "seconds_per_page": round(renewal, 4),
                "share_of_page": round(renewal / max(3, 200 * renewal), 5),
            }
        )
        print(rows[-1], flush=True)
    common.write(args, {"rows": rows})


if __name__ == "__main__":
    main()
