"""Trains the nine-layer CNN on CIFAR-10 from scratch: `python train_custom.py --help`."""

import sys

import torch

import cli
import data
import engine
import metrics
import runs
from compute import choose_precision, predict, select_device
from config import TrainConfig
from models import MODERN, create_model, initialize_from_images, num_parameters

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
        "epochs": 20,
        "batch_size": 256,
        "lr": 3e-3,
        "weight_decay": 0.05,
        "label_smoothing": 0.2,
        "warmup": 0.2,
        "bias_lr_scale": 8.0,
        "flip": "alternating",
        "translate": 2,
    },
}
SURGERY = {"classic": {}, "modern": MODERN}


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


def train(config: TrainConfig, command: str) -> None:
    """Trains one network and leaves its checkpoint, numbers and pictures."""
    device = select_device(config.device)
    with runs.claim(config, "custom_cnn", command) as run:
        splits = data.load_splits(
            config.data_dir,
            val_fraction=config.val_fraction,
            limit=config.limit,
            seed=config.seed,
            device=device,
        )
        if config.batch_size > len(splits.train.labels):
            raise ValueError(
                f"--batch-size {config.batch_size}: there are {len(splits.train.labels)} training "
                "images; take a smaller batch"
            )
        torch.manual_seed(config.seed)
        surgery = SURGERY[config.recipe]
        model = create_model("custom_cnn", surgery)
        if config.recipe == "modern":
            sample = data.normalize(splits.train.images[:5000].cpu(), splits.mean, splits.std)
            initialize_from_images(model, sample)
        model = model.to(device, memory_format=torch.channels_last)
        batches = data.TrainBatches(
            splits.train,
            config.batch_size,
            splits.mean,
            splits.std,
            data.Augmentation(config.flip, config.translate, config.cutout),
            config.seed,
        )
        if run.state:
            precision, reason = run.state["precision"], "resuming the saved state"
        else:
            first = next(batches.epoch(0))
            precision, reason = choose_precision(config.precision, model, first, device)
        described = runs.describe(
            run, config, "custom_cnn", surgery, model, splits, device, {"used_precision": precision}
        )
        sizes = described["splits"]
        print(
            f"{run.name}: {num_parameters(model)['total']:,} parameters, recipe {config.recipe}, "
            f"{config.epochs} epochs\n{sizes['train']:,} training, {sizes['val']:,} validation, "
            f"{sizes['test']:,} test images on {described['environment']['hardware']}\n{reason}",
            flush=True,
        )

        def validate() -> tuple[float, float]:
            images, labels = splits.val
            logits = predict(model, images, splits.mean, splits.std, precision=precision)
            return metrics.cross_entropy(logits, labels.cpu()), metrics.top1(logits, labels.cpu())

        history = engine.fit(
            model,
            engine.parameter_groups(model, config),
            batches,
            validate if splits.val else None,
            config,
            precision,
            run.files,
            run.state,
        )
        report = runs.finish(run, described, model, splits, history)
    print(
        f"test accuracy {100 * report['top1']:.2f} %, with its mirror image "
        f"{100 * report['top1_tta']:.2f} % ({report['n']:,} images, read once)\n"
        f"weights  {run.checkpoint_path}\nresults  {run.results_dir}/\n"
        f"next     python evaluate.py {run.checkpoint_path} --tta crops"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""

    def script() -> None:
        try:
            train(parse(argv), cli.command_line("train_custom.py", argv))
        except runs.AlreadyFinished as done:
            print(done)

    return cli.exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
