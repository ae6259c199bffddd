"""What a trained network takes pictures for: on the screen, as a CSV and as a figure."""

import csv
import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import ChannelStats, inputs
from display import figures
from engine import predict
from errors import UnusableInput, printable
from metrics import MIN_CALIBRATION
from reports.export import stored_side
from reports.heat_map import heat_maps
from reports.picture_list import as_text
from sources import found, pictures
from sources.picture_folder import print_paragraph, read_all
from storage.files import same_place, write_atomically
from storage.outputs import FIRST_COLUMNS, LIST_COLUMNS

MOST_DRAWN = 50  # pictures in one figure
WILDCARDS = set("*?[")
# In any kind of list, so that one network's lists call its probabilities the same.
OTHER_COLUMNS = {*LIST_COLUMNS}.union(*FIRST_COLUMNS)
AT_ONCE = 500  # pictures that are read before the network is asked


def probabilities(logits: Tensor, temperature: float | None) -> Tensor:
    """Probabilities (N, C) float64 from logits; calibrated where a temperature was fitted."""
    return (logits.double() / (temperature or 1.0)).softmax(1)


class Table:
    """A CSV of predictions: of whom, true class where known, predicted class, probabilities.

    A column of probabilities is called like its class. Where a class is called like one of the
    other columns, `true` say, all of them are headed p(CLASS), so that no two columns share a name.

    Args:
        classes: C names.
        tta: the views that are averaged over, as `engine.views` names them.
        temperature: fitted on the validation split; None where there was none.
        first: heading of the column that says which picture a row is of.
        with_truth: whether the true class is known.
    """

    def __init__(
        self,
        classes: Sequence[str],
        tta: str,
        temperature: float | None,
        *,
        first: str,
        with_truth: bool,
    ):
        self.names = [as_text(name) for name in classes]
        self.tta = tta
        self.calibrated = "no" if temperature is None else "yes"
        self.text = io.StringIO()
        self.rows = csv.writer(self.text, lineterminator="\n")
        true = ["true"] if with_truth else []
        headings = self.names
        if not OTHER_COLUMNS.isdisjoint(self.names):
            headings = [f"p({name})" for name in self.names]
        self.rows.writerow([first, *true, *LIST_COLUMNS, *headings])

    def add(self, picture: str | int, label: int | None, shares: Tensor) -> None:
        """Adds a row.

        Args:
            picture: which it is.
            label: its true class; None in a table without.
            shares: (C,) probabilities.
        """
        true = [] if label is None else [self.names[label]]
        predicted = self.names[int(shares.argmax())]
        values = [f"{value:.6f}" for value in shares.tolist()]
        self.rows.writerow([picture, *true, predicted, self.tta, self.calibrated, *values])

    def write(self, path: Path) -> None:
        """Writes the rows so far."""
        write_atomically(path, self.text.getvalue())


def write_test(
    path: Path,
    labels: Sequence[int],
    logits: Tensor,
    temperature: float | None,
    classes: Sequence[str],
    tta: str,
    files: Sequence[str] | None,
) -> None:
    """Writes a row for each test image.

    Args:
        path: the CSV.
        labels: N of them.
        logits: (N, C), averaged over the views.
        temperature: fitted on the validation split; None where there was none.
        classes: C names.
        tta: the views, as `engine.views` names them.
        files: N names; None where the images are known by their place in the test split alone.
    """
    first = "index" if files is None else "file"
    table = Table(classes, tta, temperature, first=first, with_truth=True)
    shares = probabilities(logits, temperature)
    for index, label in enumerate(labels):
        picture = index if files is None else _cell(files[index])
        table.add(picture, label, shares[index])
    table.write(path)


class Classified(NamedTuple):
    """A picture with what the network takes it for."""

    file: Path
    seen: np.ndarray  # (S, S, 3) uint8
    shares: Tensor  # (C,) probabilities


