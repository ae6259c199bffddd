"""Pictures from numbers, the product's only use of matplotlib.

What takes a `path` writes a PNG there, whole or not at all, with `title` above it; `classes` are
the C classes' names. Figures are made as objects, without pyplot: no display, nothing to close.
They do not depend on a person's own matplotlib settings, and no text from outside is read as a
formula.
Colour-blind readers can tell the colours apart (Okabe and Ito, https://jfly.uni-koeln.de/color/).
"""

import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import metrics
from errors import printable
from storage.files import write_atomically

os.environ["MPLBACKEND"] = "agg"  # a notebook's that is not installed would stop the next line
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
DPI = 120  # 10 inches make 1200 px, which a README shows unscaled
Pixels = np.ndarray | Tensor
Names = Sequence[str]
Rows = Sequence[Mapping[str, Any]]


def curves(history: Rows, path: Path, title: str, reference: float | None = None) -> None:
    """Loss, accuracy and learning rate by epoch, as the rows of `history.csv` hold them.

    Values that are absent, empty or NaN are left out; one row at least. `reference` is the accuracy
    of the original project, a fraction, drawn as a thin line.
    """
    with drawing(path, 10, 4.3, title) as figure:
        loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(4, 4, 3))
        training = "training: augmented images, weights still moving; label smoothing in the loss"
        validation = "validation: images as they are, weights at the end of the epoch"
        for split, colour, label in (("train", ORANGE, training), ("val", BLUE, validation)):
            _line(loss, history, f"{split}_loss", 1, color=colour)
            _line(accuracy, history, f"{split}_accuracy", 100, color=colour, label=label)
        _line(rate, history, "lr", 1, color=GREY)
        rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
        if reference is not None:
            accuracy.axhline(100 * reference, color=GREY, linewidth=0.8, linestyle=":")
            right = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
            text = f"original project, {100 * reference:.1f} %"
            accuracy.annotate(text, (0.99, 100 * reference), color=GREY, fontsize=8, **right)
        names = "Loss (cross-entropy, nats)", "Accuracy (%)", "Learning rate"
        for axes, name in zip((loss, accuracy, rate), names, strict=True):
            tidy(axes, title=name, xlabel="epoch", xlim=(0.5, float(history[-1]["epoch"]) + 0.5))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        # Below the panels: inside them it would cover the lines of a short training.
        lines = accuracy.get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", frameon=False)


