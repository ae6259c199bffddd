"""Classifies pictures with a trained network: prints what it takes them for, and draws it."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import ChannelStats, Split
from errors import UnusableInput, printable
from reports import evaluation
from sources import pictures

MOST_DRAWN = 50  # pictures in one figure


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
    files = pictures.find(paths)
    if not files:
        given = " ".join(map(printable, paths))
        raise UnusableInput(f"--predict {given}: no pictures there; give files or their folder")
    names = [printable(file.name) for file in files]
    if len(set(names)) < len(names):
        names = [printable(file) for file in files]
    width, unreadable, shown = min(max(map(len, names)), 40), 0, []
    device = next(model.parameters()).device
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    side = saved.get("image_size", 32)
    seen_side = saved.get("data", {}).get("image_shape", [32])[0]
    for name, file in zip(names, files, strict=True):
        try:
            seen = pictures.load(file, seen_side)
        except UnusableInput as error:
            print(f"error: {error}", file=sys.stderr)
            unreadable += 1
            continue
        split = Split(torch.from_numpy(seen)[None].to(device), torch.zeros(1, dtype=torch.int64))
        _, logits = evaluation.predict_split(model, split, stats, side, tta)
        scaled = logits[0] / (saved["metrics"].get("temperature") or 1.0)
        top = scaled.softmax(0).topk(min(3, len(saved["classes"])))
        likely = [
            (printable(saved["classes"][index]), value)
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        guesses = ", ".join(f"{label} {100 * value:.1f} %" for label, value in likely)
        print(f"{name:<{width}}  {guesses}", flush=True)
        if figure and len(shown) < MOST_DRAWN:
            shown.append((name, pictures.load(file, 224), seen, likely))
    if figure and shown:
        from reports import figures  # matplotlib takes half a second

        figures.predictions(shown, figure, saved["name"])
        print(f"drawn in {printable(figure)}: {len(shown)} of {len(files)}")
    if unreadable:
        raise UnusableInput(
            f"{unreadable} of {len(files)} pictures could not be read, named above: leave them out"
        )
