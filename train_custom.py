"""Trains the nine-layer CNN from scratch, on CIFAR-10 or on your own pictures."""

import sys
from typing import TYPE_CHECKING, Any

from config import commandline, recipes
from config.settings import CustomSettings
from runs import run

if TYPE_CHECKING:
    from torch import nn

    from data import Splits, TrainBatches

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
    parser = commandline.Parser("train_custom.py", __doc__, EXAMPLES)
    commandline.add_flags(parser, CustomSettings, recipes.BY_RECIPE, CustomSettings.recipe)
    return recipes.custom(vars(parser.parse_args(argv)))


def begin(
    settings: CustomSettings, splits: "Splits"
) -> "tuple[nn.Module, dict[str, Any], TrainBatches]":
    """The network as its training begins, how it is built, and the batches it is to see."""
    import torch

    from data import normalize, resize
    from models import NETWORKS, begin_from_images, create_model
    from runs import loading

    torch.manual_seed(settings.seed)
    side = settings.image_size or 32
    surgery = NETWORKS[settings.network] | {"momentum": settings.batchnorm_momentum}
    model = create_model("custom_cnn", surgery, len(splits.classes))
    if "whitened" in surgery:
        images = splits.train.images[:5000].cpu()
        begin_from_images(model, resize(normalize(images, splits.stats), side))
    batches = loading.train_batches(settings, splits, side)
    device = splits.train.labels.device
    return model.to(device, memory_format=torch.channels_last), surgery, batches


def train(settings: CustomSettings, command: str) -> None:
    """Trains one network and leaves its checkpoint, numbers and pictures."""
    # Not at the top: --help is to answer, and Ctrl-C to be heeded, before torch is loaded.
    import engine
    from data import inputs
    from optimizers import make_optimizer, parameter_groups
    from reports import evaluation, provenance
    from runs import loading
    from runs.training import Training
    from runtime import processes
    from runtime.amx import as_products
    from runtime.device import compile_or_not, prepare, select_device

    with (
        processes.joined(select_device(settings.device)) as device,
        run.claim(settings, "custom_cnn", command) as claimed,
    ):
        splits, source, pictures = loading.load_splits(settings, device, claimed.state)
        prepare()

        model, surgery, batches = begin(settings, splits)
        weights = loading.start_weights(model, settings.weights, "custom_cnn", splits.classes)
        evaluation.draw_batch(claimed, batches, splits)
        precision = loading.settle_precision(settings, model, batches, claimed.state)
        as_products(model, precision, device)

        groups = parameter_groups(model, **loading.grouping(settings))
        optimizer = make_optimizer(groups, settings.optimizer, settings.lr, precision)
        network = compile_or_not(processes.shared(model), settings.compile, device)

        described = provenance.describe(
            *(claimed, settings, model, splits, precision),
            arch="custom_cnn",
            surgery=surgery,
            image_size=batches.side,
            start_weights=weights,
            data=source,
        )
        training = Training(
            *(claimed, settings, model, optimizer, batches, precision, described),
            pictures=pictures,
        )

        def validate() -> tuple[float, float]:
            images = inputs(processes.own(splits.val.images), splits.stats, batches.side)
            return engine.evaluate(model, images, splits.val.labels, precision)

        training.follow(
            engine.train(
                *(network, optimizer, batches),
                precision=precision,
                progress=training.progress,
                **loading.learning(settings),
            ),
            validate if splits.val else None,
        )
        evaluation.finish(training, model, splits, tta="crops")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(
        lambda: train(parse(argv), commandline.command("train_custom.py", argv))
    )


if __name__ == "__main__":
    sys.exit(main())
