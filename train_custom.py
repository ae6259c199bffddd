"""Trains the nine-layer CNN from scratch, on CIFAR-10 or on your own pictures."""

import sys
from typing import Any

from config import commandline, recipes
from config.settings import CustomSettings

EXAMPLES = """\
examples:
  python train_custom.py                       the default recipe
  python train_custom.py --recipe speedrun     in a hurry
  python train_custom.py --recipe classic --limit 2000 --epochs 5   a quick try

Weights go to checkpoints/NAME.pt, numbers and pictures to results/NAME/, with a
page to watch the training on. Ctrl-C stops it; the same command with --resume
goes on."""


def parse(argv: list[str] | None) -> CustomSettings:
    """Turns the command line into settings.

    Raises:
        UnusableInput: a flag is unknown or its value breaks a rule.
    """
    epilog = f"{recipes.help_on_optimizers()}\n\n{EXAMPLES}"
    parser = commandline.Parser("train_custom.py", __doc__, epilog)
    commandline.add_flags(parser, CustomSettings, recipes.BY_RECIPE, CustomSettings.recipe)
    return recipes.custom(vars(parser.parse_args(argv)))


if __name__ == "__main__":
    commandline.before_torch(parse)  # importing torch takes seconds: --help need not wait

import torch

import engine
import models
import optimizers
from data import Splits, class_weights, normalize, resize
from reports import evaluation
from runs import loading, run
from runs.finish import finish
from runs.training import Training
from runtime import processes
from runtime.device import compile_or_not, prepare


def make_network(
    settings: CustomSettings, splits: Splits
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network as its training begins, on the device, and the arguments that build it.

    Args:
        settings: shape of the network, side of its input, seed.
        splits: the first filters may be measured on the training images.
    """
    torch.manual_seed(settings.seed)
    arguments = models.NETWORKS[settings.network] | {"momentum": settings.batchnorm_momentum}
    model = models.create_model("custom_cnn", arguments, len(splits.classes))
    if "whitened" in arguments:
        images = splits.train.images[:5000].cpu()
        x = resize(normalize(images, splits.stats), settings.image_size or 32)
        models.begin_from_images(model, x)
    device = splits.train.labels.device
    return model.to(device, memory_format=torch.channels_last), arguments


def parameter_groups(model: torch.nn.Module, settings: CustomSettings) -> list[dict[str, Any]]:
    """Groups of parameters with their learning rates and decays."""
    return optimizers.parameter_groups(
        model,
        optimizer=settings.optimizer,
        classifier=model.classifier,
        weight_decay=settings.weight_decay,
        bias_lr_scale=settings.bias_lr_scale,
        muon_lr_scale=settings.muon_lr / settings.lr,
    )


def train(settings: CustomSettings, command: str) -> None:
    """Trains one network and leaves its checkpoint, numbers and pictures."""
    with run.claim(settings, "custom_cnn", command) as claimed:
        # Data
        splits, source, pictures = loading.load_splits(
            settings, claimed.device, claimed.checkpoint_path, claimed.state
        )
        settings = loading.settled(settings, len(splits.train.labels))
        side = settings.image_size or 32
        batches = loading.train_batches(settings, splits, side)
        prepare()

        # Network
        model, arguments = make_network(settings, splits)
        weights = loading.start_weights(model, settings.weights, "custom_cnn", splits.classes)
        described = run.begin(
            claimed,
            settings,
            model,
            batches,
            splits,
            arch="custom_cnn",
            arguments=arguments,
            start_weights=weights,
            data=source,
        )
        precision = described["precision"]

        # Optimiser
        groups = parameter_groups(model, settings)
        optimizer = optimizers.make_optimizer(groups, settings.optimizer, settings.lr, precision)

        # Training
        network = compile_or_not(processes.shared(model), settings.compile, claimed.device)
        training = Training(
            claimed,
            described,
            model,
            optimizer,
            batches,
            epochs=settings.epochs,
            save_every=settings.save_every,
            pictures=pictures,
        )
        weights_of_classes = None
        if settings.balance:
            weights_of_classes = class_weights(splits.train.labels, len(splits.classes))
        steps = engine.train(
            network,
            optimizer,
            batches,
            epochs=settings.epochs,
            lr=settings.lr,
            warmup=settings.warmup,
            schedule=settings.schedule,
            precision=precision,
            label_smoothing=settings.label_smoothing,
            class_weights=weights_of_classes,
            progress=training.progress,
        )
        training.follow(steps, loading.validation(splits, side))

        # Report
        views = evaluation.usual_views(settings.flip, moved=True)
        finish(training, model, splits, tta=views)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(
        lambda: train(parse(argv), commandline.command("train_custom.py", argv))
    )


if __name__ == "__main__":
    sys.exit(main())
