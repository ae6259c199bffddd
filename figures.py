"""Pictures from numbers; the only module that imports matplotlib.

Figures are made as objects, without pyplot: no display, no global state, nothing to close. Lines
take their colours from Okabe and Ito's palette, which colour-blind readers can tell apart
(https://jfly.uni-koeln.de/color/).
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

import metrics
from files import write_atomically

BLUE, ORANGE = "#0072B2", "#D55E00"
GREY = "#666666"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 120  # 10 inches make 1200 px, which a README shows unscaled


def curves(history: Sequence[Mapping[str, float | str]], path: Path, title: str) -> None:
    """Loss, accuracy and learning rate by epoch, as the rows of `history.csv` hold them.

    Training figures come from augmented images and from weights that still move within the epoch,
    which is why they may lie below validation; the loss is the one that is minimised, label
    smoothing included, which validation's is not.

    Args:
        history: a row per epoch, one at least; fractions. Values that are absent, empty or NaN
            are left out.
        path: the PNG to write.
        title: stands above the panels.
    """
    figure = _figure(10, 4, title)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for column, label, colour in (
        ("train", "training, augmented images", ORANGE),
        ("val", "validation", BLUE),
    ):
        _line(loss, history, f"{column}_loss", 1, label=label, color=colour)
        _line(accuracy, history, f"{column}_accuracy", 100, label=label, color=colour)
    _line(rate, history, "lr", 1, color=GREY)
    loss.set_title("Cross-entropy (nats)")
    accuracy.set_title("Accuracy (%)")
    rate.set_title("Learning rate")
    rate.set_ylim(0, 1.05 * rate.get_ylim()[1])
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, float(history[-1]["epoch"]) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # Below the panels: inside them it would cover the lines of a short training.
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def confusion_matrix(matrix: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
    """Per cent of each true class by predicted class.

    The colours span the mistakes alone: on a scale up to 100 % they would all look white.

    Args:
        matrix: (C, C) int64 counts, rows true.
        classes: C names.
        path: the PNG to write.
        title: the number of images is added to it.
    """
    counts = matrix.numpy()
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    mistakes = percent.copy()
    np.fill_diagonal(mistakes, np.nan)
    top = max(np.nanmax(mistakes, initial=0), 1e-9)

    figure = _figure(8.2, 7.2, f"{title} ({counts.sum():,} images)")
    axes = figure.subplots()
    axes.set_facecolor("#E4E4E4")  # shows through on the diagonal
    image = axes.imshow(mistakes, cmap="Blues", vmin=0, vmax=top)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("misclassified (% of the true class)")
    bar.outline.set_visible(False)
    for (row, column), value in np.ndenumerate(percent):
        if counts[row, column]:  # zeros are left blank
            dark = row != column and value > 0.6 * top
            axes.text(
                column,
                row,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontweight="bold" if row == column else "normal",
                fontsize="small",
            )
    ticks = np.arange(len(classes))
    axes.set_xticks(ticks, classes, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, classes)
    axes.set_xticks(ticks[1:] - 0.5, minor=True)
    axes.set_yticks(ticks[1:] - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _save(figure, path)


def mistakes(
    images: np.ndarray | Tensor,
    labels: Tensor,
    logits: Tensor,
    classes: Sequence[str],
    path: Path,
    title: str,
    count: int = 25,
) -> None:
    """The misclassified images the network was surest of, surest first.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
        logits: (N, C).
        classes: C names.
        path: the PNG to write.
        title: the number of mistakes is added to it.
        count: images shown at most.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    shown = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count].tolist()
    num_columns = 5
    num_rows = max(math.ceil(len(shown) / num_columns), 1)
    title = f"{title}: {len(wrong):,} of {len(labels):,} images misclassified"
    if len(wrong) > len(shown):
        title += f", the {len(shown)} surest shown"

    figure = _figure(9, 0.8 + 2.05 * num_rows, title)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, shown, strict=False):
        percent = 100 * confidence[index].item()
        sureness = "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"
        axes.imshow(np.asarray(images[index]), interpolation="nearest")
        axes.set_title(
            f"{classes[labels[index]]} → {classes[predicted[index]]}\n{sureness}", fontsize=9
        )
    if shown:
        figure.supxlabel("true → predicted, with the predicted class's probability", fontsize=9)
    else:
        figure.text(0.5, 0.45, "no mistakes", ha="center", va="center", color=GREY, fontsize=14)
    _save(figure, path)


