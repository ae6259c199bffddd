"""Test accuracy, minutes and operations of complete trainings, by recipe and number of epochs.

A schedule that ends earlier is a training of its own: an accuracy counts as reached by a training
that was planned for its number of epochs, from its start to its last step, not by a moment of a
longer one. Rows that `--output` holds are kept and not run again. The plain loop is that of
`throughput.py`, on the classic network.
"""

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_custom
from benchmarks import common
from models import create_model
from runtime.device import now
from storage.files import write_json

RUNS = ["speedrun:10", "modern:20", "classic:30", "plain:10"]


def ours(recipe: str, epochs: int, seed: int, args: Namespace) -> dict[str, float]:
    """A complete run of `train_custom.py`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--recipe", recipe, "--epochs", str(epochs), "--seed", str(seed)]
        flags += ["--data-dir", str(args.data_dir), "--device", str(args.device)]
        flags += ["--checkpoint-dir", folder, "--results-dir", folder]
        if args.limit:
            flags += ["--limit", str(args.limit)]
        code = train_custom.main(flags)
        if code:
            raise SystemExit(code)
        results = Path(folder) / "custom_cnn"
        config = json.loads((results / "config.json").read_text(encoding="utf-8"))
        test = json.loads((results / "test.json").read_text(encoding="utf-8"))
    settings = train_custom.parse(flags)
    job = common.Job(settings, common.splits(settings, args))
    return {
        "flop": common.training_flop(job.model, job.batches),
        "seconds": config["train_seconds"],
        "top1": test["top1"],
        "top1_tta": test["top1_tta"],
    }


def plain(epochs: int, seed: int, args: Namespace) -> dict[str, float]:
    """The tutorial's loop for as many epochs, constant learning rate, on all training images."""
    flags = ["--recipe", "classic", "--val-fraction", "0"]
    if args.limit:
        flags += ["--limit", str(args.limit)]
    settings = train_custom.parse(flags)
    splits = common.splits(settings, args)
    torch.manual_seed(seed)
    model = create_model("custom_cnn", {}, len(splits.classes))
    # The loop drops an epoch's partial batch.
    num_steps = epochs * (len(splits.train.labels) // settings.batch_size)
    images = common.plain_steps(splits.train, splits.stats, model, settings.batch_size, args.device)
    begin = now(args.device)
    count = sum(next(images) for _ in range(num_steps))
    seconds = now(args.device) - begin
    found = common.accuracies(model, splits.test, splits.stats)
    return {"flop": float(count * common.flop(model, 32)), "seconds": seconds, **found}


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each training, over its seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:  # equal in their operations too, or a recipe has changed meanwhile
        groups.setdefault((row["side"], row["epochs"], row["flop"]), []).append(row)
    lines = []
    for (side, epochs, flop), group in groups.items():
        top1 = common.mean_and_spread([100 * row["top1"] for row in group])
        tta = common.mean_and_spread([100 * row["top1_tta"] for row in group])
        minutes = statistics.mean(row["seconds"] for row in group) / 60
        lines.append(
            f"{side}, {epochs} epochs, {len(group)} seeds: {top1} %, with TTA {tta} %, "
            f"{flop / 1e15:.3f} PFLOP, {minutes:.2f} min"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="SIDE:EPOCHS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="images of each split, to try this out")
    args = parser.parse_args()
    rows = common.read_rows(args.output)
    for seed in args.seeds:
        for run in args.runs:
            side, _, epochs = run.partition(":")
            row = {"side": side, "epochs": int(epochs), "seed": seed, "limit": args.limit}
            if any(row.items() <= earlier.items() for earlier in rows):
                continue
            if side == "plain":
                figures = plain(int(epochs), seed, args)
            else:
                figures = ours(side, int(epochs), seed, args)
            rows.append(common.measured({**row, **figures}, args.device))
            write_json(args.output, {"rows": rows})
    print(summary(rows))


if __name__ == "__main__":
    main()
