"""Tables that compare finished runs, made from their config.json and test.json."""

import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from config.settings import ABSENT, WITHOUT_EFFECT
from display import pages
from errors import printable
from storage.files import locked, tell, write_atomically

Row = dict[str, Any]
FEW_IMAGES = 1000  # an accuracy on fewer test images says how many there were

HEADER = """\
# Results

Written at the end of every training, and by `python evaluate.py`, from the `config.json` and
`test.json` of every run; changes made here by hand are lost.

Test accuracy is the top-1 accuracy on the test split, which a training reads once, after its last
epoch; with TTA, the predictions for several views of each image are averaged. A recipe's name is
followed by the settings that were changed; it means what it meant on the row's date, and
`config.json` holds all settings. Start weights are those training began from. Parameters
are all of the network's, in millions. Minutes are those of training, on the hardware named beside
them. A run on part of the data says so beside its accuracy: it does not compare with the others.

"""


def comparison_rows(results_dir: Path) -> list[Row]:
    """One row for every finished run in results_dir/*/{config.json,test.json}, best first.

    A run whose files cannot be read costs one line on stderr, not the table; one that has no test
    result yet is left out. Runs on part of the data come last.

    Returns:
        Rows with `run`, `network`, `recipe`, `weights`, `epochs`, `top1` and `top1_tta`
        (fractions), `tta` (the views of the latter), `num_test` (images), `limit`, `parameters`,
        `seconds`, `hardware`, `seed`, `date` and `settings` (equal for runs that differ in their
        seed alone); None for what a file does not say.
    """
    rows = []
    for path in sorted(results_dir.glob("*/test.json")):
        try:
            rows.append(_row(path.parent))
        except (OSError, ValueError, AttributeError, TypeError) as error:  # odd JSON
            tell(f"{path.parent}: left out, {error}")
    return sorted(rows, key=lambda row: (row["limit"] is not None, -row["top1"]))


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
        "Epochs": lambda row: _escape(row["epochs"]),
        "Hardware": lambda row: _escape(row["hardware"]),
    }
    run = {
        "Run": lambda row: f"[{_escape(row['run'])}]({quote(os.fsencode(row['run']))}/)",
        **setting,
        "Test accuracy (%)": lambda row: _percent(row["top1"]) + _part(row),
        "With TTA (%)": lambda row: _percent(row["top1_tta"]) + _views(row) + _part(row),
        "Parameters (M)": lambda row: _scaled(row["parameters"], 1e6),
        "Minutes": lambda row: _scaled(row["seconds"], 60),
        "Seed": lambda row: _escape(row["seed"]),
        "Date": lambda row: _escape(row["date"]),
    }
    text = _markdown(run, rows)

    by_settings: dict[str, dict[Any, Row]] = defaultdict(dict)
    for row in rows:  # best first, so that of equal seeds the least accurate stays
        if row["limit"] is None:
            by_settings[row["settings"]][row["seed"]] = row
    repeated = []
    for by_seed in by_settings.values():
        if len(by_seed) > 1:
            runs = list(by_seed.values())
            repeated.append({**runs[0], "runs": runs})
    if repeated:
        spread = {
            **setting,
            "Runs": lambda row: str(len(row["runs"])),
            "Test accuracy (%)": lambda row: _spread(row["runs"], "top1"),
            "With TTA (%)": lambda row: _spread_over_views(row["runs"]),
            "Minutes": lambda row: _mean_minutes(row["runs"]),
        }
        text += "\nMean ± standard deviation over runs that differ in their seed alone:\n\n"
        text += _markdown(spread, repeated)
    return text


def terminal_table(rows: Sequence[Row]) -> str:
    """The runs as aligned text within 80 columns; long names are cut."""
    if not rows:
        return "no finished run yet"
    lines = [_terminal_line("run", "network", "epochs", "test %", "TTA %", "minutes", "")]
    for row in rows:
        line = _terminal_line(
            printable(row["run"]),
            printable(_text(row["network"])),
            _text(row["epochs"]),
            _percent(row["top1"]),
            _percent(row["top1_tta"]),
            _scaled(row["seconds"], 60),
            "" if row["limit"] is None else "on part",
        )
        lines.append(line)
    return "\n".join(lines)


def _terminal_line(
    run: str, network: str, epochs: str, top1: str, tta: str, minutes: str, note: str
) -> str:
    cells = f"{run:<23.23} {network:<18.18} {epochs:>6} {top1:>6} {tta:>6} {minutes:>7} {note}"
    return cells.rstrip()


def write(results_dir: Path) -> list[Row]:
    """Writes the tables of all runs, README.md and index.html, and returns their rows."""
    with locked(results_dir / "README.lock", wait=True):  # or a run that ends meanwhile is lost
        rows = comparison_rows(results_dir)
        readme_path = results_dir / "README.md"
        if _is_ours(readme_path, HEADER[:60]):
            write_atomically(readme_path, HEADER + comparison_table(rows))
        index_path = results_dir / "index.html"
        if _is_ours(index_path, pages.MARK):
            pages.write_index(results_dir, rows)
    return rows


