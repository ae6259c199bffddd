"""What a trained network takes pictures for: on the screen, as a CSV and as a figure."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import ChannelStats, inputs
from engine import predict
from errors import UnusableInput, printable
from reports import figures
from reports.picture_list import as_text
from sources import pictures
from storage.files import write_atomically

MOST_DRAWN = 50  # pictures in one figure


def probabilities(logits: Tensor, temperature: float | None) -> Tensor:
    """Probabilities (N, C) float64 from logits; calibrated where a temperature was fitted."""
    return (logits.double() / (temperature or 1.0)).softmax(1)


def write(
    path: Path,
    labels: Sequence[int],
    logits: Tensor,
    temperature: float | None,
    classes: Sequence[str],
    tta: str,
) -> None:
    """Writes a row for each test image: index, true and predicted class, views, probabilities.

    Args:
        path: the CSV.
        labels: N of them.
        logits: (N, C), averaged over the views.
        temperature: fitted on the validation split; None where there was none.
        classes: C names.
        tta: the views, as `engine.views` names them.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [as_text(name) for name in classes]
    table.writerow(["index", "true", "predicted", "views", *names])
    for index, label in enumerate(labels):
        values = probabilities(logits[index : index + 1], temperature)[0]
        predicted = names[int(values.argmax())]
        shares = [f"{value:.6f}" for value in values.tolist()]
        table.writerow([index, names[label], predicted, tta, *shares])
    write_atomically(path, text.getvalue())


def classify(
    model: nn.Module,
    saved: dict[str, Any],
    paths: list[Path],
    tta: str,
    figure: Path | None,
) -> None:
    """Prints the three likeliest classes of each picture, and draws them where asked.

    Args:
        model: on its device.
        saved: what its checkpoint says of it.
        paths: pictures, and folders that are searched for them.
        tta: see `engine.views`.
        figure: the PNG to draw them into.

    Raises:
        UnusableInput: some pictures could not be read; the others have been printed.
    """
    files = list(pictures.find(paths))
    if not files:
        given = " ".join(printable(path) for path in paths)
        raise UnusableInput(f"--predict {given}: no pictures there; give files or their folder")
    names = [printable(file.name) for file in files]
    if len(set(names)) < len(names):
        names = [printable(file) for file in files]
    width = min(max(len(name) for name in names), 40)
    seen_side = saved.get("data", {}).get("image_shape", [32])[0]
    fit = saved["config"].get("fit", "crop")
    temperature = saved["metrics"].get("temperature")
    print(_heading(tta, temperature), flush=True)
    num_unreadable = 0
    shown = []
    for name, file in zip(names, files, strict=True):
        try:
            seen = pictures.load(file, seen_side, fit)
        except UnusableInput as error:
            print(f"error: {error}", file=sys.stderr)
            num_unreadable += 1
            continue
        logits = _logits(model, seen, saved, tta)
        likely = _likeliest(probabilities(logits, temperature)[0], saved["classes"])
        guesses = ", ".join(f"{label} {100 * value:.1f} %" for label, value in likely)
        print(f"{name:<{width}}  {guesses}", flush=True)
        if figure and len(shown) < MOST_DRAWN:
            shown.append((name, pictures.load(file, 224, fit), seen, likely))
    if shown:
        figures.predictions(shown, figure, saved["name"], calibrated=temperature is not None)
        print(f"drawn in {printable(figure)}: {len(shown)} of {len(files)}")
    if num_unreadable:
        raise UnusableInput(
            f"{num_unreadable} of {len(files)} pictures could not be read, named above: leave them "
            "out"
        )


def _heading(tta: str, temperature: float | None) -> str:
    """Says how the probabilities that follow were made."""
    views = "each picture as it is" if tta == "none" else f"averaged over views ({tta})"
    if temperature is None:
        return f"probabilities: {views}, not calibrated (too few validation images)"
    return f"probabilities: {views}, calibrated on validation images"


def _logits(model: nn.Module, seen: Any, saved: dict[str, Any], tta: str) -> Tensor:
    """Logits (1, C) of one picture (S, S, 3) uint8, averaged over the views."""
    device = next(model.parameters()).device
    images = torch.from_numpy(seen)[None].to(device)
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    _, averaged = predict(model, inputs(images, stats, saved.get("image_size", 32)), tta=tta)
    return averaged


def _likeliest(shares: Tensor, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The three likeliest classes with their probabilities, the likeliest first."""
    top = shares.topk(min(3, len(classes)))
    names = [printable(classes[index]) for index in top.indices.tolist()]
    return list(zip(names, top.values.tolist(), strict=True))
