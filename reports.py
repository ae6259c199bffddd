"""What finished runs leave behind: `test.json` with its pictures, and tables that compare runs."""

import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from torch import Tensor

import metrics
from config import HARMLESS
from files import locked, write_atomically, write_json

Row = dict[str, Any]
BINDING = ("arch", "surgery", "precision", "start_weights")  # a result depends on these as well

HEADER = """\
# Results

Written at the end of every training, and by `python evaluate.py`, from the `config.json` and
`test.json` of every run; changes made here by hand are lost.

Test accuracy is the top-1 accuracy on the test split, which a training reads once, after its last
epoch; with TTA, the predictions for several views of each image are averaged. Start weights are
those training began from. Parameters are all of the network's, in millions. Minutes are those of
training, on the hardware named beside them.

"""


def write_test_report(
    run_dir: Path,
    *,
    logits: Tensor,
    labels: Tensor,
    logits_tta: Tensor | None,
    temperature: float | None,
    images: np.ndarray | Tensor,
    classes: Sequence[str],
    name: str,
    extra: dict[str, Any],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `test.json` and the pictures of a run.

    The pictures are confusion_matrix.png, mistakes.png, calibration.png and, where the folder has a
    history.csv, curves.png.

    Args:
        run_dir: the run's folder in results/; made where absent.
        logits: (N, C) of the test split without augmentation.
        labels: (N,) int64.
        logits_tta: (N, C) with test-time augmentation; None without.
        temperature: fitted on the validation split; None where there was none.
        images: (N, 32, 32, 3) uint8, in the order of the labels.
        classes: C names.
        name: the run's name, which titles the pictures.
        earlier: a report on the same checkpoint, whose test-time augmentation is kept where there
            is none now.
        extra: further JSON-safe entries, such as the checkpoint's hash, device, seconds and date.

    Returns:
        What test.json holds: `name`, `metrics.summarize` and `extra`.

    Raises:
        ValueError: see `metrics.summarize`.
        OSError: a file cannot be written.
    """
    import figures  # half a second that a table of runs need not pay

    summary = metrics.summarize(logits, labels, temperature, logits_tta, classes=classes)
    report = {"name": name, **summary, **extra}
    if logits_tta is None and earlier:
        report |= {key: earlier[key] for key in ("tta", "top1_tta") if key in earlier}
    write_json(run_dir / "test.json", report)

    matrix = metrics.confusion_matrix(logits, labels)
    figures.confusion_matrix(matrix, classes, run_dir / "confusion_matrix.png", name)
    figures.mistakes(images, labels, logits, classes, run_dir / "mistakes.png", name)
    figures.calibration(logits, labels, temperature, run_dir / "calibration.png", name)
    history_path = run_dir / "history.csv"
    if history_path.exists():
        with open(history_path, newline="", encoding="utf-8") as file:
            history = list(csv.DictReader(file))
        if history:
            figures.curves(history, run_dir / "curves.png", name)
    return report


def read_test_report(run_dir: Path) -> dict[str, Any]:
    """The test.json of a run; empty where there is none that can be read."""
    try:
        return _read(run_dir / "test.json")
    except (OSError, ValueError):
        return {}


def per_class_table(summary: dict[str, Any]) -> str:
    """Accuracy of each class in per cent, a line each and the mean over all images last.

    Args:
        summary: of `metrics.summarize` or `write_test_report`.
    """
    lines = {**summary["per_class"], "all": summary["top1"]}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {_percent(value):>6} %" for name, value in lines.items())


def comparison_rows(results_dir: Path) -> list[Row]:
    """One row for every finished run in results_dir/*/{config.json,test.json}, best first.

    A run whose files are missing or cannot be read costs one line on stderr, not the table.

    Returns:
        Rows with `run`, `network`, `recipe`, `weights`, `epochs`, `top1` and `top1_tta`
        (fractions), `parameters`, `seconds`, `hardware`, `seed`, `date` and `settings` (equal for
        runs that differ in their seed alone); None for what a file does not say.
    """
    rows = []
    names = {"config.json", "test.json"}
    files = (path for path in sorted(results_dir.glob("*/*.json")) if path.name in names)
    for run_dir in dict.fromkeys(path.parent for path in files):
        try:
            rows.append(_row(run_dir))
        except FileNotFoundError as error:
            print(f"{run_dir}: left out, no {Path(error.filename).name}", file=sys.stderr)
        except (OSError, ValueError, AttributeError, TypeError) as error:  # odd JSON
            print(f"{run_dir}: left out, {error}", file=sys.stderr)
    return sorted(rows, key=lambda row: -row["top1"])


def comparison_table(rows: Sequence[Row]) -> str:
    """A Markdown table of the runs, and a second one over seeds where a setting has several.

    The spread is the standard deviation of a sample (n - 1). Of runs with equal settings and equal
    seeds only one counts, the least accurate: repeating a seed says nothing about the spread.
    """
    if not rows:
        return "No finished run yet.\n"
    setting = {
        "Network": lambda row: _escape(row["network"]),
        "Recipe": lambda row: _escape(row["recipe"]),
        "Start weights": lambda row: _escape(row["weights"]),
        "Epochs": lambda row: _text(row["epochs"]),
    }
    run = {
        "Run": lambda row: f"[{_escape(row['run'])}]({quote(row['run'])}/)",
        **setting,
        "Test accuracy (%)": lambda row: _percent(row["top1"]),
        "With TTA (%)": lambda row: _percent(row["top1_tta"]),
        "Parameters (M)": lambda row: _scaled(row["parameters"], 1e6),
        "Minutes": lambda row: _scaled(row["seconds"], 60),
        "Hardware": lambda row: _escape(row["hardware"]),
        "Seed": lambda row: _text(row["seed"]),
        "Date": lambda row: _escape(row["date"]),
    }
    text = _markdown(run, rows)

    by_seed = defaultdict(dict)
    for row in rows:
        by_seed[row["settings"]][row["seed"]] = row
    groups = [list(group.values()) for group in by_seed.values()]
    repeated = [{**group[0], "runs": group} for group in groups if len(group) > 1]
    if repeated:
        spread = {
            **setting,
            "Runs": lambda row: str(len(row["runs"])),
            "Test accuracy (%)": lambda row: _spread(row["runs"], "top1"),
            "With TTA (%)": lambda row: _spread(row["runs"], "top1_tta"),
        }
        text += "\nMean ± standard deviation over runs that differ in their seed alone:\n\n"
        text += _markdown(spread, repeated)
    return text


def terminal_table(rows: Sequence[Row]) -> str:
    """The runs as aligned text within 80 columns; long names are cut."""
    if not rows:
        return "no finished run yet"
    lines = [("run", "network", "epochs", "test %", "TTA %", "minutes")]
    for row in rows:
        accuracies = _percent(row["top1"]), _percent(row["top1_tta"])
        minutes = _scaled(row["seconds"], 60)
        lines.append(
            (row["run"], _text(row["network"]), _text(row["epochs"]), *accuracies, minutes)
        )
    return "\n".join(
        f"{run:<26.26}  {network:<18.18}  {epochs:>6}  {top1:>6}  {tta:>6}  {minutes:>7}"
        for run, network, epochs, top1, tta, minutes in lines
    )


def write_results_readme(results_dir: Path) -> list[Row]:
    """Writes results_dir/README.md, the table of all runs, and returns its rows."""
    with locked(results_dir / "README.lock", wait=True):  # or a run that ends meanwhile is lost
        rows = comparison_rows(results_dir)
        write_atomically(results_dir / "README.md", HEADER + comparison_table(rows))
    return rows


def _row(run_dir: Path) -> Row:
    run, test = _read(run_dir / "config.json"), _read(run_dir / "test.json")
    top1 = test.get("top1")
    if not (isinstance(top1, float | int) and 0 <= top1 <= 1):  # NaN fails too
        raise ValueError(f"top1 {top1!r} in test.json must be a fraction in [0, 1]")
    config = run.get("config", {})
    settings = {
        key: value for key, value in config.items() if key not in {"seed", "run_name", *HARMLESS}
    }
    unfreeze = config.get("unfreeze")
    return {
        "run": run_dir.name,
        "network": run.get("arch"),
        "recipe": config.get("recipe") or (f"fine-tune {unfreeze}" if unfreeze else None),
        "weights": Path(config.get("weights") or "none").name,
        "epochs": config.get("epochs"),
        "top1": top1,
        "top1_tta": test.get("top1_tta"),
        "parameters": run.get("parameters", {}).get("total"),
        "seconds": run.get("train_seconds"),
        "hardware": run.get("environment", {}).get("hardware"),
        "seed": config.get("seed"),
        "date": run.get("date"),
        "settings": json.dumps([settings, *map(run.get, BINDING)], sort_keys=True),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"


def _spread(runs: Sequence[Row], key: str) -> str:
    values = [100 * row[key] for row in runs if row[key] is not None]
    if len(values) < len(runs):  # a mean over fewer runs than the table says would mislead
        return "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _escape(value: Any) -> str:
    """Text that Markdown shows as it is, in one table cell; underscores inside words are safe."""
    text = " ".join(_text(value).split())
    return re.sub(r"[\\`*|<>&~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _markdown(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """A table with a line for each row, its cells made by the functions beside the headings."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
