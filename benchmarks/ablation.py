"""What each ingredient of the default recipe is worth: one change at a time, the same epochs.

A short proxy of the full training: 40,000 training images, accuracy on the 10,000 that are split
off for validation; the test set is never read. The same seeds everywhere, so that the splits, the
order and (where it can be) the first weights are equal.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import engine
import initialization
import metrics
from compute import choose_precision, predict, select_device
from config import TrainConfig
from data import Augmentation, Splits, TrainBatches, load_splits, normalize
from files import write_atomically, write_json
from models import MODERN, create_model
from optimizers import parameter_groups
from records import measured
from train_custom import RECIPES

# One change each: a setting of the recipe or network, a step of the start, a kind of averaging.
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "patches as they are, not whitened": {"without": "whiten"},
    "random start": {"without": "begin_as_identity"},
    "BatchNorm scales that train": {"without": "fix_batchnorm_scales"},
    "pools at the end of each pair": {"pool_after": (2, 4, 6)},
    "ReLU instead of GELU": {"activation": "relu"},
    "Muon for the convolutions": {"optimizer": "muon", "muon_lr": 0.12},
    "biases at the rate of the weights": {"bias_lr_scale": 1.0},
    "weight decay 0.05": {"weight_decay": 0.05},
    "no warm-up": {"warmup": 0.0},
    "no label smoothing": {"label_smoothing": 0.0},
    "random flips": {"flip": "random"},
    "no translation": {"translate": 0},
    "no cutout": {"cutout": 0},
    "average of the weights (EMA) added": {"averaging": "ema"},
    "Lookahead added": {"averaging": "lookahead"},
}


def start(splits: Splits, surgery: dict[str, Any], without: str | None) -> torch.nn.Module:
    """A network as `initialization.initialize_from_images` leaves it, but for one step."""
    model = create_model("custom_cnn", surgery)
    x = normalize(splits.train.images[:5000].cpu(), splits.mean, splits.std)
    steps = {
        "whiten": lambda: initialization.whiten(model.features[0], x),
        "begin_as_identity": lambda: initialization.begin_as_identity(model),
        "fix_batchnorm_scales": lambda: initialization.fix_batchnorm_scales(model),
    }
    for name, step in steps.items():
        if name != without:
            step()
    return model


class AveragingBatches(TrainBatches):
    """Batches that average the weights of `model` behind the step that was taken on each.

    "ema" keeps a moving average of 20 steps aside, and the network becomes that at the end.
    "lookahead", as in airbench, lets it go on from an average every fifth step, of which more and
    more is old.
    """

    def __init__(self, model: torch.nn.Module, kind: str, epochs: int, *options: Any):
        super().__init__(*options)
        self.kind, self.epochs = kind, epochs
        self.weights = [v for v in model.state_dict().values() if v.is_floating_point()]
        self.averages = [value.clone() for value in self.weights]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields x (B, 3, H, W) float and labels (B,) from the given step; both count from 0."""
        for step, batch in enumerate(super().epoch(epoch, first_step), first_step):
            yield batch
            done = (epoch + (step + 1) / self.num_steps) / self.epochs
            if self.kind == "ema":
                self._average(0.95, replace=done == 1)
            elif step % 5 == 0 or done == 1:
                self._average(0.95**5 * done**3, replace=True)

    @torch.no_grad()
    def _average(self, old: float, replace: bool) -> None:
        for average, value in zip(self.averages, self.weights, strict=True):
            average.lerp_(value, 1 - old)
            if replace:
                value.copy_(average)


def train(change: dict[str, Any], epochs: int, seed: int, args: argparse.Namespace) -> dict:
    """Trains a variant; returns its validation accuracy, plain and with TTA, and seconds."""
    device = select_device(args.device)
    surgery = {key: change.get(key, value) for key, value in MODERN.items()}
    settings = RECIPES["modern"] | {"epochs": epochs, "seed": seed, "recipe": "modern"}
    fields = {entry.name for entry in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**settings | {k: v for k, v in change.items() if k in fields})
    splits = load_splits(args.data_dir, val_fraction=0.2, limit=None, seed=0, device=device)
    torch.manual_seed(seed)
    model = start(splits, surgery, change.get("without"))
    model = model.to(device, memory_format=torch.channels_last)
    augmentation = Augmentation(config.flip, config.translate, config.cutout)
    statistics_ = splits.mean, splits.std
    options = splits.train, config.batch_size, *statistics_, augmentation, seed
    if kind := change.get("averaging"):
        batches = AveragingBatches(model, kind, epochs, *options)
    else:
        batches = TrainBatches(*options)
    precision, _ = choose_precision("auto", model, next(batches.epoch(0)), device)
    with tempfile.TemporaryDirectory() as folder:
        files = engine.RunFiles(Path(folder) / "state", Path(folder) / "history.csv", [], {})
        groups = parameter_groups(model, config)
        rows = engine.fit(model, groups, batches, None, config, precision, files)
    both = predict(model, splits.val.images, *statistics_, precision=precision, tta="crops")
    plain, tta = (metrics.top1(logits, splits.val.labels.cpu()) for logits in both)
    return {"top1": plain, "top1_tta": tta, "seconds": rows[-1]["seconds"]}


INTRODUCTION = """\
# What each ingredient of the default recipe is worth

Trainings of a few epochs on 40,000 images, judged on 10,000 that are split off for validation;
`ablation.json` gives command, day and machine. So short a training makes much of warm-up and start
and speaks against augmentation, which is meant for more. Worth is in points with TTA; where it is
negative the change was better. Minutes are those of the fastest seed and no measure: some runs
shared their cores, and the last two rows ran on faster ones.

"""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and spread over seeds of each variant, and what the change costs."""
    lines = [
        "| change | epochs | seeds | top-1 (%) | with TTA (%) | worth | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    full = None
    for name in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == name]
        cells = []
        for key in ("top1", "top1_tta"):
            values = [100 * run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        mean = 100 * statistics.mean(run["top1_tta"] for run in runs)
        full = mean if full is None else full
        worth = "" if name == "everything" else f"{full - mean:+.2f}"
        minutes = min(run["seconds"] for run in runs) / 60
        epochs = "/".join(str(count) for count in sorted({run["epochs"] for run in runs}))
        cells = [name, epochs, str(len(runs)), *cells, worth, f"{minutes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="NAME")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="add to this json, table beside it")
    args = parser.parse_args()
    earlier = args.output and args.output.exists()
    rows = json.loads(args.output.read_text())["rows"] if earlier else []
    for seed in args.seeds:
        for name in args.only:
            result = train(VARIANTS[name], args.epochs, seed, args)
            figures = {"variant": name, "epochs": args.epochs, "seed": seed, **result}
            print(figures, flush=True)
            rows.append(measured(figures, select_device(args.device)))
            if args.output:
                write_json(args.output, {"rows": rows})
                write_atomically(args.output.with_suffix(".md"), INTRODUCTION + table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
