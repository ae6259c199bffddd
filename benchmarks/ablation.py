"""What each ingredient of a recipe is worth: one change at a time, at the recipe's real length.

Trained on 45,000 images, judged on the 5,000 that are split off for validation; the test set is
never read. The same seeds everywhere, so that the order and (where it can be) the first weights are
equal; splits do not depend on the seed. A change that changes nothing in a recipe is left out.
"""

import inspect
import statistics
import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import metrics
import models
from benchmarks import common
from config import recipes
from data import Splits, make_splits
from reports import evaluation
from runtime.device import now
from sources.cifar10 import cifar10
from storage.files import write_atomically


def _optimizer_of(recipe: str) -> dict[str, Any]:
    keys = ("optimizer", "lr", "muon_lr", "weight_decay", "bias_lr_scale")
    return {key: vars(recipes.custom({"recipe": recipe}))[key] for key in keys}


# Settings, or: a step of the start that is left out, traits of the network, an averaging.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "full-size images from the start": {"small_first": ""},
    "first half at 24 pixels": {"small_first": "0.5:24"},
    "AdamW, with the rates of `modern`": _optimizer_of("modern"),
    "Muon, with the rates of `speedrun`": _optimizer_of("speedrun"),
    "cosine instead of a line": {"schedule": "cosine"},
    "a line instead of the cosine": {"schedule": "linear"},
    "warm-up over a fifth of the steps": {"warmup": 0.2},
    "no warm-up": {"warmup": 0.0},
    "biases at the rate of the weights": {"bias_lr_scale": 1.0},
    "BatchNorm momentum 0.1": {"batchnorm_momentum": 0.1},
    "BatchNorm momentum 0.4": {"batchnorm_momentum": 0.4},
    "no label smoothing": {"label_smoothing": 0.0},
    "random flips": {"flip": "random"},
    "no translation": {"translate": 0},
    "no cutout": {"cutout": 0},
    "patches as they are, not whitened": {"without": "whiten"},
    "no bias after the whitening": {"traits": {"biased": False}},
    "linear layers that replace the features, random start": {"traits": {"residual": False}},
    "head 256 wide": {"traits": {"hidden": (256, 128)}},
    "random start": {"without": "begin_as_identity"},
    "BatchNorm scales that train": {"without": "fix_batchnorm_scales"},
    "ReLU instead of GELU": {"traits": {"activation": "relu"}},
    "pools at the end of each pair": {"traits": {"pool_after": (2, 4, 6)}},
    "average of the weights (EMA) added": {"averaging": "ema"},
    "Lookahead added": {"averaging": "lookahead"},
}


def average(job: common.Job, kind: str | None, num_steps: int) -> None:
    """Takes the steps of a training and averages the weights behind them, where `kind` says so.

    "ema" keeps a moving average of 20 steps aside, and the network becomes that at the end.
    "lookahead", as in airbench, lets it go on from an average every fifth step, of which more and
    more is old.
    """
    weights = [value for value in job.model.state_dict().values() if value.is_floating_point()]
    averages = [value.clone() for value in weights]
    for done, _ in enumerate(job.images, start=1):
        last = done == num_steps
        if kind == "ema" or (kind and (done % 5 == 0 or last)):
            old = 0.95 if kind == "ema" else 0.95**5 * (done / num_steps) ** 3
            torch._foreach_lerp_(averages, weights, 1 - old)
            if kind == "lookahead" or last:
                torch._foreach_copy_(weights, averages)


