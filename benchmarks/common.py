"""What several benchmarks share: their flags, a training's steps, its operations, its figures."""

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import CIFAR10

import engine
import finetune
import train_custom
from config import commandline
from config.settings import CustomSettings, FineTuneSettings, Settings
from data import ChannelStats, Split, Splits, TrainBatches
from optimizers import make_optimizer, parameter_groups
from pretrained import freeze
from reports import provenance
from runs import loading
from runtime.amx import as_products
from runtime.device import choose_precision, compile_or_not, now, prepare, select_device
from storage.files import write_json

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"


def parser(script: str, description: str, device: str = "auto") -> argparse.ArgumentParser:
    """The command line of a benchmark, given its file, with the flags that all have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = RESULTS / f"{Path(script).stem}.json"
    made.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is kept")
    made.add_argument("--device", type=select_device, default=device, help="auto, cpu, cuda")
    made.add_argument("--output", type=Path, default=output, help="the json that is written")
    return made


def measured(figures: dict[str, Any], device: torch.device = provenance.CPU) -> dict[str, Any]:
    """A benchmark's figures after the command, day, machine and code they come from."""
    words = ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    return {
        "command": commandline.quoted(words),
        "date": date.today().isoformat(),
        "revision": provenance.revision(),
        "environment": provenance.environment(device),
        **figures,
    }


def write(args: argparse.Namespace, found: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes `--output`: figures with what they come from, or rows that say so themselves."""
    rows = isinstance(found, list)
    write_json(args.output, {"rows": found} if rows else measured(found, args.device))


def earlier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that `--output` holds already."""
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    if any("limit" not in row for row in rows):  # of recipes as they once were
        raise SystemExit(f"{args.output} holds rows of an older form: move it, or give --output")
    return rows


def splits(settings: Settings, args: argparse.Namespace) -> Splits:
    """What a script would load for these settings, from the command line's folder."""
    return loading.load_splits(replace(settings, data_dir=args.data_dir), args.device)[0]


class Job:
    """A training as a script runs it with these settings, without its files.

    `steps` are those of `engine.train`; `images` takes them and yields the images of each.
    """

    def __init__(self, settings: CustomSettings | FineTuneSettings, splits: Splits):
        prepare()
        device = splits.train.labels.device
        tuning = isinstance(settings, FineTuneSettings)
        begin = finetune.begin if tuning else train_custom.begin
        self.model, self.surgery, self.batches = begin(settings, splits)
        if tuning:
            freeze(self.model, settings.unfreeze)
        first = next(self.batches.epoch(0))
        self.precision, _ = choose_precision(settings.precision, self.model, first, device)
        as_products(self.model, self.precision, device)
        groups = (
            finetune.parameter_groups(self.model, settings)
            if tuning
            else parameter_groups(
                self.model, classifier=self.model.classifier, **loading.grouping(settings)
            )
        )
        self.optimizer = make_optimizer(groups, settings.optimizer, settings.lr, self.precision)
        network = compile_or_not(self.model, settings.compile, device)
        parts, options = (network, self.optimizer, self.batches), loading.learning(settings)
        self.steps = engine.train(*parts, precision=self.precision, **options)
        fewest, more = divmod(self.batches.num_images, self.batches.num_steps)
        # At step 0 an epoch has ended.
        self.images = (fewest + (at.step <= more) for at in self.steps if at.step)


def rate(images: Iterator[int], number: int, device: torch.device) -> float:
    """Images/s of so many steps."""
    begin = now(device)
    count = sum(next(images) for _ in range(number))
    return count / (now(device) - begin)


def with_and_without(
    benchmark: str, description: str, measure: Callable, jobs: Sequence[str], **figures: Any
) -> None:
    """The command line of a benchmark of a measure that `Job` takes, job by job.

    Steps of each job in a process of its own, with the measure and without it, in turn: images/s
    after three first steps, medians over the turns.

    Args:
        benchmark: its file.
        description: shown by --help.
        measure: the function of this module that takes it.
        jobs: commands of the scripts.
        figures: written beside.
    """
    made = parser(benchmark, description, "cpu")
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--only", nargs=2, metavar=("JOB", "SIDE"), help="print its images/s")
    args = made.parse_args()
    if args.only:
        job, side = args.only
        if side == "without":
            globals()[measure.__name__] = lambda *_: None
        script, *flags = job.split()
        parse = finetune.parse if script == "finetune.py" else train_custom.parse
        settings = parse([*flags, "--precision", "bf16"])
        images = Job(settings, splits(settings, args)).images
        rate(images, 3, args.device)
        print(json.dumps(rate(images, max(4, 3000 // settings.batch_size), args.device)))
        return
    rows = {}
    for job in jobs:
        rates: dict[str, list[float]] = {"with": [], "without": []}
        for side in list(rates) * args.turns:
            command = [sys.executable, benchmark, "--data-dir", args.data_dir, "--only", job, side]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            rates[side].append(json.loads(done.stdout.splitlines()[-1]))
        medians = {side: round(statistics.median(values), 1) for side, values in rates.items()}
        rows[job] = medians | {"ratio": round(medians["with"] / medians["without"], 3)}
        print(f"{job}: {rows[job]}", flush=True)
    write(args, {**figures, "images_per_second": rows})


def flop(model: nn.Module, side: int, training: bool = True) -> int:
    """Floating-point operations of convolutions and linear layers for one image.

    Two for each multiplication; in training the gradients of weights and of inputs take as many
    again, each where it is needed: the first trained layer's input needs none, a fixed layer's
    weights neither. Torch counts them as they are called; for grouped convolutions it is not exact.
    """
    model = copy.deepcopy(model).to("meta").eval()  # counts without computing
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, 3, side, side, device="meta"))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


def training_flop(model: nn.Module, batches: TrainBatches) -> float:
    """Operations of a whole training: `flop` of every image at the side it has in its step."""
    of_side = functools.cache(functools.partial(flop, model))
    fewest, more = divmod(batches.num_images, batches.num_steps)
    return float(
        sum(
            (fewest + (step < more)) * of_side(batches.side_at(epoch, step))
            for epoch in range(batches.num_epochs)
            for step in range(batches.num_steps)
        )
    )


class Pictures(CIFAR10):
    """CIFAR-10 as torchvision serves it, one PIL image at a time, from arrays in memory."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]):
        self.data, self.targets = split.images.cpu().numpy(), split.labels.tolist()
        self.transform, self.target_transform = transform, None


def plain_steps(
    split: Split, stats: ChannelStats, model: nn.Module, batch_size: int, device: torch.device
) -> Iterator[int]:
    """The loop of PyTorch's tutorial, which trains the model in place without end.

    Images are read sample by sample with two workers, mirrored at random, in float32; Adam at a
    constant rate. Yields the images of each step.
    """
    chain = transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*stats)
    pictures = Pictures(split, transforms.Compose(chain))
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while True:
        for x, labels in DataLoader(
            pictures, batch_size, shuffle=True, num_workers=2, drop_last=True
        ):
            x, labels = x.to(device), labels.to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            yield len(labels)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of several values, the standard deviation of a sample."""
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows with equal keys, which head it."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
