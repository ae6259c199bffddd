"""Accuracy against minutes for ways to fine-tune: input size, what trains, learning rate.

Every try is `finetune.py`'s own training on the first images alone, judged on 5,000 that are split
off from the training set; the test set is never judged on. A try is the script's flags as one text:

    python benchmarks/finetuning.py --arch resnet18 --tries "--image-size 64" "--image-size 96"

What was tried before stays in the csv; the figure shows all of it, and the committed full runs.
"""

import csv
import io
import json
import shlex
import sys
import tempfile
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import figures
import finetune
from benchmarks import common
from runs import history, reports
from runs.recipes import BY_NETWORK
from storage.files import write_atomically

COLUMNS = (
    *("arch", "weights", "flags", "images", "epoch", "minutes", "val_accuracy"),
    *("precision", "hardware", "date"),
)


def train(flags: str, args: Namespace) -> list[dict[str, Any]]:
    """Trains once; returns a row for each epoch, with the minutes since the start."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(reports, "finish") as finish:
        options = ["--arch", args.arch, "--weights", args.weights, "--limit", str(args.limit)]
        options += ["--data-dir", str(args.data_dir), "--device", str(args.device)]
        options += ["--checkpoint-dir", folder, "--results-dir", folder, "--val-fraction", "0.1"]
        finetune.train(finetune.parse([*options, *shlex.split(flags)]), "")
    training, _, _, rows, *_ = finish.call_args.args  # what would judge on the test set is left out
    described = training.described
    same = {
        **{"arch": args.arch, "weights": Path(args.weights).name, "flags": flags},
        **{"images": described["splits"]["train"], "precision": described["precision"]},
        **{"hardware": described["environment"]["hardware"], "date": date.today().isoformat()},
    }
    return [
        same | {k: row[k] for k in ("epoch", "val_accuracy")} | {"minutes": minutes(row)}
        for row in rows
    ]


def minutes(row: dict[str, Any]) -> float:
    """Minutes of a row of the history."""
    return round(float(row["seconds"]) / 60, 2)


def full_runs(results_dir: Path) -> list[dict[str, Any]]:
    """Rows of the finished fine-tuning runs, by epoch, for the figure."""
    rows = []
    for path in sorted(results_dir.glob("*/test.json")):  # which a run writes last
        run = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        same = {"arch": run["arch"], "flags": f"full run {run['name']}"}
        same["hardware"] = run["environment"]["hardware"]
        rows += [
            same | {"val_accuracy": row["val_accuracy"], "minutes": minutes(row)}
            for row in history.read(path.with_name("history.csv"))
            if row["val_accuracy"] and run["arch"] in BY_NETWORK
        ]
    return rows


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.set_defaults(output=common.RESULTS / "finetuning.csv")
    parser.add_argument("--arch", choices=BY_NETWORK, default="resnet18")
    parser.add_argument("--tries", nargs="*", default=[], metavar="FLAGS")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--limit", type=int, default=8000, help="training images")
    parser.add_argument("--runs", type=Path, default=common.RESULTS.parent / "reference")
    args = parser.parse_args()
    rows = history.read(args.output)
    for flags in args.tries:
        rows += train(flags, args)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(args.output, text.getvalue())
    lines = [row | {"flags": f"{row['flags']} ({int(row['images']):,} images)"} for row in rows]
    lines += full_runs(args.runs)
    if not lines:
        parser.error("nothing tried yet: give --tries FLAGS ...")
    lines.sort(key=lambda row: (list(BY_NETWORK).index(row["arch"]), row["hardware"]))
    figures.accuracy_by_minutes(lines, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
