"""The test images of a saved network: those that its training kept for that."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import Arrays, ChannelStats, Split, Splits, first_of_all
from errors import UnusableInput, printable
from sources import picture_folder
from sources.cifar10 import cifar10
from sources.known_pictures import find_test


def test_split(
    saved: dict[str, Any],
    data_dir: Path,
    place: Path | None,
    device: torch.device,
    scratch: Path,
) -> Splits:
    """The test images a checkpoint is to be evaluated on, with its classes and statistics.

    Args:
        saved: what the checkpoint says of itself.
        data_dir: where CIFAR-10 is kept.
        place: where the pictures it was trained on lie now; None for where they lay.
        device: where the tensors are put.
        scratch: see `runtime.memory.allocate`.

    Raises:
        UnusableInput: they are not there, or nobody can know which they were.
    """
    folder = saved["config"].get("pictures")
    limit = saved["config"].get("limit")  # a try on few images is tested on few
    if folder and "pictures" in saved:
        side = saved["data"]["image_shape"][0]
        images, names = find_test(
            place or Path(folder),
            saved["pictures"],
            side,
            fit=saved["config"].get("fit", "crop"),
            scratch=scratch,
        )
        labels = np.array([saved["classes"].index(name) for name in names], np.int64)
    elif folder:
        arrays = _given_test(saved, place or Path(folder), scratch)
        images, labels = _limited(arrays, limit)
    else:
        arrays = cifar10(data_dir)
        images, labels = _limited(arrays, limit)
        if list(arrays.classes) != saved["classes"]:
            raise UnusableInput(
                f"{saved['name']} knows other classes than CIFAR-10: name the pictures it was "
                "trained on with --pictures"
            )
    split = Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    return Splits(tuple(saved["classes"]), stats, None, None, split)


def _limited(arrays: Arrays, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The test images, and their labels, as `make_splits` would limit them."""
    labels = arrays.test_labels.astype(np.int64)
    if limit is None:
        return arrays.test_images, labels
    rows = first_of_all(labels, limit)
    return arrays.test_images[rows], labels[rows]


def _given_test(saved: dict[str, Any], place: Path, scratch: Path) -> Arrays:
    """The pictures in `test/`, for a checkpoint older than the hashes of its pictures."""
    remedy = "train it anew, for its checkpoint to know them"
    if saved["data"]["splits"] != "as given":
        raise UnusableInput(
            f"{saved['name']} does not say which pictures were kept for its test: {remedy}"
        )
    side = saved["data"]["image_shape"][0]
    arrays, _, source = picture_folder.folder(place, side, val_fraction=0, seed=0, scratch=scratch)
    if source["splits"] != "as given" or list(arrays.classes) != saved["classes"]:
        raise UnusableInput(
            f"{printable(place)} has not the test/ and the classes of {saved['name']}: name with "
            f"--pictures where they are, or {remedy}"
        )
    return arrays
