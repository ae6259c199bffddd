"""What a run begins from: the data its settings name, and the weights."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import recipes
from config.settings import SMALLEST_BATCH, Settings, sizes
from data import (
    Augmentation,
    Splits,
    TrainBatches,
    drawn_rows,
    inputs,
    make_splits,
)
from errors import UnusableInput, printable
from runtime import launch, processes
from runtime.device import choose_precision
from sources import imagenet
from sources.cifar10 import cifar10
from sources.found import unbalanced_text
from sources.known_pictures import BEFORE, Known, changes, known
from sources.picture_folder import Picture, folder, print_paragraph
from storage import checkpoint
from storage.files import sha256

NO_SUCH_WEIGHTS = "--weights {}: no such file; or imagenet, or none"
# Where config.json says how the trainings that led to the first weights divided CIFAR-10.
CIFAR10_BEFORE = "cifar10_before"
DIVIDED_BY = ("seed", "val_fraction", "limit")  # the settings that do


@processes.agreed()
def load_splits(
    settings: Settings,
    device: torch.device,
    scratch: Path,
    state: dict[str, Any] | None = None,
) -> tuple[Splits, dict[str, Any], dict[str, list[Picture]] | None]:
    """Loads CIFAR-10 or a folder of pictures, as tensors on the device.

    Args:
        settings: of the run.
        device: where the tensors are put.
        scratch: beside which path pictures go that memory does not hold, see
            `runtime.memory.allocate`.
        state: what an interrupted run saved, whose pictures must be the same.

    Returns:
        The splits; what config.json says of where they come from; and the pictures of each split
        in their order, None for CIFAR-10.

    Raises:
        UnusableInput: they cannot be had, or have changed since the run began; or the run is to
            begin from a checkpoint that was trained on what is kept for test or validation.
    """
    begun_from = _checkpoint_to_begin_from(settings.weights, state)
    divisions = _on_cifar10(begun_from) if begun_from else None
    if settings.pictures:
        is_chosen = settings.val_fraction != recipes.without_flags(settings).val_fraction
        arrays, pictures, source = folder(
            settings.pictures,
            settings.image_size or 32,
            val_fraction=settings.val_fraction,
            must_draw_val=is_chosen and state is None,
            seed=settings.seed,
            scratch=scratch,
            fit=settings.fit,
            labels=settings.labels,
        )
        pictures = {split: those[: settings.limit] for split, those in pictures.items()}
        if begun_from:
            trained = _trained_before(settings.weights, begun_from)
            _check_not_trained(settings.weights, trained, pictures)
            if trained:
                pictures[BEFORE] = trained
        if state:
            _check_same_pictures(settings.pictures, state.get("pictures"), known(pictures))
    else:
        arrays = cifar10(settings.data_dir)
        source = {"source": "CIFAR-10"}
        pictures = None
        if begun_from:
            trained = _trained_before(settings.weights, begun_from)
            if trained:  # a later training on such pictures is to know it
                pictures = {BEFORE: trained}
            _check_validation(settings, arrays.train_labels, divisions)
    if divisions is not None:
        source[CIFAR10_BEFORE] = divisions
    splits = make_splits(
        arrays,
        val_fraction=settings.val_fraction,
        limit=settings.limit,
        seed=settings.seed,
        device=device,
    )
    counts = torch.bincount(splits.train.labels, minlength=len(splits.classes)).tolist()
    of_class = dict(zip(splits.classes, counts, strict=True))
    unbalanced = unbalanced_text(of_class, settings.balance)
    if unbalanced:
        print_paragraph(unbalanced, indent="  ")
    shape = list(splits.train.images.shape[1:3])  # (H, W)
    return splits, source | {"image_shape": shape, "classes": len(splits.classes)}, pictures


def settled(settings: recipes.AnySettings, num_images: int) -> recipes.AnySettings:
    """The settings with those that follow from the number of training images; says which.

    Args:
        settings: of the run.
        num_images: of the training split.

    Raises:
        UnusableInput: there are too few images, or the batch is larger than the training split.
    """
    if num_images < SMALLEST_BATCH:
        raise UnusableInput(
            f"{num_images} training images: at least {SMALLEST_BATCH} are needed; add pictures"
        )
    chosen = recipes.by_number(settings, num_images)
    if chosen.batch_size > num_images:
        raise UnusableInput(
            f"--batch-size {chosen.batch_size}: there are {num_images} training images; take at "
            f"most {num_images}"
        )
    rounds = chosen.plain().get("rounds", 1)
    steps_of_round = chosen.epochs // rounds * math.ceil(num_images / chosen.batch_size)
    if rounds > 1 and chosen.average * steps_of_round < 1:
        raise UnusableInput(
            f"--average {chosen.average:g}: is less than a step of a round; take more"
        )
    if chosen != settings:
        line = f"{num_images:,} training images: batches of {chosen.batch_size}, "
        line += f"{chosen.epochs} epochs (--batch-size, --epochs)"
        if rounds > 1:
            line += f", in {rounds} trainings from the same weights that are averaged (--rounds)"
        print_paragraph(line)
    return chosen


def _check_same_pictures(folder: Path, before: Known | None, now: Known) -> None:
    """Refuses to go on with other pictures; `BEFORE` follows from the weights, looked at before."""
    if before is None:
        changed = "an older version began this run and did not note its pictures"
        remedy = "start another run with --run-name NAME"
    else:
        changed = f"changed since this run began: {changes(before, now)}"
        remedy = "restore them, or start another run with --run-name NAME"
    if before is None or changes(before, now):
        raise UnusableInput(f"--resume with --pictures {printable(folder)}: {changed}; {remedy}")


def _checkpoint_to_begin_from(
    weights: str | None, state: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where a run begins from anything else.

    Args:
        weights: the setting.
        state: of the run that goes on, or None.

    Raises:
        UnusableInput: there is no such file, or it is another than the run began from.
    """
    if weights in (None, "none", "imagenet"):
        return None
    path = Path(weights)
    if not path.is_file():
        raise UnusableInput(NO_SUCH_WEIGHTS.format(printable(weights)))
    if state and state["identity"]["start_weights"].get("sha256") != sha256(path):
        raise UnusableInput(
            f"--resume with --weights {printable(weights)}: is another file than this run began "
            "from; restore it, or start another run with --run-name NAME"
        )
    if not checkpoint.is_checkpoint(path):
        return None
    _, content = checkpoint.load_checkpoint(path)
    return content


