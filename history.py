"""The history of a training: a row of numbers an epoch, in history.csv and on the screen."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from files import write_atomically

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "images_per_second",
    "seconds",
)
# Columns that depend on the machine's mood; all others repeat to the last digit.
TIMINGS = ("images_per_second", "seconds")

HEADER = (
    f"{'epoch':>7} {'lr':>8} {'train loss':>10} {'acc':>8} {'val loss':>8} {'acc':>8}"
    f" {'images/s':>8} {'elapsed':>7} {'left':>7}"
)


def line(history: Sequence[dict[str, Any]], epochs: int, seconds_before: float = 0.0) -> str:
    """The last row as text under `HEADER`; per cent, minutes since the training began and to go.

    Args:
        history: the rows so far.
        epochs: of the whole training.
        seconds_before: what of the first row's seconds was no epoch: features of a frozen trunk.
    """
    row = history[-1]
    val_loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
    val = "-" if row["val_accuracy"] is None else f"{100 * row['val_accuracy']:.2f} %"
    before = history[-2]["seconds"] if len(history) > 1 else seconds_before
    left = (row["seconds"] - before) * (epochs - row["epoch"])
    return (
        f"{row['epoch']:>3}/{epochs:<3} {row['lr']:>8.1e} {row['train_loss']:>10.4f}"
        f" {100 * row['train_accuracy']:>6.2f} % {val_loss:>8} {val:>8}"
        f" {row['images_per_second']:>8,.0f} {_minutes(row['seconds'])} {_minutes(left)}"
    )


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:>4}:{rest:02}"


def write(path: Path, history: Iterable[dict[str, Any]]) -> None:
    """Writes history.csv whole; a missing validation value is an empty field."""
    lines = [list(COLUMNS)] + [
        ["" if row[name] is None else f"{row[name]:.8g}" for name in COLUMNS] for row in history
    ]
    write_atomically(path, "".join(",".join(line) + "\n" for line in lines))
