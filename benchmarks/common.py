"""What several benchmarks share: their flags, a training's steps, its operations, its figures."""

import argparse
import copy
import json
import os
import shlex
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
import metrics
import train_custom
from config import commandline
from config.settings import CustomSettings, FineTuneSettings, Settings
from data import ChannelStats, Split, Splits, TrainBatches
from optimizers import make_optimizer
from pretrained import freeze
from reports import evaluation, provenance
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


def measured(figures: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A benchmark's figures after the command, day, machine and code they come from."""
    words = ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    return {
        "command": commandline.quoted(words),
        "date": date.today().isoformat(),
        "revision": provenance.revision(),
        "environment": provenance.environment(device),
        **figures,
    }


def write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes `--output`: a benchmark's figures with what they come from."""
    write_json(args.output, measured(figures, args.device))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The trainings that an `--output` holds already."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def settings_of(job: str) -> CustomSettings | FineTuneSettings:
    """The settings of a command such as "finetune.py --arch resnet18"."""
    script, *flags = shlex.split(job)
    return finetune.parse(flags) if script == "finetune.py" else train_custom.parse(flags)


def splits(settings: Settings, args: argparse.Namespace) -> Splits:
    """What a script would load for these settings, from the command line's folder."""
    return loading.load_splits(
        replace(settings, data_dir=args.data_dir),
        args.device,
        settings.checkpoint_dir / "benchmark.pt",
    )[0]


class Job:
    """A training as a script runs it with these settings, without its files.

    Args:
        settings: of the script.
        splits: on their device.
        make_network: makes the network and its arguments of settings and splits; by default as
            the script does.
        keep_memory: keep freed memory, as the script does (`runtime.device.prepare`).
        products: convolve small maps as products where that is faster, as the script does.

    `images` takes the steps of `engine.train` and yields the number of images of each.
    """

    def __init__(
        self,
        settings: CustomSettings | FineTuneSettings,
        splits: Splits,
        *,
        make_network: Callable[[Any, Splits], tuple[nn.Module, dict[str, Any]]] | None = None,
        keep_memory: bool = True,
        products: bool = True,
    ):
        device = splits.train.labels.device
        script = finetune if isinstance(settings, FineTuneSettings) else train_custom
        if keep_memory:
            prepare()
        if make_network is None:
            make_network = script.make_network
        self.model, self.arguments = make_network(settings, splits)
        self.batches = loading.train_batches(settings, splits, settings.image_size or 32)
        schedule = "cosine"
        if script is finetune:
            freeze(self.model, settings.unfreeze)
        else:
            schedule = settings.schedule
        first = next(self.batches.epoch(0))
        self.precision, _ = choose_precision(settings.precision, self.model, first, device)
        if products:
            as_products(self.model, self.precision, device)
        groups = script.parameter_groups(self.model, settings)
        self.optimizer = make_optimizer(groups, settings.optimizer, settings.lr, self.precision)
        self.network = compile_or_not(self.model, settings.compile, device)
        self.options = {
            "precision": self.precision,
            "epochs": settings.epochs,
            "lr": settings.lr,
            "warmup": settings.warmup,
            "schedule": schedule,
            "label_smoothing": settings.label_smoothing,
        }
        self.images = self._images()

    def _images(self) -> Iterator[int]:
        for at in engine.train(self.network, self.optimizer, self.batches, **self.options):
            if at.step > 0:  # at step 0 an epoch has ended
                yield engine.images_in_step(
                    self.batches.num_images, self.batches.num_steps, at.step - 1
                )


def throughput(images: Iterator[int], num_steps: int, device: torch.device) -> float:
    """Images/s of so many steps."""
    begin = now(device)
    count = sum(next(images) for _ in range(num_steps))
    return count / (now(device) - begin)


def compare(
    script: str,
    description: str,
    without: dict[str, bool],
    jobs: Sequence[str],
    first: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """The command line of a benchmark that leaves something out of a training, job by job.

    Steps of each job in a process of its own, with it and without it, in turn: images/s after three
    first steps, medians over the turns.

    Args:
        script: file of the benchmark.
        description: shown by --help.
        without: the argument of `Job` that leaves it out.
        jobs: commands of the scripts.
        first: measures something before the jobs; its figures are written beside theirs.
    """
    made = parser(script, description, "cpu")
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--images", type=int, default=3000, help="in a turn, in 4 steps at least")
    made.add_argument("--jobs", nargs="*", default=jobs, metavar="COMMAND")
    made.add_argument("--measure", nargs=2, metavar=("COMMAND", "SIDE"), help="print its images/s")
    args = made.parse_args()
    if args.measure:
        command, side = args.measure
        settings = replace(settings_of(command), precision="bf16")
        options = without if side == "without" else {}
        images = Job(settings, splits(settings, args), **options).images
        throughput(images, 3, args.device)
        print(throughput(images, max(4, args.images // settings.batch_size), args.device))
        return
    figures = first() if first else {}
    rows = {}
    for job in args.jobs:
        rates: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(args.turns):
            for side, values in rates.items():
                command = [sys.executable, script, "--data-dir", str(args.data_dir)]
                command += ["--images", str(args.images), "--measure", job, side]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                values.append(float(done.stdout.splitlines()[-1]))
        medians = {side: round(statistics.median(values), 1) for side, values in rates.items()}
        rows[job] = {**medians, "ratio": round(medians["with"] / medians["without"], 3)}
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
    of_side: dict[int, int] = {}
    total = 0
    for epoch in range(batches.num_epochs):
        for step in range(batches.num_steps):
            side = batches.side_at(epoch, step)
            if side not in of_side:
                of_side[side] = flop(model, side)
            images = engine.images_in_step(batches.num_images, batches.num_steps, step)
            total += images * of_side[side]
    return float(total)


def accuracies(model: nn.Module, split: Split, stats: ChannelStats) -> dict[str, float]:
    """Top-1 accuracy on a split of images of 32x32 pixels, of one view and with TTA."""
    plain, averaged = evaluation.predict_split(model, split, stats, 32, "crops")
    labels = split.labels.cpu()
    return {"top1": metrics.top1(plain, labels), "top1_tta": metrics.top1(averaged, labels)}


class Pictures(CIFAR10):
    """CIFAR-10 as torchvision serves it, one PIL image at a time, from arrays in memory."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]):
        self.data = split.images.cpu().numpy()
        self.targets = split.labels.tolist()
        self.transform = transform
        self.target_transform = None


def plain_steps(
    split: Split, stats: ChannelStats, model: nn.Module, batch_size: int, device: torch.device
) -> Iterator[int]:
    """The loop of PyTorch's tutorial, which trains the model in place without end.

    Images are read sample by sample with two workers, mirrored at random, in float32; Adam at a
    constant rate. Yields the images of each step.
    """
    chain = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*stats)]
    pictures = Pictures(split, transforms.Compose(chain))
    loader = DataLoader(pictures, batch_size, shuffle=True, num_workers=2, drop_last=True)
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while True:
        for x, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), labels.to(device)).backward()
            optimizer.step()
            yield len(labels)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and, of several values, the standard deviation of a sample, in two decimals."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