def classify(
    model: nn.Module,
    saved: dict[str, Any],
    paths: list[Path],
    tta: str,
    figure: Path | None,
    table_path: Path | None,
    batch_size: int,
) -> None:
    """Prints the three likeliest classes of each picture; draws and lists them where asked.

    Args:
        model: on its device.
        saved: what its checkpoint says of it.
        paths: pictures, folders that are searched for them, and wildcards.
        tta: see `engine.views`.
        figure: the PNG to draw them into.
        table_path: the CSV to list them in.
        batch_size: images of 32x32 pixels at a time.

    Raises:
        UnusableInput: a picture is the figure's own file; or some pictures could not be read, and
            the others have been classified.
    """
    files, passed_over = _listed(expanded(paths), figure)
    if not files:
        given = " ".join(printable(path) for path in paths)
        raise UnusableInput(f"--predict {given}: no pictures there; give files or their folder")
    names = {file: printable(file.name) for file in files}
    if len(set(names.values())) < len(names):
        names = {file: printable(file) for file in files}
    width = min(max(len(name) for name in names.values()), 40)
    temperature = saved["metrics"].get("temperature")
    text = found.left_out_text({"other_files": [str(file) for file in passed_over]})
    if text:
        print_paragraph(text)
    print(_heading(saved, tta), flush=True)
    table = Table(saved["classes"], tta, temperature, first="file", with_truth=False)
    num_classified = 0
    drawn = []
    for each in _classified(model, saved, files, tta, batch_size):
        num_classified += 1
        likely = _likeliest(each.shares, saved["classes"])
        guesses = ", ".join(f"{label} {100 * value:.1f} %" for label, value in likely)
        print(f"{names[each.file]:<{width}}  {guesses}", flush=True)
        table.add(_cell(str(each.file)), None, each.shares)
        if figure and len(drawn) < MOST_DRAWN:
            given = pictures.whole(each.file, 224)
            heat = _heat(model, saved, each)
            drawn.append((names[each.file], given, each.seen, heat, likely))
    if drawn:
        figures.predictions(drawn, figure, saved["name"], calibrated=temperature is not None)
        print(f"drawn in {printable(figure)}: {len(drawn)} of {len(files)}")
    if table_path and num_classified:
        table.write(table_path)
        print(f"listed in {printable(table_path)}: {num_classified} of {len(files)}")
    if num_classified < len(files):
        raise UnusableInput(
            f"{len(files) - num_classified} of {len(files)} pictures could not be read, named "
            "above: leave them out"
        )


def expanded(paths: Iterable[Path]) -> list[Path]:
    """Paths with the files that wildcards stand for, which the shell of Windows leaves as typed."""
    named = []
    for path in paths:
        matches = []
        if set(str(path)) & WILDCARDS and not path.exists():
            matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        named += matches or [path]
    return named


def _listed(paths: Iterable[Path], figure: Path | None) -> tuple[list[Path], list[Path]]:
    """The files to classify, and those in folders that are not called like pictures.

    The figure of an earlier call is none of the pictures in a folder.
    """
    files = []
    passed_over = []
    for path in paths:
        if path.is_dir():
            inside, others = pictures.search(path)
            files += [file for file in inside if not (figure and same_place(file, figure))]
            passed_over += others
        elif figure and same_place(path, figure):
            raise UnusableInput(
                f"--figure {printable(figure)}: is one of the pictures of --predict; give another "
                "name"
            )
        else:
            files.append(path)
    return files, passed_over


def _classified(
    model: nn.Module, saved: dict[str, Any], files: list[Path], tta: str, batch_size: int
) -> Iterator[Classified]:
    """Asks the network about many pictures at a time, in order; unreadable ones are named."""
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    side = saved.get("image_size", 32)
    device = next(model.parameters()).device
    fit = saved["config"].get("fit", "crop")
    for begin in range(0, len(files), AT_ONCE):
        some = files[begin : begin + AT_ONCE]
        read = read_all(some, stored_side(saved), fit, Path("predict"))
        readable = [row for row, digest in enumerate(read.hashes) if digest != ""]
        if not readable:
            continue
        images = torch.from_numpy(read.squares[readable]).to(device)
        _, averaged = predict(model, inputs(images, stats, side, batch_size), tta=tta)
        shares = probabilities(averaged, saved["metrics"].get("temperature"))
        for row, its_shares in zip(readable, shares, strict=True):
            yield Classified(some[row], read.squares[row], its_shares)


def _heat(model: nn.Module, saved: dict[str, Any], picture: Classified) -> Tensor:
    """Where the network found the likeliest class, (S, S) in [0, 1]."""
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    device = next(model.parameters()).device
    images = torch.from_numpy(picture.seen)[None].to(device)
    (x,) = inputs(images, stats, saved.get("image_size", 32))
    return heat_maps(model, x, picture.shares.argmax()[None].to(device))[0]


def _heading(saved: dict[str, Any], tta: str) -> str:
    """Says how the probabilities that follow were made."""
    views = "each picture as it is" if tta == "none" else f"averaged over views ({tta})"
    calibrated = "calibrated on validation images"
    if saved["metrics"].get("temperature") is None:
        needed = f"{MIN_CALIBRATION} validation images and some mistakes among them"
        calibrated = f"not calibrated (that takes {needed})"
    if saved.get("unfinished"):
        calibrated = f"not calibrated ({saved['unfinished']})"
    return f"probabilities: {views}, {calibrated}"


def _likeliest(shares: Tensor, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The three likeliest classes with their probabilities, the likeliest first."""
    top = shares.topk(min(3, len(classes)))
    names = [printable(classes[index]) for index in top.indices.tolist()]
    return list(zip(names, top.values.tolist(), strict=True))


def _cell(name: str) -> str:
    """A file's name as a cell: as it is, unless it holds what does not print."""
    return as_text(name if name.isprintable() else printable(name))
