"""Fine-tunes a network that knows ImageNet, on CIFAR-10 or on your own pictures."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import commandline, recipes
from config.settings import FineTuneSettings

EXAMPLES = """\
examples:
  python finetune.py --arch resnet18
  python finetune.py --arch resnet18 --pictures photos/   a folder per class
  python finetune.py --limit 2000 --epochs 2              a try of a minute

Weights go to checkpoints/NAME.pt, numbers and pictures to results/NAME/, with a
page to watch the training on. Ctrl-C stops it; the same command with --resume
goes on."""


def parse(argv: list[str] | None, measure: Callable[[Path], int] | None = None) -> FineTuneSettings:
    """Turns the command line into settings.

    Args:
        argv: the words after the script's name; None takes the process's own.
        measure: gives the median side of the pictures in a folder, on which defaults depend.

    Raises:
        UnusableInput: a flag is unknown or its value breaks a rule.
    """
    parser = commandline.Parser("finetune.py", __doc__, EXAMPLES)
    commandline.add_flags(parser, FineTuneSettings, recipes.BY_NETWORK, FineTuneSettings.arch)
    given = vars(parser.parse_args(argv))
    if measure and given.get("pictures"):
        given = recipes.by_side(given, measure(given["pictures"]))
    return recipes.finetune(given)


if __name__ == "__main__":
    commandline.before_torch(parse)  # importing torch takes seconds: --help need not wait

import torch

import engine
import models
import optimizers
from data import Splits, class_weights
from pretrained import IMAGENET_STATS, PretrainedNetwork, freeze, parts
from reports import evaluation
from runs import features, loading, run
from runs.finish import finish
from runs.training import Training
from runtime import processes
from runtime.device import compile_or_not, now, prepare
from sources.pictures import median_side


def make_network(
    settings: FineTuneSettings, splits: Splits
) -> tuple[PretrainedNetwork, dict[str, Any]]:
    """The network on the device before its weights are loaded, and the arguments that build it.

    Args:
        settings: which network, side of its input, dropout, seed.
        splits: with the classes it is to tell apart.
    """
    torch.manual_seed(settings.seed)
    arguments = {
        "image_size": settings.image_size,
        "open_stem": settings.image_size == 32,
        "dropout": settings.dropout,
    }
    model = models.create_model(settings.arch, arguments, len(splits.classes))
    device = splits.train.labels.device
    return model.to(device, memory_format=torch.channels_last), arguments


def parameter_groups(model: PretrainedNetwork, settings: FineTuneSettings) -> list[dict[str, Any]]:
    """Groups whose learning rates fall from the head to the stem, stage by stage."""
    groups = []
    for depth, stage in enumerate(reversed(model.stages().values())):
        groups += optimizers.parameter_groups(
            stage,
            optimizer=settings.optimizer,
            classifier=model.classifier,
            weight_decay=settings.weight_decay,
            lr_scale=settings.stage_lr_scale**depth,
        )
    return groups


def train(settings: FineTuneSettings, command: str) -> None:
    """Fine-tunes one network and leaves its checkpoint, numbers and pictures."""
    with run.claim(settings, settings.arch, command) as claimed:
        device = claimed.device

        # Data
        splits, source, pictures = loading.load_splits(
            settings, device, claimed.checkpoint_path, claimed.state
        )
        settings = loading.settled(settings, len(splits.train.labels))
        splits = splits._replace(stats=IMAGENET_STATS)
        batches = loading.train_batches(settings, splits, settings.image_size)
        validation = loading.validation(splits, settings.image_size)
        prepare()

        # Network
        model, arguments = make_network(settings, splits)
        weights = loading.start_weights(model, settings.weights, settings.arch, splits.classes)
        freeze(model, settings.unfreeze)
        described = run.begin(
            claimed,
            settings,
            model,
            batches,
            splits,
            arch=settings.arch,
            arguments=arguments,
            start_weights=weights,
            data=source,
        )
        precision = described["precision"]

        # What is frozen is computed once; then only the rest is left to train.
        trained = model
        begun_at = now(device)
        if features.keeps(settings, len(splits.train.labels), device):
            backbone, trained = parts(model, settings.unfreeze)
            batches, validation = features.cached(
                backbone, batches, splits, precision, claimed.checkpoint_path
            )
        feature_seconds = now(device) - begun_at

        # Optimiser
        groups = parameter_groups(model, settings)
        optimizer = optimizers.make_optimizer(groups, settings.optimizer, settings.lr, precision)

        # Training
        network = compile_or_not(processes.shared(trained), settings.compile, device)
        training = Training(
            claimed,
            described,
            # With "most" a state holds the whole network: it can be evaluated.
            model if settings.unfreeze == "most" else trained,
            optimizer,
            batches,
            validated=trained,
            epochs=settings.epochs,
            save_every=settings.save_every,
            pictures=pictures,
            seconds_before=feature_seconds,
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
            schedule="constant" if settings.average else "cosine",
            precision=precision,
            label_smoothing=settings.label_smoothing,
            class_weights=weights_of_classes,
            average=settings.average,
            rounds=settings.rounds,
            progress=training.progress,
        )
        training.follow(steps, validation)

        # Report
        finish(training, model, splits, tta=evaluation.usual_views(settings.flip))


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(
        lambda: train(parse(argv, median_side), commandline.command("finetune.py", argv))
    )


if __name__ == "__main__":
    sys.exit(main())