def train(variant: str, seed: int, splits: Splits, args: Namespace) -> dict[str, Any] | None:
    """Trains a variant; None where it is the recipe itself.

    Returns:
        Validation accuracy, plain and with TTA, seconds and operations.
    """
    usual = {"recipe": args.recipe, "seed": seed} | ({"epochs": args.epochs} if args.epochs else {})
    change, usual = dict(VARIANTS[variant]), recipes.custom(usual)
    without, traits = change.pop("without", None), change.pop("traits", {})
    averaging = change.pop("averaging", None)
    settings = replace(usual, **change)
    network = models.NETWORKS[settings.network]
    built = {k: v.default for k, v in inspect.signature(models.CustomCNN).parameters.items()}
    built |= network
    alike = (change and settings == usual) or (traits and built | traits == built)
    if alike or (without and "whitened" not in network):
        return None
    with ExitStack() as stack:
        if without:
            stack.enter_context(mock.patch.object(models, without))
        stack.enter_context(mock.patch.dict(models.NETWORKS, {settings.network: network | traits}))
        job = common.Job(settings, splits)
    begin = now(args.device)
    average(job, averaging, settings.epochs * job.batches.num_steps)
    seconds = now(args.device) - begin
    both = evaluation.predict_split(job.model, splits.val, splits.stats, job.batches.side, "crops")
    plain, tta = (metrics.top1(logits, splits.val.labels.cpu()) for logits in both)
    found = {"epochs": settings.epochs, "top1": plain, "top1_tta": tta, "seconds": seconds}
    return found | {"flop": common.training_flop(job.model, job.batches)}


INTRODUCTION = """\
# What each ingredient of a recipe is worth

Trainings at their real length on 45,000 images, judged on 5,000 that are split off for validation;
the json beside this gives command, day and machine. Accuracies are means and standard deviations
over the seeds. Worth is in points with TTA, against "everything" on the same seeds; where it is
negative the change was better. Minutes are those of the fastest seed.
"""


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each change costs, a table a recipe and length."""
    text = INTRODUCTION
    for length in dict.fromkeys((row["recipe"], row["epochs"], row["limit"]) for row in rows):
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if (row["recipe"], row["epochs"], row["limit"]) == length:
                runs.setdefault(row["variant"], {})[row["seed"]] = row
        full, cells = runs.get("everything", {}), []
        for name, by_seed in runs.items():
            worth = [
                100 * (full[seed]["top1_tta"] - run["top1_tta"])
                for seed, run in by_seed.items()
                if seed in full and name != "everything"
            ]
            found = list(by_seed.values())
            cells.append(
                {
                    **{"change": name, "seeds": str(len(found))},
                    "top-1 (%)": common.spread([100 * run["top1"] for run in found]),
                    "with TTA (%)": common.spread([100 * run["top1_tta"] for run in found]),
                    "worth": common.spread(worth, "+.2f") if worth else "",
                    "PFLOP": f"{statistics.mean(run['flop'] for run in found) / 1e15:.3f}",
                    "minutes": f"{min(run['seconds'] for run in found) / 60:.1f}",
                }
            )
        limit = f", {length[2]:,} images" if length[2] else ""
        text += f"\n## `{length[0]}`, {length[1]} epochs{limit}\n\n{common.markdown(cells)}"
    return text


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--recipe", choices=recipes.BY_RECIPE, default="speedrun")
    parser.add_argument("--only", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--limit", type=int, help="images of each split, to try this out")
    args = parser.parse_args()
    options = {"val_fraction": 0.1, "limit": args.limit, "seed": 0, "device": args.device}
    splits, rows = make_splits(cifar10(args.data_dir), **options), common.earlier(args)
    epochs = args.epochs or recipes.custom({"recipe": args.recipe}).epochs
    for seed in args.seeds:
        for name in args.only:
            row = {"recipe": args.recipe, "variant": name, "seed": seed, "limit": args.limit}
            known = row | {"epochs": epochs}
            if any(known.items() <= earlier.items() for earlier in rows):
                continue
            if found := train(name, seed, splits, args):
                rows.append(common.measured(row | found, args.device))
                print({**row, **found}, flush=True)
                common.write(args, rows)
                write_atomically(args.output.with_suffix(".md"), tables(rows))
    print(tables(rows))


if __name__ == "__main__":
    main()
