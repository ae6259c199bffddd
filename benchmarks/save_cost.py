"""What saving the state of the default training costs, as a share of the training's time."""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import checkpoint
import engine
from compute import train_mode
from config import TrainConfig
from files import write_json
from models import MODERN, create_model
from optimizers import make_optimizer, parameter_groups
from records import measured
from train_custom import RECIPES


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epoch-seconds", type=float, required=True, help="see history.csv")
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    config = TrainConfig(**RECIPES["modern"])
    model = create_model("custom_cnn", MODERN)
    train_mode(model)
    optimizer = make_optimizer(parameter_groups(model, config), config, "fp32")
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    engine.train_step(model, optimizer, "fp32", 0.0, x, labels, config.lr)  # fills the moments
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    times = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "it.resume.pt"
        for _ in range(10):
            begin = time.perf_counter()
            checkpoint.save_state(path, state)
            times.append(time.perf_counter() - begin)
        size = path.stat().st_size
    # A save at each epoch's end, and within a long epoch one every few minutes.
    saves = 1 + args.epoch_seconds // (60 * config.save_every)
    result = {
        "megabytes": round(size / 1e6, 1),
        "seconds_per_save": round(statistics.median(times), 3),
        "epoch_seconds": args.epoch_seconds,
        "share_of_training": round(saves * statistics.median(times) / args.epoch_seconds, 5),
    }
    print(result)
    if args.output:
        write_json(args.output, measured(result))


if __name__ == "__main__":
    main()
