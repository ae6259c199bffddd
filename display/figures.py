"""Pictures from numbers, the product's only use of matplotlib.

What takes a `path` writes a PNG there, whole or not at all, with `title` above it; `classes` are
the C classes' names. Figures are made as objects, without pyplot: no display, nothing to close.
They do not depend on a person's own matplotlib settings, and no text from outside is read as a
formula. Names in scripts that matplotlib's own font lacks are drawn in an installed font.
Colour-blind readers can tell the colours apart (Okabe and Ito, https://jfly.uni-koeln.de/color/).
"""

import math
import os
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import metrics
from errors import printable
from storage.files import tell, write_atomically
from storage.outputs import FIGURE_MARK

os.environ["MPLBACKEND"] = "agg"  # a notebook's that is not installed would stop the next line
from matplotlib import colormaps, font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#666666"
FONT = "DejaVu Sans"  # comes with matplotlib
AGAIN = "begun again from the same weights; at last their average is validated"
DPI = 120  # 10 inches make 1200 px, which a README shows unscaled
Pixels = np.ndarray | Tensor
Names = Sequence[str]
Rows = Sequence[Mapping[str, Any]]

_boxes_said: list[frozenset[str]] = []  # characters that no font has; said of the first alone


def curves(history: Rows, path: Path, title: str, begins: Sequence[int] = ()) -> None:
    """Loss, accuracy and learning rate by epoch, as the rows of `history.csv` hold them.

    Values that are absent, empty or NaN are left out; one row at least. `begins` are the epochs
    after which the training began again, see `history.begins_again`.
    """
    with drawing(path, 10, 4.3, title) as figure:
        loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(4, 4, 3))
        _line(loss, history, "train_loss", 1, color=ORANGE)
        _line(loss, history, "val_loss", 1, color=BLUE)
        training = "training: weights still moving; augmentation and label smoothing where set"
        _line(accuracy, history, "train_accuracy", 100, color=ORANGE, label=training)
        validation = "validation: images as they are, weights at the end of the epoch"
        _line(accuracy, history, "val_accuracy", 100, color=BLUE, label=validation)
        _line(rate, history, "lr", 1, color=GREY)
        rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
        last_epoch = float(history[-1]["epoch"])
        panels = {
            "Loss (cross-entropy, nats)": loss,
            "Accuracy (%)": accuracy,
            "Learning rate": rate,
        }
        for name, axes in panels.items():
            tidy(axes, title=name, xlabel="epoch", xlim=(0.5, last_epoch + 0.5))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            for epoch in begins:
                axes.axvline(epoch + 0.5, color=GREY, linestyle=":", label=AGAIN)
        # Below the panels: inside them it would cover the lines of a short training.
        lines, labels = accuracy.get_legend_handles_labels()
        of_label = dict(zip(labels, lines, strict=True))  # each once
        figure.legend(of_label.values(), of_label, loc="outside lower center", frameon=False)


