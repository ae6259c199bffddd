"""Pages to look at: one of a run, which follows it while it trains, and one of all runs.

They need no server and nothing from elsewhere. Plots are SVG in per cent, which fits any screen.
"""

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from errors import printable
from reports.history import minutes
from storage.files import write_atomically

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]  # from numbers to per cent of a plot
MARK = "<!doctype html><!-- written by cifar10-pytorch"  # how every page begins
TEMPLATE = Template((Path(__file__).parent / "templates" / "base.html").read_text("utf-8"))
PICTURES = {
    "batch.png": "What the network sees",
    "confusion_matrix.png": "Which classes it takes for which",
    "mistakes.png": "Mistakes it was sure of",
    "calibration.png": "How often it is right, by how sure it is",
    "first_layer.png": "What its first layer looks for",
}
FACTS = "arch parameters start_weights data splits image_size precision revision date config"
COLUMNS = "run,network,recipe,weights,epochs,test %,with TTA %,minutes,limit,hardware,seed"
KINDS = {"step": "each step", "train": "training", "val": "validation"}


def write(run_dir: Path, content: Row) -> None:
    """Writes run_dir/index.html with the pictures there; it loads itself again while the run lives.

    `content` is what config.json holds (`name` and `command` must be there), `status` ("running",
    "stopped" or "finished"), `updated` (Unix time) and, where known, `note` (such as how to go on),
    `history` (rows of history.csv), `steps` ((step, loss, lr), some hundreds at most), `step`,
    `num_steps`, `seconds`, `seconds_left` and `report` (what test.json holds).
    """
    get, report, live = content.get, content.get("report") or {}, content["status"] == "running"
    history, steps = get("history") or [], get("steps") or []
    last, done = [{}, *history][-1], (get("step") or 0) / (get("num_steps") or 1)
    body = f"""<p><a href="../index.html">All runs</a></p>
<h1>{_text(content["name"])} <b>{_text(content["status"])}</b></h1>
<pre>{_text(content["command"])}</pre>
<p class="dim">Settings that differ from the recipe: {_text(get("changed")) or "none"}</p>
<p id="news">{_text(get("note"))}</p>{"" if report else f'<progress value="{done}"></progress>'}"""
    tiles = {
        "test accuracy (%)": _fixed(report.get("top1"), 100),
        f"with TTA, {report.get('tta')} (%)": _fixed(report.get("top1_tta"), 100),
        "validation accuracy (%)": _fixed(last.get("val_accuracy"), 100),
        "training accuracy (%)": _fixed(last.get("train_accuracy"), 100),
        "training loss": _fixed(steps[-1][1]) if steps and not report else "",
        "minutes of training": minutes(get("seconds") or get("train_seconds") or 0),
        "minutes left": minutes(get("seconds_left") or 0) if live else "",
    }
    cells = (f"<div><b>{v}</b><span>{_text(k)}</span></div>" for k, v in tiles.items() if v)
    body += f'<div class="tiles">{"".join(cells)}</div>{_curves(history, steps)}'
    if scores := report.get("by_class"):
        keys, scores = ("recall", "precision", "f1"), {**scores, "mean": report.get("macro") or {}}
        rows = [(_text(k), *(_fixed(v.get(key), 100) for key in keys)) for k, v in scores.items()]
        body += f"<h2>By class</h2>{_table('class,accuracy (recall) %,precision %,F1 %', rows)}"
    there = {name: text for name, text in PICTURES.items() if (run_dir / name).exists()}
    body += "".join(f'<h2>{v}</h2><img src="{k}" alt="{v}">' for k, v in there.items())
    facts = {**(get("environment") or {}), **{key: get(key) for key in FACTS.split()}}
    pairs = (f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items() if v)
    body += f"<h2>How it was made</h2><dl>{''.join(pairs)}</dl>"
    _save(run_dir, content["name"], body, content["updated"] if live else 0)