def _trained_before(weights: str, content: dict[str, Any]) -> list[Picture]:
    """The pictures that trained a checkpoint, and those that trained what it began from."""
    used = content.get("pictures") or {}
    if content["config"].get("pictures") and not used:
        raise UnusableInput(
            f"--weights {printable(weights)}: does not say which pictures trained it, and a test "
            "could hold some; train it anew, or begin from other weights"
        )
    trained = used.get(BEFORE, {}) | used.get("train", {})
    return [Picture("", name, digest) for digest, name in trained.items()]


def _check_not_trained(
    weights: str, trained: list[Picture], pictures: dict[str, list[Picture]]
) -> None:
    """Refuses to begin from a checkpoint that was trained on pictures kept for test or val."""
    hashes = {picture.hash for picture in trained}
    for split, what, flags in (
        ("test", "test", "--seed"),
        ("val", "validation", "--seed and the --val-fraction"),
    ):
        those = pictures.get(split, [])
        num_seen = sum(not hashes.isdisjoint((picture.hash, *picture.copies)) for picture in those)
        if num_seen:
            raise UnusableInput(
                f"--weights {printable(weights)}: {num_seen:,} of the {len(those):,} {what} "
                f"pictures trained it; take the {flags} of that training, or a folder with a "
                f"{split}/ of its own"
            )


