"""Seconds and FLOPs to 87.26, 90, 93 and 94 % test accuracy.

A schedule that ends earlier is a training of its own: an accuracy counts as reached by a run that
was planned for its number of epochs, from its start to its last step, not by a moment of a longer
one. So every row is a complete run; the answer for an accuracy is the shortest that reaches it.
The plain loop is that of `throughput.py`, on the classic network.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import metrics
import train_custom
from benchmarks.throughput import plain_steps, step_flop
from compute import now, predict, select_device
from config import TrainConfig
from data import load_splits
from files import write_json
from models import create_model
from records import measured

TARGETS = (0.8726, 0.90, 0.93, 0.94)  # the first is what the original project ended at
RUNS = (
    "speedrun:3",
    "modern:3",
    "modern:6",
    "modern:13",
    "modern:24",
    "best:28",
    "classic:10",
    "classic:30",
    "plain:10",
)


def ours(
    recipe: str, epochs: int, data_dir: Path, seed: int, device: torch.device
) -> dict[str, float]:
    """A complete run of `train_custom.py`."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["--checkpoint-dir", f"{folder}/checkpoints", "--results-dir", f"{folder}/results"]
        code = train_custom.main(
            [
                *("--recipe", recipe, "--epochs", str(epochs), "--seed", str(seed)),
                *("--data-dir", str(data_dir), "--device", device.type, *places),
            ]
        )
        if code:
            raise SystemExit(code)
        results = Path(folder) / "results" / "custom_cnn"
        test = json.loads((results / "test.json").read_text())
        config = json.loads((results / "config.json").read_text())
    return {
        "seconds": config["train_seconds"],
        "images": epochs * config["splits"]["train"],
        "top1": test["top1"],
        "top1_tta": test["top1_tta"],
    }


def plain(epochs: int, data_dir: Path, seed: int, device: torch.device) -> dict[str, float]:
    """The tutorial's loop for as many epochs, constant learning rate, on all training images."""
    splits = load_splits(data_dir, val_fraction=0, limit=None, seed=0, device=device)
    torch.manual_seed(seed)
    model = create_model("custom_cnn", {})
    images, begin = 0, time.perf_counter()
    # The loop drops the last, partial batch of an epoch; so does the count.
    num_images = epochs * (len(splits.train.labels) // 128) * 128
    for size in plain_steps(splits.train, splits.mean, splits.std, model, 128, device):
        images += size
        if images >= num_images:
            break
    seconds = now(device) - begin
    both = predict(model, splits.test.images, splits.mean, splits.std, tta="crops")
    top1, top1_tta = (metrics.top1(logits, splits.test.labels.cpu()) for logits in both)
    return {"seconds": seconds, "images": images, "top1": top1, "top1_tta": top1_tta}


def flop(recipe: str, images: float) -> float:
    """Operations of a training on so many images; the plain loop's is of the classic network."""
    return images * step_flop(create_model("custom_cnn", train_custom.SURGERY.get(recipe, {})))


def answers(rows: list[dict], key: str) -> list[str]:
    """A line for each target and side: the shortest run that reaches it."""
    lines = []
    for target in TARGETS:
        for side in dict.fromkeys(row["side"] for row in rows):
            good = [row for row in rows if row["side"] == side and row[key] >= target]
            best = min(good, key=lambda row: row["seconds"], default=None)
            said = (
                f"{best['seconds']:7,.1f} seconds, {best['flop'] / 1e15:.3f} PFLOP, "
                f"{best['epochs']} epochs"
                if best
                else "not reached by these runs"
            )
            lines.append(f"{100 * target:.2f} %  {side:<8} {said}")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="SIDE:EPOCHS")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="add the rows to this json")
    args = parser.parse_args()
    device = select_device(args.device)
    earlier = args.output and args.output.exists()
    rows = json.loads(args.output.read_text())["rows"] if earlier else []
    for run in args.runs:
        side, _, epochs = run.partition(":")
        TrainConfig(epochs=int(epochs))
        options = int(epochs), args.data_dir, args.seed, device
        row = plain(*options) if side == "plain" else ours(side, *options)
        setting = {"side": side, "epochs": int(epochs), "seed": args.seed}
        figures = {**setting, "flop": flop(side, row["images"]), **row}
        print(figures, flush=True)
        rows.append(measured(figures, device))
        if args.output:
            write_json(args.output, {"rows": rows})
    for key, title in (("top1", "plain"), ("top1_tta", "averaged over six views (TTA)")):
        print(f"\n{title}", *answers(rows, key), sep="\n")


if __name__ == "__main__":
    main()