def write_index(results_dir: Path, rows: Sequence[Row]) -> None:
    """Writes results_dir/index.html: rows of `tables.comparison_rows` as a plot and a table."""
    rows = [{**row, "page": f"{quote(os.fsencode(row['run']))}/index.html"} for row in rows]
    body = "<h1>All runs</h1>"
    if timed := [row for row in rows if row["seconds"]]:
        usual = statistics.mode(row["hardware"] for row in timed)
        points = [(math.log10(row["seconds"] / 60), 100 * row["top1"]) for row in timed]
        times = (m * 10.0**n for n in range(-3, 6) for m in (1, 2, 5))
        marks, place = _grid(points, {math.log10(time): time for time in times})
        places = [place(*point) for point in points]
        taken = [(x - 1, x + 1, y) for x, y in places]
        for row, (x, y) in zip(timed, places, strict=True):  # the best first
            name, mark = _text(row["run"]), f'<circle cx="{x:.1f}%" cy="{y:.1f}%" r="5"/>'
            end = x + 2 + 0.75 * len(name)  # in per cent of a wide screen
            sides = (x + 1, end, 'dx="9"'), (2 * x - end, x - 1, 'class="y" dx="-9"')
            for left, right, look in sides:
                clear = (abs(y - c) > 4 or left >= b or right <= a for a, b, c in taken)
                if right < 104 and all(clear):
                    taken.append((left, right, y))
                    mark += f'<text x="{x:.1f}%" y="{y:.1f}%" dy="4" {look}>{name}</text>'
                    break
            like = "usual" if row["hardware"] == usual and row.get("limit") is None else "other"
            marks += f'<a class="{like}" href="{row["page"]}"><title>{name}</title>{mark}</a>'
        body += f"""<p class="dim">Test accuracy (%) by minutes of training. Hollow: part of the
data, or other hardware than {_text(usual)}.</p><svg class="plot tall">{marks}</svg>"""
    cells = [
        (
            f'<a href="{row["page"]}">{_text(row["run"])}</a>',
            *(_text(row[key]) for key in ("network", "recipe", "weights", "epochs")),
            *(_fixed(row["top1"], 100), _fixed(row["top1_tta"], 100)),
            _fixed(row["seconds"], 1 / 60),
            *(_text(row.get(key)) for key in ("limit", "hardware", "seed")),
        )
        for row in rows
    ]
    _save(results_dir, "All runs", body + _table(COLUMNS, cells), 0)


def _curves(history: Sequence[Row], steps: Sequence[Sequence[float]]) -> str:
    """Loss, accuracy and learning rate: by step until the first epoch has ended."""

    def number(value: Any) -> float:
        return math.nan if value in (None, "") else float(value)

    def column(name: str, factor: float = 1.0) -> Points:
        return [(share * number(row["step"]), factor * number(row.get(name))) for row in history]

    share = number(history[-1]["epoch"]) / number(history[-1]["step"]) if history else 1.0
    losses, rates = ([(share * number(s[0]), number(s[i])) for s in steps] for i in (1, 2))
    charts = {
        "Loss (nats)": {"step": losses, "train": column("train_loss"), "val": column("val_loss")},
        "Accuracy (%)": {k: column(f"{k}_accuracy", 100) for k in ("train", "val")},
        "Learning rate": {"train": rates or column("lr")},
    }
    body, unit = "", "epoch" if history else "step"
    for heading, lines in charts.items():
        lines = {k: [p for p in line if all(abs(v) < 1e12 for v in p)] for k, line in lines.items()}
        if not (lines := {kind: line for kind, line in lines.items() if line}):
            continue  # no finite number
        (marks, place), key = _grid([point for line in lines.values() for point in line]), ""
        for kind, line in lines.items():
            places = (place(*point) for point in (*line, line[-1]))  # twice: one alone is unseen
            path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
            alone = " alone" * (len(line) == 1)
            marks += f'<svg class="{kind}{alone}" viewBox="0 0 100 100" preserveAspectRatio="none">'
            marks += f'<polyline points="{path}"/></svg>'
            if kind != "step" or len(lines) == 1:
                key += f'<span class="{kind}">{KINDS[kind]} <b>{line[-1][1]:.3g}</b></span>'
        body += f'<div><h3>{heading} by {unit}</h3><p class="key">{key}</p>'
        body += f'<svg class="plot">{marks}</svg></div>'
    return f"""<h2>Learning curves</h2><p class="dim">Training: augmented images, weights still
moving, label smoothing in the loss. Validation: images as they are, weights at the epoch's end.</p>
<div class="charts">{body}</div>"""


def _grid(points: Points, names: Mapping[float, float] | None = None) -> tuple[str, Place]:
    """A grid that spans the points, with `names` below it, and what maps numbers to per cent."""
    (left, right, x_ticks), (low, high, y_ticks) = map(_axis, zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        return 100 * (x - left) / (right - left), 100 * (high - y) / (high - low)

    grid = ""
    for tick in y_ticks:
        y = f'{place(left, tick)[1]:.2f}%"'
        grid += f'<line x2="100%" y1="{y} y2="{y}/>'
        grid += f'<text class="y" x="-8" y="{y} dy="4">{tick:.4g}</text>'
    for tick, name in (names or {tick: tick for tick in x_ticks}).items():
        if left <= tick <= right:
            x = f"{place(tick, low)[0]:.2f}%"
            grid += f'<text class="x" x="{x}" y="100%" dy="18">{name:.4g}</text>'
    return grid, place


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """A range with a margin, and two to six round numbers in it."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if high - low <= 5 * factor * step)
    return low, high, [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _table(heads: str, rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th><button>{name}</button></th>" for name in heads.split(","))
    lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f"""<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{lines}</tbody></table></div>"""


def _text(value: Any) -> str:
    """A value from outside as HTML; a dict as "key value, key value"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(key)} {_text(item)}" for key, item in value.items())
    return "" if value is None else escape(printable(value))


def _fixed(value: Any, scale: float = 1.0) -> str:
    return "" if value in (None, "") else f"{scale * float(value):.2f}"


def _save(folder: Path, title: str, body: str, updated: float) -> None:
    page = TEMPLATE.substitute(title=_text(title), body=body, updated=f"{updated:.0f}")
    write_atomically(folder / "index.html", page)
