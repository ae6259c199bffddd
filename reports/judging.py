"""A saved network on its test images, and the files that say how it did."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import Arrays, ChannelStats, Split, Splits
from errors import UnusableInput, printable
from reports import evaluation, history, pages, provenance
from reports.live import best_effort
from runtime import processes
from sources import picture_folder
from sources.cifar10 import cifar10
from sources.known_pictures import find_test
from storage.files import read_json, sha256, write_json


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
        UnusableInput: they are not there, or nobody can know which they were.
    """
    folder = saved["config"].get("pictures")
    limit = saved["config"].get("limit")  # a smoke run is judged on what it was meant for
    if folder and "pictures" in saved:
        side = saved["data"]["image_shape"][0]
        images, names = find_test(place or Path(folder), saved["pictures"], side)
        labels = np.array([saved["classes"].index(name) for name in names], np.int64)
    elif folder:
        arrays = _given_test(saved, place or Path(folder))
        images = arrays.test_images[:limit]
        labels = arrays.test_labels[:limit]
    else:
        arrays = cifar10(data_dir)
        images = arrays.test_images[:limit]
        labels = arrays.test_labels[:limit].astype(np.int64)
        if list(arrays.classes) != saved["classes"]:
            raise UnusableInput(
                f"{saved['name']} knows other classes than CIFAR-10: name the pictures it was "
                "trained on with --pictures"
            )
    split = Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    return Splits(tuple(saved["classes"]), stats, None, None, split)


def _given_test(saved: dict[str, Any], place: Path) -> Arrays:
    """The pictures in `test/`, for a checkpoint older than the hashes of its pictures."""
    remedy = "train it anew, for its checkpoint to know them"
    if saved["data"]["splits"] != "as given":
        raise UnusableInput(
            f"{saved['name']} does not say which pictures were kept for its test: {remedy}"
        )
    side = saved["data"]["image_shape"][0]
    arrays, _, source = picture_folder.folder(place, side, val_fraction=0, seed=0)
    if source["splits"] != "as given" or list(arrays.classes) != saved["classes"]:
        raise UnusableInput(
            f"{printable(place)} has not the test/ and the classes of {saved['name']}: name with "
            f"--pictures where they are, or {remedy}"
        )
    return arrays


def judge_checkpoint(
    path: Path,
    model: nn.Module,
    saved: dict[str, Any],
    device: torch.device,
    *,
    results_dir: Path,
    data_dir: Path,
    pictures: Path | None,
    predictions: Path | None,
    tta: str,
    batch_size: int,
) -> None:
    """Evaluates a checkpoint on the test set; writes its test.json, pictures and page.

    Args:
        path: the checkpoint.
        model: its network, on the device.
        saved: what else it holds.
        device: the model's.
        results_dir: where the run's folder is.
        data_dir: see `test_split`.
        pictures: see `test_split`.
        predictions: a CSV to write, a row for each test image.
        tta: see `engine.views`.
        batch_size: images of 32x32 pixels at a time.

    Raises:
        UnusableInput: the run's folder holds the results of another checkpoint.
    """
    run_dir, digest = results_dir / saved["name"], sha256(path)
    with processes.agreed():
        earlier = processes.from_first(read_json(run_dir / "test.json"))
        if earlier.get("checkpoint_sha256", digest) != digest:
            raise UnusableInput(
                f"{run_dir}/ holds the results of another checkpoint than {printable(path)}: give "
                "--results-dir"
            )
        splits = test_split(saved, data_dir, pictures, device)
    temperature = saved["metrics"].get("temperature")
    side = saved.get("image_size", 32)
    report, logits = evaluation.judge(model, splits, side, temperature, tta, batch_size)
    if processes.RANK:
        return
    report |= {"name": saved["name"], "checkpoint_sha256": digest}
    if report["top1_tta"] is None:
        report |= {key: earlier[key] for key in ("tta", "top1_tta") if key in earlier}
    if not (run_dir / "config.json").exists():
        write_json(
            run_dir / "config.json", {k: saved[k] for k in provenance.REPEATED if k in saved}
        )
    write_json(run_dir / "test.json", report)
    if predictions:
        evaluation.write_predictions(predictions, splits, logits, temperature)
    print(f"{printable(path)}\n{evaluation.summary(report)}\n", flush=True)
    rows = history.read(run_dir / "history.csv")
    evaluation.draw(run_dir, saved, model, splits, logits, temperature, rows)
    content = {**saved, "status": "finished", "updated": time.time()}
    content |= {"history": rows, "report": report}
    best_effort(lambda path: pages.write(path, content), run_dir)
