"""The history of a training: a row of numbers an epoch, in history.csv and on the screen."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from storage.files import write_atomically


class Row(TypedDict):
    """An epoch in numbers: a plain dict, since states hold the history.

    Losses are in nats, accuracies fractions; both None where there is no validation split.
    """

    epoch: int  # from 1
    step: int  # of the whole training, at the epoch's end
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    images_per_second: float
    seconds: float  # of training since it began


COLUMNS = tuple(Row.__annotations__)
# Columns that depend on the machine's mood; all others repeat to the last digit.
TIMINGS = ("images_per_second", "seconds")

HEADER = (
    f"{'epoch':>7} {'lr':>7} {'train loss':>10} {'acc':>7} {'val loss':>8} {'acc':>7}"
    f" {'img/s':>7} {'elapsed':>7} {'left':>7}"
)


def begins_again(config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The epochs after which a training began again from its first weights (`engine.train`).

    Args:
        config: a run's settings; older runs have no `rounds`.
        history: its rows, as text or as numbers.
    """
    rounds = config.get("rounds") or 1
    epochs = config.get("epochs") or 0
    if rounds == 1 or epochs < rounds or not history:
        return []
    last_epoch = min(epochs, int(float(history[-1]["epoch"])))
    epochs_of_round = epochs // rounds
    return list(range(epochs_of_round, last_epoch, epochs_of_round))


def line(history: Sequence[Row], epochs: int, seconds_left: float) -> str:
    """The last row as text under `HEADER`; per cent, minutes since the training began and to go."""
    row = history[-1]
    val_loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
    val = "-" if row["val_accuracy"] is None else f"{100 * row['val_accuracy']:.2f}%"
    return (
        f"{row['epoch']:>3}/{epochs:<3} {row['lr']:>7.1e} {row['train_loss']:>10.4f}"
        f" {100 * row['train_accuracy']:>6.2f}% {val_loss:>8} {val:>7}"
        f" {row['images_per_second']:>7,.0f} {minutes(row['seconds'])} {minutes(seconds_left)}"
    )


def minutes(seconds: float) -> str:
    """Seconds as minutes:seconds, seven characters wide."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole:>4}:{rest:02}"


def write(path: Path, history: Iterable[Row]) -> None:
    """Writes history.csv whole; a missing validation value is an empty field."""
    lines = [",".join(COLUMNS)]
    for row in history:
        cells = ["" if row[name] is None else f"{row[name]:.8g}" for name in COLUMNS]
        lines.append(",".join(cells))
    write_atomically(path, "\n".join(lines) + "\n")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a history.csv as text; none where there is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
