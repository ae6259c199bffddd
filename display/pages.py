"""Pages to look at: one of a run, which follows it while it trains, and one of all runs.

They need no server and nothing from elsewhere. Numbers and texts are worked out here; the markup
stands in templates/, which escape every text. Plots are SVG in per cent, which fits any screen.
"""

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import metrics
from errors import printable
from storage.files import write_atomically
from storage.history import begins_again, minutes

Row = Mapping[str, Any]
Points = list[tuple[float, float]]
MARK = "<!doctype html><!-- written by cifar10-pytorch"  # how templates/base.html begins
PICTURES = {
    "batch.png": "What the network sees",
    "confusion_matrix.png": "Which classes it takes for which",
    "mistakes.png": "Mistakes it was sure of",
    "calibration.png": "How often it is right, by how sure it is",
    "first_layer.png": "What its first layer looks for",
}
FACTS = (
    "arch",
    "parameters",
    "start_weights",
    "data",
    "splits",
    "image_size",
    "precision",
    "revision",
    "date",
    "config",
)
LARGEST_DRAWN = 1e12  # a loss beyond it, or none, is left out of the curves
MIN_ERROR = 0.1  # per cent; where a test without an error stands on the logarithmic scale


class Tick(NamedTuple):
    """A number beside or below a plot."""

    at: float  # per cent of the plot, from the left or from the top
    name: str


class Axis(NamedTuple):
    """A range that a plot spans, with the round numbers in it."""

    low: float
    high: float
    ticks: dict[float, str]  # what stands at a value

    def from_left(self, value: float) -> float:
        """Where a value lies, in per cent of the plot's width."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def from_top(self, value: float) -> float:
        """Where a value lies, in per cent of the plot's height; SVG counts it downwards."""
        return round(100 * (self.high - value) / (self.high - self.low), 2)


class Line(NamedTuple):
    """A line of a chart: how it looks, and what is said of it above."""

    kind: str  # "step", "train" or "val", the style of templates/base.html
    label: str  # empty for none
    last: str
    points: str  # as SVG takes them, in per cent
    alone: bool  # a single point, which is drawn thick


class Chart(NamedTuple):
    """Lines over the same axes."""

    heading: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    marks: list[float]  # where a training begins again, per cent from the left


class Point(NamedTuple):
    """A run in the plot of all runs."""

    run: str
    page: str  # where its link leads
    x: float  # per cent from the left
    y: float  # per cent from the top
    accuracy: str
    minutes: str
    kind: str  # "usual", or "other" where it does not compare
    side: str  # where its name stands: "left", "right", or empty where there is no room


