"""Trains the nine-layer CNN on CIFAR-10 from scratch: `python train_custom.py --help`."""

import sys

import torch
from torch import nn

import cli
import engine
import records
import runs
from compute import predict, select_device, settle_precision
from config import TrainConfig
from data import Augmentation, Splits, TrainBatches, normalize
from initialization import initialize_from_images
from models import MODERN, WIDE, create_model
from optimizers import parameter_groups

# A recipe is a named set of defaults; any flag given beside it wins.
RECIPES = {
    # What the project that this one replaces did, on the tutorial shape of the network.
    "classic": {
        "epochs": 30,
        "batch_size": 128,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "optimizer": "adam",
    },
    "modern": {
        "epochs": 24,
        "batch_size": 256,
        "lr": 3e-3,
        # BatchNorm makes the convolutions scale-free, so that decay sets their effective step: the
        # norm settles where a step turns the weights by sqrt(2 lr decay), here 5.5 %.
        "weight_decay": 0.5,
        "label_smoothing": 0.2,
        "warmup": 0.2,
        "bias_lr_scale": 8.0,
        "flip": "alternating",
        "translate": 4,
        "cutout": 8,
        "val_fraction": 0.02,  # a thousand images show the course of a run and fit a temperature
    },
}
# Where time is short Muon learns more than AdamW, at a tenth more work a step.
RECIPES["speedrun"] = RECIPES["modern"] | {"optimizer": "muon", "muon_lr": 0.1, "epochs": 3}
# More width, more epochs, and a larger cutout against what both would learn by heart: on a CPU for
# a night, on a large GPU for a minute.
RECIPES["best"] = RECIPES["modern"] | {"epochs": 100, "cutout": 12}
SURGERY = {"classic": {}, "modern": MODERN, "speedrun": MODERN, "best": WIDE}


def parse(argv: list[str] | None) -> TrainConfig:
    """Turns the command line into a config.

    Raises:
        ValueError: a flag is unknown or its value breaks a rule.
    """
    parser = cli.Parser(prog="train_custom.py", description=__doc__)
    parser.add_argument("--recipe", choices=RECIPES, default="modern", help="set of defaults")
    cli.add_flags(parser, TrainConfig)
    given = vars(parser.parse_args(argv))
    return TrainConfig(**RECIPES[given["recipe"]] | given)


def begin(
    config: TrainConfig, splits: Splits, device: torch.device
) -> tuple[nn.Module, TrainBatches]:
    """The recipe's network as its training begins, channels_last, and the batches it is to see."""
    torch.manual_seed(config.seed)
    surgery = SURGERY[config.recipe]
    model = create_model("custom_cnn", surgery)
    if "whitened" in surgery:
        images = splits.train.images[:5000].cpu()
        initialize_from_images(model, normalize(images, splits.mean, splits.std))
    augmentation = Augmentation(config.flip, config.translate, config.cutout)
    batches = TrainBatches(
        splits.train, config.batch_size, splits.mean, splits.std, augmentation, config.seed
    )
    return model.to(device, memory_format=torch.channels_last), batches


def train(config: TrainConfig, command: str) -> None:
    """Trains one network and leaves its checkpoint, numbers and pictures."""
    device = select_device(config.device)
    with runs.claim(config, "custom_cnn", command) as run:
        splits = runs.load(config, device)
        mean, std = splits.mean, splits.std
        model, batches = begin(config, splits, device)
        precision = settle_precision(config.precision, model, batches, run.state)
        described = records.describe(
            run,
            config,
            arch="custom_cnn",
            surgery=SURGERY[config.recipe],
            model=model,
            splits=splits,
            device=device,
            precision=precision,
        )
        history = engine.fit(
            model,
            parameter_groups(model, config),
            batches,
            records.validator(
                splits,
                lambda: predict(model, splits.val.images, mean, std, precision=precision)[0],
            ),
            config,
            precision,
            run.files(records.identity(described)),
            run.state,
        )
        records.finish(run, described, model, splits, history, tta="crops")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return runs.main("train_custom.py", argv, lambda command: train(parse(argv), command))


if __name__ == "__main__":
    sys.exit(main())
