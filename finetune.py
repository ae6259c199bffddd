"""Fine-tunes an ImageNet network on CIFAR-10: `python finetune.py --arch resnet18`."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cli
import engine
import optimizers
import records
import runs
from compute import predict, select_device, settle_precision
from config import TrainConfig, setting
from data import Augmentation, Splits, TrainBatches
from features import FeatureBatches, compute_features, predict_features
from models import ARCHS, OperatedNetwork, freeze
from weights import imagenet_weights, weights_from_file

# What every torchvision network of 2015 to 2021 was trained with.
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class FineTuneConfig(TrainConfig):
    """A training's settings, and what is taken from ImageNet."""

    # Not Muon: it sets the norms of the layers, and pretrained ones are to keep theirs.
    optimizer: str = setting("adamw", "adam couples decay to the loss", choices=("adam", "adamw"))
    muon_lr: float = setting(0.0, "unused", internal=True)
    arch: str = setting("resnet18", "the network", choices=tuple(ARCHS))
    weights: str = setting("imagenet", "imagenet, none (random) or a file")
    image_size: int | None = setting(None, "upsample to this side, pixels", 32, below=513)
    unfreeze: str = setting("last", "which part trains", choices=("head", "last", "all"))
    cache: bool = setting(True, "compute a frozen trunk once")
    dropout: float = setting(0.2, "share of the classifier's inputs left out", 0, below=1)
    stage_lr_scale: float = setting(
        0.6, "learning rate of a stage, relative to the next", 0, below=2
    )


# The rate is the new classifier's; `stage_lr_scale` gives pretrained stages less, the earlier the
# less: their filters are to be adapted, not unlearned.
DEFAULTS: dict[str, Any] = {
    "batch_size": 128,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "warmup": 0.1,
    "flip": "alternating",
}
# By what trains; an image that is shifted has no cached features.
PARTS: dict[str, dict[str, Any]] = {
    "head": {"epochs": 10},
    "last": {"epochs": 5},
    "all": {"epochs": 10, "translate": 2},
}
# What it begins from need not be an ImageNet classifier: all of it wants to move.
OWN: dict[str, dict[str, Any]] = {
    "mobilenet_v3_small": {"unfreeze": "all", "lr": 3e-3, "stage_lr_scale": 1.0}
}
FROM_SCRATCH: dict[str, Any] = {"unfreeze": "all", "stage_lr_scale": 1.0}  # nothing to keep


def parse(argv: list[str] | None) -> FineTuneConfig:
    """Turns the command line into a config.

    Raises:
        ValueError: a flag is unknown or its value breaks a rule.
    """
    parser = cli.Parser(prog="finetune.py", description=__doc__)
    cli.add_flags(parser, FineTuneConfig)
    given = vars(parser.parse_args(argv))
    arch = given.get("arch", FineTuneConfig.arch)
    defaults = DEFAULTS | {"image_size": ARCHS[arch].image_size} | OWN.get(arch, {})
    if given.get("weights") == "none":
        defaults |= FROM_SCRATCH
    unfreeze = given.get("unfreeze", defaults.get("unfreeze", FineTuneConfig.unfreeze))
    given = defaults | PARTS[unfreeze] | given
    config = FineTuneConfig(**given)
    if config.weights not in ("imagenet", "none") and not Path(config.weights).is_file():
        raise ValueError(f"--weights {config.weights}: no such file; or imagenet, or none")
    if caches(config) and (config.translate or config.cutout):
        raise ValueError(
            "--translate and --cutout change the input of the frozen trunk, whose output is kept: "
            "add --no-cache, or leave them out"
        )
    return config


def caches(config: FineTuneConfig) -> bool:
    """Whether the frozen trunk's output is kept."""
    return config.cache and config.unfreeze != "all"


def start_weights(model: OperatedNetwork, config: FineTuneConfig) -> dict[str, str]:
    """Loads what the run begins from and returns where it came from, with its SHA-256."""
    if config.weights == "none":
        return {"source": "random"}
    if config.weights == "imagenet":
        state, provenance = imagenet_weights(config.arch)
    else:
        state, provenance = weights_from_file(Path(config.weights))
    try:
        model.load_pretrained(state)
    except ValueError as error:
        raise ValueError(f"--weights {config.weights}: {error}; is it a {config.arch}?") from error
    return provenance


def parameter_groups(model: OperatedNetwork, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Groups whose learning rates fall from the head to the stem, stage by stage."""
    groups = []
    for depth, stage in enumerate(reversed(model.stages().values())):
        for group in optimizers.parameter_groups(stage, config):
            scale = group["lr_scale"] * config.stage_lr_scale**depth
            groups.append(group | {"lr_scale": scale})
    return groups


def train(config: FineTuneConfig, command: str) -> None:
    """Fine-tunes one network and leaves its checkpoint, numbers and pictures."""
    with runs.claim(config, config.arch, command) as run:
        splits = load(config)
        described, model, history = fit(config, run, splits)
        records.finish(run, described, model, splits, history, tta="flip")


def load(config: FineTuneConfig) -> Splits:
    """The splits on the device to compute on, with the channel statistics of ImageNet."""
    splits = runs.load(config, select_device(config.device))
    return splits._replace(mean=IMAGENET_MEAN, std=IMAGENET_STD)


def fit(
    config: FineTuneConfig, run: runs.Run, splits: Splits
) -> tuple[dict[str, Any], OperatedNetwork, list[dict[str, Any]]]:
    """Fine-tunes one network; the test set is not read.

    Args:
        config: the settings.
        run: where state and history are kept, and what is resumed.
        splits: what `load` returned.

    Returns:
        What `records.describe` says of the run, the network, and the history.
    """
    device, mean, std = splits.train.images.device, splits.mean, splits.std
    torch.manual_seed(config.seed)
    surgery = {
        "image_size": config.image_size,
        "open_stem": config.image_size == 32,
        "dropout": config.dropout,
    }
    model = OperatedNetwork(config.arch, **surgery)
    provenance = start_weights(model, config)
    trunk, tail = freeze(model, config.unfreeze)
    model = model.to(device, memory_format=torch.channels_last)
    augmentation = Augmentation(config.flip, config.translate, config.cutout)
    batches = TrainBatches(splits.train, config.batch_size, mean, std, augmentation, config.seed)
    precision = settle_precision(config.precision, model, batches, run.state)
    described = records.describe(
        run,
        config,
        arch=config.arch,
        surgery=surgery,
        model=model,
        splits=splits,
        device=device,
        precision=precision,
        weights=provenance,
    )
    trained = model

    def val_logits() -> torch.Tensor:
        return predict(model, splits.val.images, mean, std, precision=precision)[0]

    begin = time.perf_counter()
    if caches(config):
        options = (mean, std, precision, run.checkpoint_path)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        batches = FeatureBatches(
            compute_features(trunk, splits.train.images, *options, mirrored=config.flip != "none"),
            *(splits.train, config.batch_size, config.flip, config.seed, dtype),
        )
        trained = tail
        if splits.val:
            val_features = compute_features(trunk, splits.val.images, *options, mirrored=False)

            def val_logits() -> torch.Tensor:
                return predict_features(tail, val_features, precision, dtype)

    history = engine.fit(
        trained,
        parameter_groups(model, config),
        batches,
        records.validator(splits, val_logits),
        config,
        precision,
        run.files(records.identity(described)),
        run.state,
        time.perf_counter() - begin,
    )
    return described, model, history


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return runs.main("finetune.py", argv, lambda command: train(parse(argv), command))


if __name__ == "__main__":
    sys.exit(main())
