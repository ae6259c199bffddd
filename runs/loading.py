"""What a run begins from: the data its settings name, and the weights."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config.settings import Settings, sizes
from data import Augmentation, Splits, TrainBatches, inputs, make_splits
from errors import UnusableInput, printable
from runtime import launch, processes
from runtime.device import choose_precision
from storage import checkpoint
from storage.files import sha256

FEW_STEPS = 150  # of a training on few pictures


@processes.agreed()
def load_splits(settings: Settings, device: torch.device) -> tuple[Splits, dict[str, Any]]:
    """Loads CIFAR-10 or a folder of pictures, as tensors on the device.

    Returns:
        The splits, and what config.json says of where they come from.

    Raises:
        UnusableInput: they cannot be had; or the batch is larger than the training split.
    """
    if settings.pictures:
        from sources import pictures

        shares = {"val_fraction": settings.val_fraction, "seed": settings.seed}
        arrays, source = pictures.folder(settings.pictures, settings.image_size or 32, **shares)
    else:
        from sources.cifar10 import cifar10

        arrays, source = cifar10(settings.data_dir), {"source": "CIFAR-10"}
    splits = make_splits(
        arrays,
        val_fraction=settings.val_fraction,
        limit=settings.limit,
        seed=settings.seed,
        device=device,
    )
    if settings.batch_size > (size := len(splits.train.labels)):
        raise UnusableInput(
            f"--batch-size {settings.batch_size}: there are {size} training images; take a "
            "smaller batch"
        )
    steps = settings.epochs * -(-size // settings.batch_size)
    if steps < FEW_STEPS and not settings.limit and launch.RANK == 0:
        more = -(-FEW_STEPS // -(-size // 32))
        print(f"{steps} steps are few to learn in: try --batch-size 32 --epochs {more}")
    shape = list(splits.train.images.shape[1:3])  # (H, W)
    return splits, source | {"image_shape": shape, "classes": len(splits.classes)}


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
    if wanted in (None, "none"):
        return {"source": "random"}
    from sources import imagenet

    path, load = Path(wanted), getattr(model, "load_pretrained", model.load_state_dict)
    if wanted == "imagenet" and arch == "custom_cnn":
        raise UnusableInput("--weights imagenet: there are none of this network; give a file")
    if wanted == "imagenet":
        state, provenance = imagenet.imagenet_weights(arch)
    elif not path.is_file():
        raise UnusableInput(f"--weights {printable(wanted)}: no such file; or imagenet, or none")
    elif checkpoint.is_checkpoint(path):
        state, load = _of_checkpoint(path, model, arch, classes), model.load_state_dict
        provenance = {"source": "checkpoint", "file": str(path), "sha256": sha256(path)}
    else:
        state, provenance = imagenet.weights_from_file(path)
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
) -> dict[str, Any]:
    """Its weights; the last layer stays the model's own where the classes are others."""
    trained, content = checkpoint.load_checkpoint(path)
    if content["arch"] != arch:
        raise UnusableInput(f"--weights {printable(path)}: holds a {content['arch']}, not a {arch}")
    state, own = trained.state_dict(), model.state_dict()
    if content["classes"] != list(classes):  # its last layer names other things
        last = model.classifier_name + "."
        state |= {key: value for key, value in own.items() if key.startswith(last)}
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
    names = [entry.name for entry in dataclasses.fields(Augmentation)]  # settings bear them too
    return TrainBatches(
        *(splits.train, splits.stats, settings.batch_size),
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
    images = processes.own(splits.val.images)
    return Validation(partial(inputs, images, splits.stats, side), splits.val.labels)
