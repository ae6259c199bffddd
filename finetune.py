"""Fine-tunes a network that knows ImageNet, on CIFAR-10 or on your own pictures."""

import sys
from typing import TYPE_CHECKING, Any

from config import commandline, recipes
from config.settings import FineTuneSettings
from runs import run

if TYPE_CHECKING:
    from data import Splits, TrainBatches
    from pretrained import OperatedNetwork

# What every torchvision network of 2015 to 2021 was trained with.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

EXAMPLES = """\
examples:
  python finetune.py --arch resnet18
  python finetune.py --arch resnet18 --pictures photos/   a folder per class
  python finetune.py --limit 2000 --epochs 2              a try of a minute

Weights go to checkpoints/NAME.pt, numbers and pictures to results/NAME/, with a
page to watch the training on. Ctrl-C stops it; the same command with --resume
goes on."""


def parse(argv: list[str] | None) -> FineTuneSettings:
    """Turns the command line into settings.

    Raises:
        UnusableInput: a flag is unknown or its value breaks a rule.
    """
    parser = commandline.Parser("finetune.py", __doc__, EXAMPLES)
    commandline.add_flags(parser, FineTuneSettings, recipes.BY_NETWORK, FineTuneSettings.arch)
    return recipes.finetune(vars(parser.parse_args(argv)))


def parameter_groups(model: "OperatedNetwork", settings: FineTuneSettings) -> list[dict[str, Any]]:
    """Groups whose learning rates fall from the head to the stem, stage by stage."""
    import optimizers

    return [
        group
        for depth, stage in enumerate(reversed(model.stages().values()))
        for group in optimizers.parameter_groups(
            stage,
            optimizer=settings.optimizer,
            weight_decay=settings.weight_decay,
            lr_scale=settings.stage_lr_scale**depth,
        )
    ]


def begin(
    settings: FineTuneSettings, splits: "Splits"
) -> "tuple[OperatedNetwork, dict[str, Any], TrainBatches]":
    """The network before its weights are loaded, how it is built, and the batches it is to see."""
    import torch

    from models import create_model
    from runs import loading

    torch.manual_seed(settings.seed)
    surgery = {
        "image_size": settings.image_size,
        "open_stem": settings.image_size == 32,
        "dropout": settings.dropout,
    }
    model = create_model(settings.arch, surgery, len(splits.classes))
    batches = loading.train_batches(settings, splits, settings.image_size)
    device = splits.train.labels.device
    return model.to(device, memory_format=torch.channels_last), surgery, batches


def train(settings: FineTuneSettings, command: str) -> None:
    """Fine-tunes one network and leaves its checkpoint, numbers and pictures."""
    # Not at the top: --help is to answer, and Ctrl-C to be heeded, before torch is loaded.
    import engine
    from data import ChannelStats, inputs
    from optimizers import make_optimizer
    from pretrained import freeze
    from reports import evaluation, provenance
    from runs import loading
    from runs.features import feature_inputs, of_trunk
    from runs.training import Training
    from runtime import processes
    from runtime.amx import as_products
    from runtime.device import compile_or_not, now, prepare, select_device

    with (
        processes.joined(select_device(settings.device)) as device,
        run.claim(settings, settings.arch, command) as claimed,
    ):
        splits, source, pictures = loading.load_splits(settings, device, claimed.state)
        prepare()
        splits = splits._replace(stats=ChannelStats(*IMAGENET))

        model, surgery, batches = begin(settings, splits)
        weights = loading.start_weights(model, settings.weights, settings.arch, splits.classes)
        trunk, tail = freeze(model, settings.unfreeze)
        evaluation.draw_batch(claimed, batches, splits)
        precision = loading.settle_precision(settings, model, batches, claimed.state)
        as_products(model, precision, device)
        described = provenance.describe(
            *(claimed, settings, model, splits, precision),
            arch=settings.arch,
            surgery=surgery,
            image_size=batches.side,
            start_weights=weights,
            data=source,
        )

        begun, trained, judged = now(device), model, None
        if settings.cached:  # what is frozen is computed once; then only the rest is left to train
            trained = tail
            batches, judged = of_trunk(trunk, batches, splits, precision, claimed.checkpoint_path)

        def validate() -> tuple[float, float]:
            images = inputs(processes.own(splits.val.images), splits.stats, batches.side)
            x = images if judged is None else feature_inputs(judged, device)
            return engine.evaluate(trained, x, splits.val.labels, precision)

        groups = parameter_groups(model, settings)
        optimizer = make_optimizer(groups, settings.optimizer, settings.lr, precision)
        network = compile_or_not(processes.shared(trained), settings.compile, device)
        training = Training(
            *(claimed, settings, trained, optimizer, batches, precision, described),
            seconds_before=now(device) - begun,
            pictures=pictures,
        )
        training.follow(
            engine.train(
                *(network, optimizer, batches),
                precision=precision,
                progress=training.progress,
                **loading.learning(settings),
            ),
            validate if splits.val else None,
        )
        evaluation.finish(training, model, splits, tta="flip")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return commandline.exit_code(
        lambda: train(parse(argv), commandline.command("finetune.py", argv))
    )


if __name__ == "__main__":
    sys.exit(main())
