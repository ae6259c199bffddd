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

from matplotlib.ticker import LogLocator

import finetune
from benchmarks import common
from config.recipes import BY_NETWORK
from reports import evaluation, figures, history
from storage.files import write_atomically

PALETTE = figures.BLUE, figures.ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
COLUMNS = (
    *("arch", "weights", "flags", "images", "epoch", "minutes", "val_accuracy"),
    *("precision", "hardware", "date"),
)


def train(flags: str, args: Namespace) -> list[dict[str, Any]]:
    """Trains once; returns a row for each epoch, with the minutes since the start."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(evaluation, "finish") as finish:
        options = ["--arch", args.arch, "--weights", args.weights, "--limit", str(args.limit)]
        options += ["--data-dir", str(args.data_dir), "--device", str(args.device)]
        options += ["--checkpoint-dir", folder, "--results-dir", folder, "--val-fraction", "0.1"]
        finetune.train(finetune.parse([*options, *shlex.split(flags)]), "")
    training = finish.call_args.args[0]  # what would judge on the test set is left out
    described = training.described
    same = {
        **{"arch": args.arch, "weights": Path(args.weights).name, "flags": flags},
        **{"images": described["splits"]["train"], "precision": described["precision"]},
        **{"hardware": described["environment"]["hardware"], "date": date.today().isoformat()},
    }
    return [
        same | {k: row[k] for k in ("epoch", "val_accuracy")} | {"minutes": minutes(row)}
        for row in training.rows
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


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy by minutes: a panel a network, a colour a machine, names beside.

    Args:
        rows: one an epoch, with `arch`, `hardware`, `flags` (which name the line), `minutes` and
            `val_accuracy` (fraction).
        path: the PNG.
    """
    panels: dict[str, dict] = {}
    for row in rows:
        line = row["flags"] or "defaults", row["hardware"]
        points = panels.setdefault(row["arch"], {}).setdefault(line, [])
        points.append((float(row["minutes"]), float(row["val_accuracy"])))
    title = "Fine-tuning: validation accuracy by training time"
    machines = list(dict.fromkeys(way[1] for ways in panels.values() for way in ways))
    heights = [1.3 + 0.2 * max(len(ways), 10) for ways in panels.values()]
    with figures.drawing(path, 10, 0.8 + sum(heights), title) as figure:
        grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
        for axes, (heading, ways) in zip(grid.flat, panels.items(), strict=True):
            ranked = sorted(ways.items(), key=lambda way: way[1][-1][1])
            for number, ((name, machine), line) in enumerate(ranked):
                line = [(max(minutes, 0.01), 100 * accuracy) for minutes, accuracy in line]
                colour = PALETTE[machines.index(machine) % len(PALETTE)]
                look = {"color": colour, "markevery": [len(line) - 1]}
                axes.plot(*zip(*line, strict=True), "o-", **look)
                # In a column, in the order of accuracy: no name covers another.
                beside = {"xytext": (1.05, (number + 0.5) / len(ranked)), "va": "center"}
                leader = {"arrowstyle": "-", "color": "#BBBBBB", "relpos": (0, 0.5)}
                beside |= {"textcoords": "axes fraction", "arrowprops": leader, "fontsize": 8}
                axes.annotate(figures.short(name, 60), line[-1], **beside)
            labels = {"xlabel": "minutes", "ylabel": "accuracy (%)"}
            figures.tidy(axes, title=heading, **labels, xscale="log")
            shortest, longest = axes.get_xlim()
            subs = (1, 2, 5) if longest > 10 * shortest else (1, 1.5, 2, 3, 5, 7)
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        for number, machine in enumerate(machines):
            look = {"color": PALETTE[number % len(PALETTE)], "label": figures.short(machine, 60)}
            grid[0, 0].plot([], [], "o", **look)
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)


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
    draw(lines, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