def confusion_matrix(matrix: Tensor, classes: Names, path: Path, title: str) -> None:
    """Per cent of each true class by predicted class; of over 20 classes, the worst pairs as bars.

    `matrix` holds (C, C) int64 counts, rows true. The colours span the mistakes alone: on a scale
    up to 100 % they would all look white.
    """
    counts = matrix.numpy()
    names = [short(text) for text in classes]
    if len(counts) > 20:
        return _worst_pairs(counts, names, path, title)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = np.where(np.eye(len(counts), dtype=bool), np.nan, percent)
    top = np.nanmax(wrong, initial=0)
    if top == 0:  # no mistakes: any scale
        top = 1
    title = f"{title} ({counts.sum():,} images)"
    with drawing(path, 8.2, 7.2, title, names) as figure:
        axes = figure.subplots()
        colours = axes.pcolormesh(
            wrong, cmap="Blues", vmin=0, vmax=top, edgecolor="white", linewidth=1.5
        )
        label = "misclassified (% of the true class)"
        figure.colorbar(colours, ax=axes, shrink=0.75, pad=0.02, label=label)
        for row, column in np.argwhere(counts):  # zeros are left blank
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{percent[row, column]:.1f}",
                color="white" if wrong[row, column] > 0.6 * top else "black",
                fontsize=8 if len(counts) <= 12 else 6,
                fontfamily=FONT,  # not every other font has a bold kind
                fontweight="bold" if row == column else "normal",
                ha="center",
                va="center",
            )
        ticks = np.arange(len(counts)) + 0.5
        axes.set_xticks(ticks, names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted class", ylabel="true class", aspect="equal", facecolor="#E4E4E4")
        axes.invert_yaxis()


def _worst_pairs(counts: np.ndarray, names: Names, path: Path, title: str) -> None:
    """The 20 most frequent confusions as bars."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    num_pairs = min(20, np.count_nonzero(wrong))
    order = np.argsort(-wrong, axis=None, kind="stable")[:num_pairs]
    true, predicted = np.unravel_index(order, wrong.shape)
    numbers = wrong[true, predicted]
    shares = 100 * numbers / counts.sum(1)[true]
    ticks = [f"{names[t]} → {names[p]}" for t, p in zip(true, predicted, strict=True)]
    texts = [f"{n:,} ({share:.0f} %)" for n, share in zip(numbers, shares, strict=True)]
    title += f": {wrong.sum():,} of {counts.sum():,} images misclassified, the most frequent pairs"
    with drawing(path, 9, 1.6 + 0.3 * num_pairs, title, ticks) as figure:
        axes = figure.subplots()
        bars = axes.barh(range(num_pairs), numbers, color=BLUE, tick_label=ticks)
        axes.bar_label(bars, texts, padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("images, and their share of the true class (true → predicted)")
        axes.spines[["top", "right"]].set_visible(False)


def mistakes(
    images: Pixels,
    labels: Tensor,
    probabilities: Tensor,
    classes: Names,
    path: Path,
    title: str,
    calibrated: bool = True,
) -> None:
    """The 25 misclassified images the network was surest of, surest first.

    `images` are (N, H, W, 3) uint8, `labels` (N,) int64, `probabilities` (N, C). Where they are not
    `calibrated`, the picture says so.
    """
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    shown = wrong[confidence[wrong].argsort(descending=True, stable=True)][:25].tolist()
    title += f": {len(wrong):,} of {len(labels):,} images misclassified"
    captions = []
    for index in shown:
        true = short(classes[labels[index]], 14)
        guess = short(classes[predicted[index]], 14)
        captions.append(f"{true} → {guess}\n{_percent(confidence[index].item())}")
    note = "there is nothing to show"
    if shown:
        note = f"the {len(shown)} surest: true → predicted, with its probability"
        if not calibrated:
            note += " (not calibrated)"
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
    caption_height = 0.4 if note else 0.2  # inches; two lines or one
    height = 0.8 + (8 / columns + caption_height) * rows
    with drawing(path, 9, height, title, captions) as figure:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
            _show(figure.add_subplot(rows, columns, number), image, caption)
        figure.supxlabel(note, fontsize=9)


def first_layer(
    filters: Pixels, path: Path, title: str, example: tuple[Pixels, Pixels] | None = None
) -> None:
    """The first filters as small images, and what the first convolution makes of a picture.

    `filters` are (K, 3, h, w) float, each scaled by its largest value, with 0 as grey. `example` is
    a picture (H, W, 3) with its responses (L, h, w) float, each from its lowest value (black) up.
    """
    filters = np.asarray(filters).transpose(0, 2, 3, 1)
    num_filters, height, width, _ = filters.shape
    peaks = np.maximum(np.abs(filters).max((1, 2, 3), keepdims=True), 1e-12)
    images = [_mosaic(0.5 + 0.4 * filters / peaks)]
    captions = [f"{num_filters} filters of {height}x{width} pixels; grey is 0"]
    if example is not None:
        picture, responses = example
        maps = np.asarray(responses)[..., None].repeat(3, -1)
        low = maps.min((1, 2, 3), keepdims=True)
        high = maps.max((1, 2, 3), keepdims=True)
        images.append(picture)
        captions.append("a picture")
        images.append(_mosaic((maps - low) / np.maximum(high - low, 1e-12)))
        captions.append(f"the first convolution's {len(maps)} views of it")
    _gallery(images, captions, max(len(images), 2), path, title)


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """Tiles (K, h, w, 3) side by side in rows of 8, or of 16 where there are over 64."""
    columns = 8 if len(tiles) <= 64 else 16
    scale = max(32 // tiles.shape[1], 1)
    tiles = tiles.repeat(scale, 1).repeat(scale, 2)
    num_blank = -len(tiles) % columns  # that fill the last row
    gap = 4  # pixels, right of and below each tile
    padding = ((0, num_blank), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(tiles, padding, constant_values=1)
    _, height, width, channels = tiles.shape
    grid = tiles.reshape(-1, columns, height, width, channels)
    return grid.swapaxes(1, 2).reshape(-1, columns * width, channels)


def predictions(rows: Sequence[tuple], path: Path, title: str, calibrated: bool = True) -> None:
    """A person's own pictures: as given, as the network saw them, what decided, likeliest classes.

    `rows` are (name, thumbnail (H, W, 3) uint8, square (S, S, 3) uint8, heat map (h, w) in [0, 1],
    [(class, probability), ...] with the likeliest first). Where the probabilities are not
    `calibrated`, the picture says so.
    """
    names = [short(name, 32) for name, *_ in rows]
    tops = [[(short(text), share) for text, share in top] for *_, top in rows]
    drawn = [*names, *(text for top in tops for text, _ in top)]
    with drawing(path, 10, 0.9 + 1.45 * len(rows), title, drawn, FIGURE_MARK) as figure:
        grid = figure.subplots(len(rows), 4, squeeze=False, width_ratios=(3, 3, 3, 5))
        for number, (_, given, seen, heat, top) in enumerate(rows):
            left, middle, decided, right = grid[number]
            _show(left, given, "as given")
            _show(middle, seen, f"the {len(seen)}x{len(seen)} pixels it saw")
            _show(decided, _heated(seen, heat), f"what spoke for {short(top[0][0], 14)}")
            classes = [text for text, _ in tops[number]]
            shares = [share for _, share in tops[number]]
            right.set_title(names[number], fontsize=9, loc="left")
            bars = right.barh(range(len(classes)), shares, color=BLUE, tick_label=classes)
            right.bar_label(bars, [_percent(share) for share in shares], padding=4, fontsize=9)
            right.set(xlim=(0, 1.18), xticks=[])
            right.invert_yaxis()
            right.spines[["top", "right", "bottom"]].set_visible(False)
        if not calibrated:
            figure.supxlabel("probabilities are not calibrated", fontsize=9)


def _heated(picture: Pixels, heat: Pixels) -> np.ndarray:
    """A picture (S, S, 3) uint8 in grey under a heat map (h, w), from dark blue 0 to yellow 1."""
    height, width = heat.shape
    rows = np.arange(height) * len(picture) // height
    columns = np.arange(width) * picture.shape[1] // width
    grey = np.asarray(picture)[rows][:, columns].mean(-1, keepdims=True) / 255
    colours = colormaps["cividis"](np.asarray(heat))[..., :3]  # the same to colour-blind readers
    return 0.4 * grey + 0.6 * colours


def calibration(
    logits: Tensor, labels: Tensor, temperature: float | None, path: Path, title: str
) -> None:
    """Reliability diagram (Guo et al. 2017, figure 1) over a histogram of confidence.

    `logits` are (N, C), `labels` (N,) int64; `temperature` adds the curve of logits / temperature,
    None says that the probabilities are not calibrated.
    """
    title = f"{title} ({len(labels):,} images)"
    with drawing(path, 6.4, 7.2, title) as figure:
        diagram, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        diagram.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="ideal")
        panels = (diagram, histogram)
        if temperature is None:
            _reliability(panels, logits, labels, "as trained, not calibrated", ORANGE, "o")
        else:
            _reliability(panels, logits, labels, "as trained", ORANGE, "o")
            scaled = logits.double() / temperature
            _reliability(panels, scaled, labels, f"temperature {temperature:.2f}", BLUE, "s")
        tidy(diagram, ylabel="accuracy (%), with its 68 % interval", ylim=(-2, 102))
        # Below both: inside it would cover the points of a few images.
        lines, names = diagram.get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", frameon=False)
        # Logarithmic: most images lie in the last bin; a single one still shows.
        tidy(histogram, ylabel="images per bin", xlim=(0, 101), yscale="log", ylim=(0.5, None))
        histogram.set(xlabel="confidence: probability of the predicted class (%)")
        histogram.minorticks_off()
        histogram.yaxis.set_major_formatter("{x:,.0f}")


def _reliability(
    panels: tuple[Axes, Axes], logits: Tensor, labels: Tensor, name: str, colour: str, marker: str
) -> None:
    """Draws accuracy by confidence into the first panel and images by confidence into the other."""
    diagram, histogram = panels
    bins = metrics.calibration_bins(logits, labels)
    error = metrics.expected_calibration_error(bins)
    filled = bins.count > 0
    count = bins.count[filled].numpy()
    confidence = bins.confidence[filled].numpy()
    accuracy = bins.accuracy[filled].numpy()
    low, high = metrics.wilson_interval(accuracy, count, deviations=1)
    diagram.errorbar(
        100 * confidence,
        100 * accuracy,
        yerr=100 * np.maximum((accuracy - low, high - accuracy), 0),
        color=colour,
        marker=marker,
        markersize=5,
        elinewidth=1,
        label=f"{name}, calibration error {100 * error:.2f} %",
    )
    edges = np.linspace(0, 100, len(bins.count) + 1)
    histogram.stairs(bins.count.numpy(), edges, color=colour, linewidth=1.5, baseline=None)


@contextmanager
def drawing(
    path: Path,
    width: float,
    height: float,
    title: str,
    names: Iterable[str] = (),
    software: str = "cifar10-pytorch",
) -> Iterator[Figure]:
    """A figure of so many inches, saved where the block ends.

    `names` are the texts from outside, in any script, that the block will draw; `software` is what
    the PNG says that it was made with.
    """
    title = printable(title)
    characters = frozenset(printable("".join([title, *names])))
    settings = {"text.parse_math": False, "font.family": [FONT, *_other_fonts(characters)]}
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that no font has was said already
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
        figure.suptitle(textwrap.fill(title, int(10 * width)))  # characters that fit
        yield figure
        metadata = {"Software": software}
        write_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))


@cache
def _other_fonts(characters: frozenset[str]) -> list[str]:
    """Families of installed fonts that together have the characters that FONT lacks.

    That some are in no font is said on stderr; they are drawn as boxes.
    """
    lacking = characters - _held(font_manager.findfont(FONT), characters)
    families = []
    if lacking:
        # The list that matplotlib keeps is not renewed when a font is installed: look on the disk.
        for path in sorted(font_manager.findSystemFonts(), key=_preference):
            held = _held(path, lacking)
            if held:
                font_manager.fontManager.addfont(path)
                families.append(font_manager.get_font(path).family_name)
                lacking -= held
    if lacking and not _boxes_said:
        _boxes_said.append(lacking)
        tell(
            f"warning: no installed font has {' '.join(sorted(lacking)[:5])}: pictures show a box; "
            "install a font of that script, such as one of the Noto family"
        )
    return families


def _held(path: str, characters: frozenset[str]) -> frozenset[str]:
    """Those of the characters that a font file can draw; none for one that cannot be used."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # damaged, or of a kind that FreeType does not know
        return frozenset()
    if not font.scalable or "LastResort" in path:  # coloured bitmaps; macOS's font of boxes
        return frozenset()
    return frozenset(c for c in characters if font.get_char_index(ord(c)))


def _preference(path: str) -> tuple[bool, bool, int, str]:
    """An order of font files by their names: upright sans-serifs of usual weight first."""
    name = Path(path).name
    return "Regular" not in name, "Sans" not in name, len(name), name


def _line(axes: Axes, history: Rows, column: str, scale: float, **look: str) -> None:
    """Draws a column of the history where it has numbers."""
    epochs = []
    values = []
    for row in history:
        value = row.get(column)
        if value not in (None, "") and math.isfinite(float(value)):
            epochs.append(float(row["epoch"]))
            values.append(scale * float(value))
    if values:
        marker = "o" if len(values) < 3 else None  # a line needs two points to be seen
        axes.plot(epochs, values, marker=marker, linewidth=1.8, **look)


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