def _is_ours(path: Path, beginning: str) -> bool:
    """Whether a table may be written there; a file that the user put there is kept, and said."""
    if not path.exists() or path.read_text("utf-8", "replace").startswith(beginning):
        return True
    print(f"warning: {printable(path)} is no table of runs and left as it is")
    return False


def _row(run_dir: Path) -> Row:
    run = _read(run_dir / "config.json")
    test = _read(run_dir / "test.json")
    top1 = test.get("top1")
    if not (isinstance(top1, float | int) and 0 <= top1 <= 1):  # NaN fails too
        raise ValueError(f"top1 {top1!r} in test.json must be a fraction in [0, 1]")
    numbers = {
        "top1_tta": test.get("top1_tta"),
        "n": test.get("n"),
        "train_seconds": run.get("train_seconds"),
    }
    for name, value in numbers.items():
        if not isinstance(value, float | int | None):
            raise ValueError(f"its {name} {value!r} is no number")
    config = run.get("config", {})
    environment = run.get("environment", {})
    return {
        "run": run_dir.name,
        "network": run.get("arch"),
        "recipe": _recipe(config, run.get("changed", {})),
        "weights": Path(config.get("weights") or "none").name,
        "epochs": config.get("epochs"),
        "top1": top1,
        "top1_tta": numbers["top1_tta"],
        "tta": None if numbers["top1_tta"] is None else test.get("tta"),
        "num_test": numbers["n"],
        "limit": config.get("limit"),
        "parameters": run.get("parameters", {}).get("total"),
        "seconds": numbers["train_seconds"],
        "hardware": environment.get("hardware"),
        "seed": config.get("seed"),
        "date": run.get("date"),
        "settings": _settings(run, config, environment, numbers["n"]),
    }


def _recipe(config: dict[str, Any], changed: dict[str, Any]) -> str | None:
    """The recipe's name, followed by the settings that differ from it."""
    name = config.get("recipe")
    if not name and config.get("unfreeze"):
        name = f"fine-tune {config['unfreeze']}"
    more = [f"{key} {value}" for key, value in changed.items() if key != "unfreeze"]
    return f"{name} ({', '.join(more)})" if more else name


def _settings(
    run: dict[str, Any], config: dict[str, Any], environment: dict[str, Any], num_test: int | None
) -> str:
    """All that a result depends on but for the seed, as text that is equal for equal runs."""
    ignored = {
        "seed",
        "run_name",
        "device",
        "network",
        *WITHOUT_EFFECT,
    }  # "surgery" says the network's
    settings = {key: value for key, value in (ABSENT | config).items() if key not in ignored}
    network = {"momentum": 0.1} | (run.get("surgery") or {})
    result_depends_on = {
        "settings": settings,
        "arch": run.get("arch"),
        "network": network,
        "start_weights": run.get("start_weights") or {"source": "random"},
        "precision": run.get("precision"),
        "hardware": environment.get("hardware"),
        "num_test": num_test,
    }
    return json.dumps(result_depends_on, sort_keys=True)


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


def _part(row: Row) -> str:
    """What an accuracy is of, where that is not the whole of a large test split."""
    notes = []
    if row["limit"] is not None:
        notes.append(f"first {row['limit']:,} images")
    if row["num_test"] is not None and row["num_test"] < FEW_IMAGES:
        notes.append(f"tested on {row['num_test']:,}")
    return f" ({', '.join(notes)})" if notes else ""


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"


def _spread(runs: Sequence[Row], key: str) -> str:
    values = [100 * row[key] for row in runs if row[key] is not None]
    if len(values) < len(runs):  # a mean over fewer runs than the table says would mislead
        return "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _spread_over_views(runs: Sequence[Row]) -> str:
    """The spread with TTA; runs over different views have none in common."""
    if len({row["tta"] for row in runs}) > 1:
        return "-"
    return _spread(runs, "top1_tta") + _views(runs[0])


def _views(row: Row) -> str:
    """What an accuracy with TTA is averaged over, where that is known."""
    return "" if row["tta"] is None else f" ({_escape(row['tta'])})"


def _mean_minutes(runs: Sequence[Row]) -> str:
    seconds = [row["seconds"] for row in runs]
    return "-" if None in seconds else _scaled(statistics.mean(seconds), 60)


def _escape(value: Any) -> str:
    """Text that Markdown shows as it is, in one table cell; underscores inside words are safe."""
    text = "-" if value in (None, "") else printable(value)
    return re.sub(r"[\\`*|<>&~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _markdown(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """A table with a line for each row, its cells made by the functions beside the headings."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([cell(row) for cell in columns.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
