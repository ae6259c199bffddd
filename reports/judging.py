"""A saved network on its test images, and the files that say how it did."""

from pathlib import Path
from typing import Any

import torch

from data import ChannelStats, Split, Splits
from errors import UnusableInput, printable


def test_split(
    saved: dict[str, Any], data_dir: Path, place: Path | None, device: torch.device
) -> Splits:
    """The test images a checkpoint is to be judged on, with its classes and statistics.

    Args:
        saved: what the checkpoint says of itself.
        data_dir: where CIFAR-10 is kept.
        place: where the pictures it was trained on lie now; None for where they lay.
        device: where the tensors are put.

    Raises:
        UnusableInput: they are not there, or no longer those of the training.
    """
    if folder := saved["config"].get("pictures"):
        from sources import pictures

        shares = {key: saved["config"][key] for key in ("val_fraction", "seed")}
        place, side = place or Path(folder), saved["data"]["image_shape"][0]
        arrays, source = pictures.folder(place, side, **shares)
        drawn = [{k: of.get(k) for k in ("per_class", "splits")} for of in (source, saved["data"])]
        if drawn[0] != drawn[1]:  # what is drawn anew could hold images it was trained on
            raise UnusableInput(
                f"{printable(place)} has changed since {saved['name']} was trained on it: restore "
                "it, or name with --pictures where it lies as it was"
            )
    else:
        from sources.cifar10 import cifar10

        arrays = cifar10(data_dir)
    if list(arrays.classes) != saved["classes"]:
        raise UnusableInput(
            f"{saved['name']} knows other classes than {printable(folder or 'CIFAR-10')}: name the "
            "pictures it was trained on with --pictures"
        )
    limit = saved["config"].get("limit")  # a smoke run is judged on what it was meant for
    images = torch.from_numpy(arrays.test_images[:limit]).to(device)
    labels = torch.from_numpy(arrays.test_labels[:limit].astype("int64")).to(device)
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    return Splits(arrays.classes, stats, None, None, Split(images, labels))