def calibration(
    logits: Tensor, labels: Tensor, temperature: float | None, path: Path, title: str
) -> None:
    """Reliability diagram (Guo et al. 2017, figure 1) over a histogram of confidence.

    Args:
        logits: (N, C).
        labels: (N,) int64.
        temperature: adds the curve of logits / temperature; None for none.
        path: the PNG to write.
        title: stands above the diagram.
    """
    variants = [("as trained", logits.double(), ORANGE, "o")]
    if temperature is not None:
        variants.append(
            (f"temperature {temperature:.2f}", logits.double() / temperature, BLUE, "s")
        )

    figure = _figure(6.4, 7.2, title)
    diagram, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    diagram.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="ideal")
    for name, scaled, colour, marker in variants:
        bins = metrics.calibration_bins(scaled, labels)
        ece = 100 * metrics.expected_calibration_error(bins)
        count, confidence, accuracy = (values[bins.count > 0].numpy() for values in bins)
        # Wilson's interval: unlike the plain standard error it is wide for 3 correct of 3.
        centre = (accuracy + 0.5 / count) / (1 + 1 / count)
        spread = np.sqrt(accuracy * (1 - accuracy) / count + 0.25 / count**2) / (1 + 1 / count)
        below, above = spread - (centre - accuracy), spread + (centre - accuracy)
        diagram.errorbar(
            100 * confidence,
            100 * accuracy,
            yerr=100 * np.maximum((below, above), 0),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.5,
            elinewidth=1,
            label=f"{name}, ECE {ece:.2f} %",
        )
        edges = np.linspace(0, 100, len(bins.count) + 1)
        histogram.stairs(bins.count.numpy(), edges, color=colour, linewidth=1.5, baseline=None)
    diagram.set_ylabel("accuracy (%), with its 68 % interval")
    diagram.set_ylim(-2, 102)
    diagram.legend(frameon=False, loc="lower right")
    histogram.set_xlabel("confidence: probability of the predicted class (%)")
    histogram.set_ylabel("images per bin")
    histogram.set_xlim(0, 101)
    histogram.set_yscale("log")  # most images lie in the last bin
    histogram.set_ylim(bottom=0.5)  # a single image still shows
    histogram.minorticks_off()
    histogram.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (diagram, histogram):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def accuracy_by_minutes(rows: Sequence[Mapping[str, float | str]], path: Path) -> None:
    """Validation accuracy by training time: a panel a network and machine, a line each way.

    Args:
        rows: one an epoch, with `arch`, `hardware`, `flags` (names the line), `minutes` and
            `val_accuracy` (fraction).
        path: the PNG to write.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        panel = f"{row['arch']}, {str(row['hardware']).split(',')[0]}"
        points = panels.setdefault(panel, {}).setdefault(str(row["flags"]), [])
        points.append((float(row["minutes"]), 100 * float(row["val_accuracy"])))
    columns = min(2, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = _figure(5 + 2.5 * columns, 5 * height, "Fine-tuning: accuracy by training time")
    grid = figure.subplots(height, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, lines) in zip(grid.flat, panels.items(), strict=False):
        for number, (name, points) in enumerate(lines.items()):
            colour, marker = PALETTE[number % len(PALETTE)], "os^vD"[number // len(PALETTE) % 5]
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, label=name or "defaults"
            )
        axes.set_title(panel)
        axes.set_xlabel("minutes")
        axes.set_ylabel("validation accuracy (%)")
        axes.set_xscale("log")
        shortest, longest = axes.get_xlim()
        subs = (1, 2, 5) if longest > 10 * shortest else (1, 1.5, 2, 3, 5, 7)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.13))
    _save(figure, path)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    title = textwrap.fill(title, int(10 * width))  # characters of 12 points that fit
    figure.suptitle(title, fontsize=12, parse_math=False)  # a run's name may hold a dollar sign
    return figure


def _line(
    axes: Axes,
    history: Sequence[Mapping[str, float | str]],
    column: str,
    scale: float,
    **style: str,
) -> None:
    """Draws a column of the history where it has numbers."""
    points = [
        (int(float(row["epoch"])), scale * float(row[column]))
        for row in history
        if row.get(column) not in (None, "")
    ]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    if points:
        marker = "o" if len(points) < 3 else None  # a line needs two points to be seen
        axes.plot(*zip(*points, strict=True), marker=marker, linewidth=1.8, **style)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