def confusion_matrix(matrix: Tensor, classes: Names, path: Path, title: str) -> None:
    """Per cent of each true class by predicted class; of over 20 classes, the worst pairs as bars.

    `matrix` holds (C, C) int64 counts, rows true. The colours span the mistakes alone: on a scale
    up to 100 % they would all look white.
    """
    counts, names = matrix.numpy(), [short(text) for text in classes]
    if len(counts) > 20:
        return _worst_pairs(counts, names, path, title)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = np.where(np.eye(len(counts), dtype=bool), np.nan, percent)
    top = max(np.nanmax(wrong, initial=0), 1e-9)
    with drawing(path, 8.2, 7.2, f"{title} ({counts.sum():,} images)") as figure:
        axes = figure.subplots()
        colours = axes.pcolormesh(wrong, cmap="Blues", vmin=0, vmax=top, ec="white", lw=1.5)
        label = "misclassified (% of the true class)"
        figure.colorbar(colours, ax=axes, shrink=0.75, pad=0.02, label=label)
        centred = {"ha": "center", "va": "center", "fontsize": 8 if len(counts) <= 12 else 6}
        for row, column in np.argwhere(counts):  # zeros are left blank
            look = {"color": "white" if wrong[row, column] > 0.6 * top else "black", **centred}
            look["fontweight"] = "bold" if row == column else "normal"
            axes.text(column + 0.5, row + 0.5, f"{percent[row, column]:.1f}", **look)
        ticks = np.arange(len(counts)) + 0.5
        axes.set_xticks(ticks, names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted class", ylabel="true class", aspect="equal", facecolor="#E4E4E4")
        axes.invert_yaxis()


def _worst_pairs(counts: np.ndarray, names: Names, path: Path, title: str) -> None:
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[: min(20, np.count_nonzero(wrong))]
    pairs = list(zip(*np.unravel_index(order, wrong.shape), strict=True))
    title += f": {wrong.sum():,} of {counts.sum():,} images misclassified, the most frequent pairs"
    with drawing(path, 9, 1.6 + 0.3 * len(pairs), title) as figure:
        axes = figure.subplots()
        ticks = [f"{names[true]} → {names[predicted]}" for true, predicted in pairs]
        numbers = [wrong[pair] for pair in pairs]
        bars = axes.barh(range(len(pairs)), numbers, color=BLUE, tick_label=ticks)
        shares = [100 * wrong[pair] / counts[pair[0]].sum() for pair in pairs]
        texts = [f"{n:,} ({share:.0f} %)" for n, share in zip(numbers, shares, strict=True)]
        axes.bar_label(bars, texts, padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("images, and their share of the true class (true → predicted)")
        axes.spines[["top", "right"]].set_visible(False)


def mistakes(
    images: Pixels, labels: Tensor, probabilities: Tensor, classes: Names, path: Path, title: str
) -> None:
    """The 25 misclassified images the network was surest of, surest first.

    `images` are (N, H, W, 3) uint8, `labels` (N,) int64. `probabilities`, (N, C), are calibrated,
    so that an image has the same one everywhere.
    """
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    shown = wrong[confidence[wrong].argsort(descending=True, stable=True)][:25].tolist()
    title += f": {len(wrong):,} of {len(labels):,} images misclassified"
    captions = []
    for index in shown:
        true, guess = (short(classes[kind[index]], 14) for kind in (labels, predicted))
        captions.append(f"{true} → {guess}\n{_percent(confidence[index].item())}")
    note = f"the {len(shown)} surest: true → predicted, with its probability" if shown else ""
    _gallery([images[index] for index in shown], captions, 5, path, title, note)


def batch(images: Pixels, labels: Tensor, classes: Names, path: Path, title: str) -> None:
    """What the network sees: the first 32 training images of a batch, as augmentation left them.

    `images` are (B, H, W, 3), uint8 or float in [0, 1]; `labels` (B,) integers.
    """
    captions = [short(classes[label], 14) for label in labels[:32].tolist()]
    _gallery(images[:32], captions, 8, path, title)


def _gallery(
    images: Sequence[Pixels], captions: Names, columns: int, path: Path, title: str, note: str = ""
) -> None:
    """Images in rows, each under its caption."""
    rows = max(math.ceil(len(captions) / columns), 1)
    with drawing(path, 9, 0.8 + (8 / columns + (0.4 if note else 0.2)) * rows, title) as figure:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
            _show(figure.add_subplot(rows, columns, number), image, caption)
        figure.supxlabel(note, fontsize=9)


def first_layer(filters: Pixels, path: Path, title: str, example: tuple | None = None) -> None:
    """The first filters as small images, and what the first convolution makes of a picture.

    `filters` are (K, 3, h, w) float, each scaled by its largest value, with 0 as grey. `example` is
    a picture (H, W, 3) with its responses (L, h, w) float, each from its lowest value (black) up.
    """
    filters = np.asarray(filters).transpose(0, 2, 3, 1)
    peaks = np.maximum(np.abs(filters).max((1, 2, 3), keepdims=True), 1e-12)
    images = [_mosaic(0.5 + 0.4 * filters / peaks)]
    captions = ["{} filters of {}x{} pixels; grey is 0".format(*filters.shape)]
    if example is not None:
        maps = np.asarray(example[1])[..., None].repeat(3, -1)
        low, high = (edge((1, 2, 3), keepdims=True) for edge in (maps.min, maps.max))
        images += [example[0], _mosaic((maps - low) / np.maximum(high - low, 1e-12))]
        captions += ["a picture", f"the first convolution's {len(maps)} views of it"]
    _gallery(images, captions, max(len(images), 2), path, title)


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """Tiles (K, h, w, 3) side by side in rows of 8, or of 16 where there are over 64."""
    columns, scale = 8 if len(tiles) <= 64 else 16, max(32 // tiles.shape[1], 1)
    edges = (0, -len(tiles) % columns), (0, 4), (0, 4), (0, 0)
    tiles = np.pad(tiles.repeat(scale, 1).repeat(scale, 2), edges, constant_values=1)
    rows = np.concatenate(tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(0, 1), axis=2)
    return np.concatenate(rows)


def predictions(rows: Sequence[tuple], path: Path, title: str) -> None:
    """A person's own pictures: as given, as the network saw them, and the likeliest classes.

    `rows` are (name, thumbnail (H, W, 3) uint8, square (S, S, 3) uint8, [(class, probability), ...]
    with the likeliest first).
    """
    with drawing(path, 8, 0.9 + 1.45 * len(rows), title) as figure:
        grid = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(3, 3, 5))
        for (left, middle, right), (name, given, seen, top) in zip(grid, rows, strict=True):
            _show(left, given, "as given")
            _show(middle, seen, f"the {len(seen)}x{len(seen)} pixels it saw")
            right.set_title(short(name, 32), fontsize=9, loc="left")
            names, shares = zip(*((short(text), share) for text, share in top), strict=True)
            bars = right.barh(range(len(top)), shares, color=BLUE, tick_label=names)
            right.bar_label(bars, [_percent(share) for share in shares], padding=4, fontsize=9)
            right.set(xlim=(0, 1.18), xticks=[])
            right.invert_yaxis()
            right.spines[["top", "right", "bottom"]].set_visible(False)


def calibration(
    logits: Tensor, labels: Tensor, temperature: float | None, path: Path, title: str
) -> None:
    """Reliability diagram (Guo et al. 2017, figure 1) over a histogram of confidence.

    `logits` are (N, C), `labels` (N,) int64; `temperature` adds the curve of logits / temperature.
    """
    variants = [("as trained", 1.0, ORANGE, "o")]
    if temperature is not None:
        variants.append((f"temperature {temperature:.2f}", temperature, BLUE, "s"))
    with drawing(path, 6.4, 7.2, title) as figure:
        diagram, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        diagram.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="ideal")
        for name, scale, colour, marker in variants:
            bins = metrics.calibration_bins(logits.double() / scale, labels)
            name += f", calibration error {100 * metrics.expected_calibration_error(bins):.2f} %"
            count, confidence, accuracy = (values[bins.count > 0].numpy() for values in bins)
            # Wilson's interval: unlike the plain standard error it is wide for 3 correct of 3.
            shift = (0.5 - accuracy) / (count + 1)
            spread = np.sqrt(accuracy * (1 - accuracy) * count + 0.25) / (count + 1)
            look = {"color": colour, "marker": marker, "markersize": 5, "elinewidth": 1}
            look |= {"yerr": 100 * np.maximum((spread - shift, spread + shift), 0), "label": name}
            diagram.errorbar(100 * confidence, 100 * accuracy, **look)
            edges = np.linspace(0, 100, len(bins.count) + 1)
            histogram.stairs(bins.count.numpy(), edges, color=colour, linewidth=1.5, baseline=None)
        tidy(diagram, ylabel="accuracy (%), with its 68 % interval", ylim=(-2, 102))
        diagram.legend(frameon=False, loc="lower right")
        # Logarithmic: most images lie in the last bin; a single one still shows.
        tidy(histogram, ylabel="images per bin", xlim=(0, 101), yscale="log", ylim=(0.5, None))
        histogram.set(xlabel="confidence: probability of the predicted class (%)")
        histogram.minorticks_off()
        histogram.yaxis.set_major_formatter("{x:,.0f}")


@contextmanager
def drawing(path: Path, width: float, height: float, title: str) -> Iterator[Figure]:
    """A figure of so many inches, saved where the block ends."""
    with style.context(["default", {"text.parse_math": False}]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is a box, no more
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
        figure.suptitle(textwrap.fill(printable(title), int(10 * width)))  # characters that fit
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _line(axes: Axes, history: Rows, column: str, scale: float, **look: str) -> None:
    """Draws a column of the history where it has numbers."""
    rows = [row for row in history if row.get(column) not in (None, "")]
    points = [(float(row["epoch"]), scale * float(row[column])) for row in rows]
    if points := [point for point in points if math.isfinite(point[1])]:
        marker = "o" if len(points) < 3 else None  # a line needs two points to be seen
        axes.plot(*zip(*points, strict=True), marker=marker, linewidth=1.8, **look)


def _show(axes: Axes, image: Pixels, caption: str) -> None:
    axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set_title(caption, fontsize=9)
    axes.set_axis_off()


def tidy(axes: Axes, **properties: Any) -> None:
    """Sets labels and ranges of a plot, with a faint grid and no frame on the right and above."""
    axes.set(**properties)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def short(text: object, width: int = 24) -> str:
    """A name from outside, on one line and cut to so many characters."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _percent(fraction: float) -> str:
    return "> 99.9 %" if fraction > 0.999 else f"{100 * fraction:.1f} %"
