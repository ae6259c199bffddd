"""What each ingredient of a recipe is worth: one change at a time, at the recipe's real length.

Trained on 45,000 images, evaluated on the 5,000 that are split off for validation; the test set is
never read. The same seeds everywhere, so that the order and (where it can be) the first weights are
equal; splits do not depend on the seed. Some changes are what one of the recipes does already. Rows
that `--output` holds are kept and not run again.
"""

import statistics
import sys
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import models
from benchmarks import common
from config.settings import CustomSettings
from data import Splits, make_splits, normalize
from runtime.device import now
from sources.cifar10 import cifar10
from storage.files import write_json


@dataclass(frozen=True)
class Change:
    """What a training does otherwise: settings, arguments of the network, or one of the rest.

    Attributes:
        settings: by name.
        network: arguments of `models.CustomCNN`, by name.
        left_out: a step of the start, see `make_network`.
        averaging: of the weights, see `average`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""
    averaging: str = ""


# What `modern` and `speedrun` say of their optimisers.
ADAMW = {"optimizer": "adamw", "lr": 8e-3, "weight_decay": 0.5, "bias_lr_scale": 20.0}
MUON = {
    "optimizer": "muon",
    "lr": 0.01,
    "muon_lr": 0.17,
    "weight_decay": 0.2,
    "bias_lr_scale": 5000.0,
}
CHANGES = {
    "everything": Change(),
    "full-size images from the start": Change({"small_first": ""}),
    "first half at 24 pixels": Change({"small_first": "0.5:24"}),
    "AdamW, with the rates of `modern`": Change(ADAMW),
    "Muon, with the rates of `speedrun`": Change(MUON),
    "cosine instead of a line": Change({"schedule": "cosine"}),
    "a line instead of the cosine": Change({"schedule": "linear"}),
    "warm-up over a fifth of the steps": Change({"warmup": 0.2}),
    "no warm-up": Change({"warmup": 0.0}),
    "biases at the rate of the weights": Change({"bias_lr_scale": 1.0}),
    "BatchNorm momentum 0.1": Change({"batchnorm_momentum": 0.1}),
    "BatchNorm momentum 0.4": Change({"batchnorm_momentum": 0.4}),
    "no label smoothing": Change({"label_smoothing": 0.0}),
    "random flips": Change({"flip": "random"}),
    "no translation": Change({"translate": 0}),
    "no cutout": Change({"cutout": 0}),
    "no bias after the whitening": Change(network={"biased": False}),
    "linear layers that replace the features": Change(network={"residual": False}),
    "head 256 wide": Change(network={"hidden": (256, 128)}),
    "ReLU instead of GELU": Change(network={"activation": "relu"}),
    "pools at the end of each pair": Change(network={"pool_after": (2, 4, 6)}),
    "patches as they are, not whitened": Change(left_out="whitening"),
    "random start": Change(left_out="identity"),
    "BatchNorm scales that train": Change(left_out="fixed scales"),
    "average of the weights (EMA) added": Change(averaging="ema"),
    "Lookahead added": Change(averaging="lookahead"),
}


def make_network(
    settings: CustomSettings, splits: Splits, change: Change
) -> tuple[nn.Module, dict[str, Any]]:
    """As `train_custom.make_network`, but for what the change says of the network and its start."""
    torch.manual_seed(settings.seed)
    arguments = models.NETWORKS[settings.network] | {"momentum": settings.batchnorm_momentum}
    arguments |= change.network
    model = models.create_model("custom_cnn", arguments, len(splits.classes))
    if change.left_out != "whitening":
        images = normalize(splits.train.images[:5000].cpu(), splits.stats)
        models.whiten(model.features[0], images)
    if change.left_out != "identity":
        models.begin_as_identity(model)
    if change.left_out != "fixed scales":
        models.fix_batchnorm_scales(model)
    device = splits.train.labels.device
    return model.to(device, memory_format=torch.channels_last), arguments


def average(job: common.Job, kind: str, num_steps: int) -> None:
    """Takes the steps of a training and averages the weights behind them, where `kind` says so.

    "ema" keeps a moving average of 20 steps aside, and the network becomes that at the end.
    "lookahead", as in airbench, lets it go on from an average every fifth step, of which more and
    more is old.
    """
    weights = [value for value in job.model.state_dict().values() if value.is_floating_point()]
    averages = [value.clone() for value in weights]
    for done, _ in enumerate(job.images, start=1):
        last = done == num_steps
        if kind == "ema":
            torch._foreach_lerp_(averages, weights, 1 - 0.95)
        if kind == "lookahead" and (done % 5 == 0 or last):
            old = 0.95**5 * (done / num_steps) ** 3
            torch._foreach_lerp_(averages, weights, 1 - old)
            torch._foreach_copy_(weights, averages)
        if kind == "ema" and last:
            torch._foreach_copy_(weights, averages)


def train(usual: CustomSettings, change: Change, splits: Splits, args: Namespace) -> dict[str, Any]:
    """Trains with a change.

    Returns:
        Validation accuracy, plain and with TTA, seconds and operations.
    """
    settings = replace(usual, **change.settings)
    job = common.Job(settings, splits, make_network=partial(make_network, change=change))
    start = now(args.device)
    average(job, change.averaging, settings.epochs * job.batches.num_steps)
    seconds = now(args.device) - start
    found = common.accuracies(job.model, splits.val, splits.stats)
    return {**found, "seconds": seconds, "flop": common.training_flop(job.model, job.batches)}


def summary(rows: list[dict[str, Any]], asked: dict[str, Any]) -> str:
    """A line for each change of the recipe that was asked for, over its seeds."""
    groups: dict[str, dict[int, float]] = {}
    for row in rows:
        if asked.items() <= row.items():
            groups.setdefault(row["change"], {})[row["seed"]] = 100 * row["top1_tta"]
    usual = groups.get("everything", {})
    lines = []
    for name, by_seed in groups.items():
        line = f"{name}: with TTA {common.mean_and_spread(list(by_seed.values()))} %"
        worth = [usual[seed] - tta for seed, tta in by_seed.items() if seed in usual]
        if worth and name != "everything":
            line += f", worth {statistics.mean(worth):+.2f} points"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    recipes = ("modern", "speedrun", "best")  # those whose network is whitened
    parser.add_argument("--recipe", choices=recipes, default="speedrun")
    parser.add_argument("--only", nargs="+", default=CHANGES, choices=CHANGES, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--limit", type=int, help="images of each split, to try this out")
    args = parser.parse_args()
    usual = common.settings_of(f"train_custom.py --recipe {args.recipe}")
    if args.epochs:
        usual = replace(usual, epochs=args.epochs)
    arrays = cifar10(args.data_dir)
    splits = make_splits(arrays, val_fraction=0.1, limit=args.limit, seed=0, device=args.device)
    rows = common.read_rows(args.output)
    asked = {"recipe": args.recipe, "epochs": usual.epochs, "limit": args.limit}
    for seed in args.seeds:
        for name in args.only:
            row = {**asked, "change": name, "seed": seed}
            if any(row.items() <= earlier.items() for earlier in rows):
                continue
            found = train(replace(usual, seed=seed), CHANGES[name], splits, args)
            print({**row, **found}, flush=True)
            rows.append(common.measured({**row, **found}, args.device))
            write_json(args.output, {"rows": rows})
    print(summary(rows, asked))


if __name__ == "__main__":
    main()
