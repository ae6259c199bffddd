"""Accuracy against minutes for ways to fine-tune: input size, what trains, learning rate.

Every try is `finetune.py`'s own training on the first images alone, judged on 5,000 that are split
off from the training set; the test set is never read. A try is the flags of the script as one text:

    python benchmarks/finetuning.py --arch resnet18 --tries "--image-size 64" "--image-size 96"

What was tried before stays in the csv; the figure shows all of it, and the committed full runs.
"""

import argparse
import csv
import io
import json
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import figures
import finetune
import runs
from files import write_atomically
from models import ARCHS

COLUMNS = (
    *("arch", "weights", "flags", "images", "epoch", "minutes", "val_accuracy"),
    *("precision", "hardware", "date"),
)


def train(flags: list[str], data_dir: Path) -> list[dict[str, Any]]:
    """Trains once; returns a row for each epoch, with the minutes since the start."""
    with tempfile.TemporaryDirectory() as folder:
        folders = ["--data-dir", str(data_dir), "--checkpoint-dir", folder, "--results-dir", folder]
        config = finetune.parse([*flags, "--val-fraction", "0.1", *folders])
        with runs.claim(config, config.arch, "") as run:
            described, _, history = finetune.fit(config, run, finetune.load(config))
    return [
        {
            "weights": Path(config.weights).name,
            "images": described["splits"]["train"],
            "epoch": row["epoch"],
            "minutes": round(row["seconds"] / 60, 2),
            "val_accuracy": row["val_accuracy"],
            "precision": described["precision"],
            "hardware": described["environment"]["hardware"],
            "date": date.today().isoformat(),
        }
        for row in history
    ]


def full_runs(results_dir: Path) -> list[dict[str, Any]]:
    """Rows of the finished fine-tuning runs, by epoch, for the figure."""
    rows = []
    for path in sorted(results_dir.glob("*/test.json")):  # which a run writes last
        run = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        if run["arch"] in ARCHS:
            with open(path.with_name("history.csv"), newline="", encoding="utf-8") as file:
                rows += [
                    {
                        "arch": run["arch"],
                        "hardware": run["environment"]["hardware"],
                        "flags": f"full run {run['name']}",
                        "minutes": float(row["seconds"]) / 60,
                        "val_accuracy": row["val_accuracy"],
                    }
                    for row in csv.DictReader(file)
                    if row["val_accuracy"]
                ]
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=ARCHS, default="resnet18")
    parser.add_argument("--tries", nargs="*", default=[], metavar="FLAGS")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--limit", type=int, default=8000, help="training images")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    args = parser.parse_args()
    path = args.results_dir / "finetuning.csv"
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    for flags in args.tries:
        common = ["--arch", args.arch, "--weights", args.weights, "--limit", str(args.limit)]
        for row in train([*common, *shlex.split(flags)], args.data_dir):
            rows.append({"arch": args.arch, "flags": flags, **row})
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())
    lines = [row | {"flags": f"{row['flags']} ({int(row['images']):,} images)"} for row in rows]
    lines += full_runs(args.results_dir)
    if not lines:
        parser.error("nothing tried yet: give --tries FLAGS ...")
    lines.sort(key=lambda row: (list(ARCHS).index(row["arch"]), row["hardware"]))
    figures.accuracy_by_minutes(lines, args.results_dir / "finetuning.png")


if __name__ == "__main__":
    main()