def _on_cifar10(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """How CIFAR-10 was divided in the training of a checkpoint and in those it began from.

    Returns:
        The settings `DIVIDED_BY` of each; None where an older version did not note all of them.
    """
    trainings = content.get("data", {}).get(CIFAR10_BEFORE)
    if trainings is None:
        if content.get("start_weights", {}).get("source") == "checkpoint":
            return None
        trainings = []
    if content["config"].get("pictures"):
        return trainings
    own = {key: content["config"].get(key) for key in DIVIDED_BY}
    if own["seed"] is None or own["val_fraction"] is None:
        return None
    return [*trainings, own]


def _check_validation(
    settings: Settings, labels: np.ndarray, trainings: list[dict[str, Any]] | None
) -> None:
    """Refuses to begin from a checkpoint that was trained on images of CIFAR-10 kept for val."""
    if not settings.val_fraction:
        return
    name = printable(settings.weights)
    if trainings is None:
        raise UnusableInput(
            f"--weights {name}: does not say which images trained what it began from, and the "
            "validation split could hold some; begin from other weights, or give --val-fraction 0"
        )
    own = {key: getattr(settings, key) for key in DIVIDED_BY}
    _, kept = drawn_rows(labels, **own)
    for training in trainings:
        trained, _ = drawn_rows(labels, **training)
        num_seen = len(np.intersect1d(trained, kept))
        if num_seen:
            remedy = "give --val-fraction 0"
            last = trainings[-1]  # what it kept aside trained none of those before it, either
            if last["val_fraction"] > 0:
                remedy = (
                    f"give --seed {last['seed']} --val-fraction {last['val_fraction']:g}, as its "
                    "training had them, or --val-fraction 0"
                )
            raise UnusableInput(
                f"--weights {name}: {num_seen:,} of the {len(kept):,} validation images trained "
                f"it; {remedy}"
            )


@processes.agreed()
def start_weights(
    model: nn.Module, wanted: str | None, arch: str, classes: tuple[str, ...]
) -> dict[str, str]:
    """Loads what a run begins from.

    Args:
        model: changed in place.
        wanted: "imagenet", None or "none" for what it holds already, or a file: a checkpoint of
            this project, whose last layer is taken where the classes agree, or plain weights.
        arch: "custom_cnn" or a pretrained network's name.
        classes: of the data.

    Returns:
        Where the weights came from: `source`, `file` and the file's `sha256`.

    Raises:
        UnusableInput: they cannot be had, or belong to another network.
    """
    if wanted is None or wanted == "none":
        return {"source": "random"}
    path = Path(wanted)
    load = model.load_state_dict
    if wanted == "imagenet":
        if arch == "custom_cnn":
            raise UnusableInput("--weights imagenet: there are none of this network; give a file")
        state, provenance = imagenet.imagenet_weights(arch, model.weights_url)
        load = model.load_pretrained
    elif not path.is_file():
        raise UnusableInput(NO_SUCH_WEIGHTS.format(printable(wanted)))
    elif checkpoint.is_checkpoint(path):
        state = _of_checkpoint(path, model, arch, classes)
        provenance = {"source": "checkpoint", "file": str(path), "sha256": sha256(path)}
    else:
        state, provenance = imagenet.weights_from_file(path)
        if arch != "custom_cnn":
            load = model.load_pretrained
    try:
        load(state)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UnusableInput(
            f"--weights {printable(wanted)}: {printable(reason)}; is it a {arch}, built as here?"
        ) from error
    return provenance


def _of_checkpoint(
    path: Path, model: nn.Module, arch: str, classes: tuple[str, ...]
) -> dict[str, Tensor]:
    """Its weights; the classifier stays the model's own where the classes are others."""
    trained, content = checkpoint.load_checkpoint(path)
    if content["arch"] != arch:
        raise UnusableInput(f"--weights {printable(path)}: holds a {content['arch']}, not a {arch}")
    state = trained.state_dict()
    if content["classes"] != list(classes):
        print(f"{printable(path)} knows other classes: the last layer begins anew", flush=True)
        for key, value in model.state_dict().items():
            if key.startswith(f"{model.classifier_name}."):
                state[key] = value
    return state


def settle_precision(
    wanted: str, model: nn.Module, batches: TrainBatches, state: dict[str, Any] | None
) -> str:
    """Takes a resumed run's precision from its state, else chooses one; says why.

    Args:
        wanted: "auto", "fp32" or "bf16".
        model: that is to train.
        batches: which it is to see.
        state: of the run that goes on, or None.
    """
    if state:
        precision = state["precision"]
        reason = f"precision {precision}: as before"
    else:
        batch = next(batches.epoch(0))
        if launch.RANK > 0:
            wanted = "fp32"  # not to be measured here: the first process measures for all
        precision, reason = choose_precision(wanted, model, batch, batch[0].device)
        precision = processes.from_first(precision)
    print(reason, flush=True)
    return precision


def train_batches(settings: Settings, splits: Splits, side: int) -> TrainBatches:
    """The batches a training sees, of images that come to have this side, pixels."""
    # The settings have the same names.
    names = [entry.name for entry in dataclasses.fields(Augmentation)]
    return TrainBatches(
        splits.train,
        splits.stats,
        settings.batch_size,
        augmentation=Augmentation(**{name: getattr(settings, name) for name in names}),
        seed=settings.seed,
        side=side,
        resizing=sizes(settings.small_first),
        num_epochs=settings.epochs,
        part=(launch.RANK, launch.WORLD_SIZE),
    )


class Validation(NamedTuple):
    """What a network is evaluated on after every epoch."""

    inputs: Callable[[], Iterator[Tensor]]  # begins anew with each call; see `engine.predict`
    labels: Tensor  # (N,) int64


def validation(splits: Splits, side: int) -> Validation | None:
    """This process's part of the validation images; None where there is no such split.

    Args:
        splits: with the statistics to normalise by.
        side: of the network's input, pixels.
    """
    if splits.val is None:
        return None
    images = processes.own_part(splits.val.images)
    return Validation(partial(inputs, images, splits.stats, side), splits.val.labels)