class Plot(NamedTuple):
    """All runs by minutes and accuracy."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]


def _shown(value: Any) -> Any:
    """What a template writes for a value: on one line, broken bytes as escapes, None as nothing."""
    if isinstance(value, Markup | int | float):  # only a template's own macros are Markup
        return value
    return "" if value in (None, "") else printable(value)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(run_dir: Path, content: Row) -> None:
    """Writes run_dir/index.html with the pictures there; it loads itself again while the run lives.

    Args:
        run_dir: the run's folder.
        content: what config.json holds (`name` and `command` must be there), `status` ("running",
            "stopped" or "finished"), `updated` (Unix time) and, where known, `note` (such as how to
            go on), `history` (rows of history.csv), `steps` ((step, loss, lr), some hundreds at
            most), `step`, `num_steps`, `seconds`, `seconds_left` and `report` (what test.json
            holds).
    """
    report = content.get("report") or {}
    history = content.get("history") or []
    steps = content.get("steps") or []
    share_done = None
    if not report:
        share_done = (content.get("step") or 0) / (content.get("num_steps") or 1)
    facts = dict(content.get("environment") or {})
    for name in FACTS:
        facts[name] = content.get(name)
    running = content["status"] == "running"
    _save(
        run_dir,
        "run.html",
        title=content["name"],
        updated=round(content["updated"]) if running else 0,
        status=content["status"],
        command=content["command"],
        changed=_text(content.get("changed")),
        note=content.get("note"),
        share_done=share_done,
        tiles=_tiles(content, report, history, steps),
        charts=_charts(history, steps, begins_again(content.get("config") or {}, history)),
        scores=_scores(report),
        pictures={file: text for file, text in PICTURES.items() if (run_dir / file).exists()},
        not_calibrated=bool(report) and report.get("temperature") is None,
        min_calibration=metrics.MIN_CALIBRATION,
        facts={name: _text(value) for name, value in facts.items() if value},
    )


def write_index(results_dir: Path, rows: Sequence[Row]) -> None:
    """Writes results_dir/index.html: rows of `tables.comparison_rows` as a plot and a table."""
    timed = [row for row in rows if row["seconds"]]
    plot = None
    usual = None
    if timed:
        usual = statistics.mode(row["hardware"] for row in timed)
        plot = _plot(timed, usual)
    lines = [
        {
            **row,
            "page": _page(row),
            "top1": _fixed(row["top1"], 100),
            "top1_tta": _fixed(row["top1_tta"], 100),
            "minutes": _fixed(row["seconds"], 1 / 60),
        }
        for row in rows
    ]
    _save(
        results_dir,
        "index.html",
        title="All runs",
        updated=0,
        plot=plot,
        hardware=usual,
        rows=lines,
    )


def _tiles(
    content: Row, report: Row, history: Sequence[Row], steps: Sequence[Sequence[float]]
) -> dict[str, str]:
    """The large numbers of a run, by their names; without those that are not known."""
    last = history[-1] if history else {}
    of = ""
    if report.get("n"):
        of = f" of {report['n']:,} images"
        if report.get("top1_interval"):  # older reports have none
            low, high = report["top1_interval"]
            of += f", 95 % interval {100 * low:.1f} to {100 * high:.1f}"
    tiles = {
        f"test accuracy (%){of}": _fixed(report.get("top1"), 100),
        f"with TTA, {report.get('tta')} (%)": _fixed(report.get("top1_tta"), 100),
        "validation accuracy (%)": _fixed(last.get("val_accuracy"), 100),
        "training accuracy (%)": _fixed(last.get("train_accuracy"), 100),
    }
    if steps and not report:
        tiles["training loss"] = _fixed(steps[-1][1])
    seconds = content.get("seconds") or content.get("train_seconds") or 0
    if content["status"] == "running":
        tiles["minutes of training"] = minutes(seconds)
        tiles["minutes left"] = minutes(content.get("seconds_left") or 0)
    elif seconds < 60:
        tiles["seconds of training"] = f"{seconds:.0f}"
    else:
        tiles["minutes of training"] = f"{seconds / 60:.1f}"
    return {name: value for name, value in tiles.items() if value}


def _scores(report: Row) -> list[dict[str, Any]]:
    """Rows of the table of classes, the mean last; none where the report has no such scores."""
    by_class = report.get("by_class")
    if not by_class:
        return []
    rows = [*by_class.items(), ("mean", report.get("macro") or {})]
    return [
        {
            "name": name,
            "images": scores.get("images"),
            "recall": _fixed(scores.get("recall"), 100),
            "precision": _fixed(scores.get("precision"), 100),
            "f1": _fixed(scores.get("f1"), 100),
        }
        for name, scores in rows
    ]


def _charts(
    history: Sequence[Row], steps: Sequence[Sequence[float]], begins: Sequence[int]
) -> list[Chart]:
    """Loss, accuracy and learning rate: by epoch, by step until the first epoch has ended."""
    epochs_per_step = 1.0
    unit = "step"
    if history:
        epochs_per_step = _number(history[-1]["epoch"]) / _number(history[-1]["step"])
        unit = "epoch"

    def column(name: str, scale: float = 1.0) -> Points:
        return [
            (epochs_per_step * _number(row["step"]), scale * _number(row.get(name)))
            for row in history
        ]

    losses = [(epochs_per_step * step, _number(loss)) for step, loss, _ in steps]
    rates = [(epochs_per_step * step, _number(rate)) for step, _, rate in steps]
    charts = [
        _chart(
            f"Loss (nats) by {unit}",
            {"step": losses, "train": column("train_loss"), "val": column("val_loss")},
            begins,
        ),
        _chart(
            f"Accuracy (%) by {unit}",
            {"train": column("train_accuracy", 100), "val": column("val_accuracy", 100)},
            begins,
        ),
        _chart(f"Learning rate by {unit}", {"train": rates or column("lr")}, begins),
    ]
    return [chart for chart in charts if chart.lines]


def _chart(heading: str, lines: dict[str, Points], begins: Sequence[float]) -> Chart:
    """A chart of the lines that have a finite number; of none, it has no lines.

    `begins` are the places on the x axis where a training began again.
    """
    finite = {}
    for kind, line in lines.items():
        points = [(x, y) for x, y in line if abs(x) < LARGEST_DRAWN and abs(y) < LARGEST_DRAWN]
        if points:
            finite[kind] = points
    if not finite:
        return Chart(heading, [], [], [], [])
    x_axis = _linear_axis([x for line in finite.values() for x, _ in line])
    y_axis = _linear_axis([y for line in finite.values() for _, y in line])
    labels = {"step": "each step", "train": "training", "val": "validation"}
    if len(finite) > 1:
        labels["step"] = ""  # the mean over the epoch says it
    drawn = []
    for kind, line in finite.items():
        twice = line + line[-1:]  # a line of one point is not drawn
        places = [f"{x_axis.from_left(x)},{y_axis.from_top(y)}" for x, y in twice]
        last = f"{line[-1][1]:.3g}"
        drawn.append(Line(kind, labels[kind], last, " ".join(places), alone=len(line) == 1))
    marks = [x_axis.from_left(x) for x in begins]
    return Chart(heading, _x_ticks(x_axis), _y_ticks(y_axis), drawn, marks)


def _plot(rows: Sequence[Row], usual: str | None) -> Plot:
    """Runs by minutes and accuracy, best first, hollow where they do not compare.

    Accuracy stands on a logarithmic scale of errors: on a linear one a single weak run would press
    all others into a line.
    """
    x_axis = _log_axis([row["seconds"] / 60 for row in rows], lambda minutes: f"{minutes:g}")
    errors = [max(100 - 100 * row["top1"], MIN_ERROR) for row in rows]
    down = _log_axis(errors, lambda error: f"{100 - error:.4g}" if error <= 100 else "")
    places = []
    for row, error in zip(rows, errors, strict=True):
        x = x_axis.from_left(math.log10(row["seconds"] / 60))
        places.append((x, down.from_left(math.log10(error))))  # few errors at the top
    taken = [(x - 1, x + 1, y) for x, y in places]  # left, right and height of what is drawn
    points = []
    for row, (x, y) in zip(rows, places, strict=True):
        run = printable(row["run"])
        side = _side(run, x, y, taken)
        compares = row["hardware"] == usual and row.get("limit") is None
        points.append(
            Point(
                run=run,
                page=_page(row),
                x=x,
                y=y,
                accuracy=_fixed(row["top1"], 100),
                minutes=_fixed(row["seconds"], 1 / 60),
                kind="usual" if compares else "other",
                side=side,
            )
        )
    y_ticks = [Tick(down.from_left(value), name) for value, name in down.ticks.items()]
    return Plot(_x_ticks(x_axis), y_ticks, points)


def _side(name: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """The side of a point on which its name covers nothing, which it then takes; else empty."""
    width = 2 + 0.8 * len(name)  # per cent of a screen of 900 pixels
    for side, left, right in (("right", x + 1, x + width), ("left", x - width, x - 1)):
        clear = all(abs(y - c) > 4 or left >= b or right <= a for a, b, c in taken)
        if clear and right < 104:
            taken.append((left, right, y))
            return side
    return ""


def _linear_axis(values: Sequence[float]) -> Axis:
    """A range with a margin around the values, and two to six round numbers in it."""
    low = min(values)
    high = max(values)
    if high > low:
        margin = 0.06 * (high - low)
    elif high != 0:
        margin = 0.1 * abs(high)
    else:
        margin = 1.0
    low -= margin
    high += margin
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if high - low <= 5 * factor * step)
    ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, {tick: f"{tick:.4g}" for tick in ticks})


def _log_axis(values: Sequence[float], name: Callable[[float], str]) -> Axis:
    """A range of decimal logarithms, a factor of four at least, with 1, 2, 5, 10 and so on in it.

    Args:
        values: what is shown, above 0.
        name: what stands at a value; where it is empty, nothing does.
    """
    logs = [math.log10(value) for value in values]
    middle = (min(logs) + max(logs)) / 2
    half = max(0.56 * (max(logs) - min(logs)), math.log10(2))
    low = middle - half
    high = middle + half
    ticks = {}
    for decade in range(math.floor(low), math.ceil(high)):
        for factor in (1, 2, 5):
            value = factor * 10.0**decade
            if low <= math.log10(value) <= high and name(value):
                ticks[math.log10(value)] = name(value)
    return Axis(low, high, ticks)


def _x_ticks(axis: Axis) -> list[Tick]:
    return [Tick(axis.from_left(value), name) for value, name in axis.ticks.items()]


def _y_ticks(axis: Axis) -> list[Tick]:
    return [Tick(axis.from_top(value), name) for value, name in axis.ticks.items()]


def _page(row: Row) -> str:
    """Where a run's page lies, as a link: by its bytes on disk, which need not be text."""
    return f"{quote(os.fsencode(row['run']))}/index.html"


def _text(value: Any) -> str:
    """A setting or fact as text; a dict as "key value, key value"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return "" if value is None else str(value)


def _number(value: Any) -> float:
    """A number that may be absent, or text as in history.csv."""
    return math.nan if value in (None, "") else float(value)


def _fixed(value: Any, scale: float = 1.0) -> str:
    return "" if value in (None, "") else f"{scale * float(value):.2f}"


def _save(folder: Path, template: str, **values: Any) -> None:
    page = TEMPLATES.get_template(template).render(values)
    write_atomically(folder / "index.html", page)
