"""What one NVIDIA GPU is asked in about a quarter of an hour, in the order of `--steps`.

record    airbench94_muon's own script, as written and with its torch.compile, beside `speedrun`
step      where the time of a step of `speedrun` goes, and of a run what is not its steps
speedrun  which changes help it: on validation images, then the chosen one on the test set
modern    the same of this recipe
best      to its end, as the script trains it
finetune  all of each network that `--weights` names: likewise

    python benchmarks/gpu.py --record airbench94_muon.py --weights resnet18=FILE vgg19=FILE
    python benchmarks/gpu.py --steps speedrun --budget-scale 3      all of its seeds
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --tiny --device cpu  a try of all of it

A row is written to `--output`/rows.jsonl as soon as it is there. The same command goes on after a
cut: rows that the file holds, of the same hardware, are kept and not run again. A step has a budget
of seconds, and begins nothing that its longest training so far would carry past it. All settings
get a seed before any gets the next one; the means are over the seeds that all of them have. A
choice is made once, when the trainings are done or their share of the budget is over; it is a row
of its own, stays, and ends the search. `--search-only` leaves it to a later command. Not here: the
hardest images, which today's code cannot choose.

The script of the record is not part of this project: fetch it, and name the file. It gets the
images as files in `--scratch`. Its seconds, as it prints them, hold whitening, training and TTA;
those of our rows are training alone, the rest stands beside them.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import engine
import finetune
import metrics
from benchmarks import ablation, common, gpu_times, throughput
from benchmarks.ablation import Change
from benchmarks.gpu_search import USUAL, Bench, Clock, Rows, improve, keys, search
from config.settings import FineTuneSettings
from data import Splits, make_splits
from pretrained import ARCHS, IMAGENET_STATS
from reports import evaluation
from runs import loading
from runtime.device import now, select_device
from sources.cifar10 import cifar10

BUDGETS = {  # seconds
    "record": 240,
    "step": 40,
    "speedrun": 240,
    "modern": 90,
    "best": 110,
    "finetune": 120,
}
COMPILING = 200  # seconds at most for the record with torch.compile

AVERAGES = {
    USUAL: Change(),
    "EMA over 20 steps": Change(averaging="ema:20"),
    "mean of the last epoch's weights": Change(averaging="mean:1"),
}
SPEEDRUN = {
    **AVERAGES,
    "mean of the last two epochs' weights": Change(averaging="mean:2"),
    "batch 2,000": Change({"batch_size": 2000, "muon_lr": 0.24, "weight_decay": 0.4, "lr": 0.02}),
    "nine epochs": Change({"epochs": 9}),
    "last convolution 384 wide": Change(network={"widths": (64, 64, 256, 256, 256, 384)}),
    "last convolution 512 wide": Change(network={"widths": (64, 64, 256, 256, 256, 512)}),
    "0.3 at 24 pixels": Change({"small_first": "0.3:24"}),
    "0.7 at 24 pixels": Change({"small_first": "0.7:24"}),
    "a tenth at 20 pixels": Change({"small_first": "0.1:20,0.5:24"}),
}
# Other batches: rate and decay by the root, so that the weights' memory is as many images long.
MODERN = {
    **AVERAGES,
    "0.3 at 24 pixels": Change({"small_first": "0.3:24"}),
    "0.7 at 24 pixels": Change({"small_first": "0.7:24"}),
    "batch 256": Change({"batch_size": 256, "lr": 5.7e-3, "weight_decay": 0.35}),
    "batch 1,000": Change({"batch_size": 1000, "lr": 0.0112, "weight_decay": 0.7}),
}
# Epochs at 128 and 160 pixels, for about the same work, and the other stage rate.
FINE_TUNED = {
    "resnet18": (8, 5, 0.8),
    "resnet50": (6, 4, 0.8),
    "vgg19": (5, 3, 0.8),
    "mobilenet_v3_small": (16, 10, 0.8),
}


def take_steps(job: common.Job, averaging: str) -> float:
    """Takes all steps; returns their seconds, with what averages the weights.

    Args:
        job: whose network ends as its last weights or as their average, BatchNorm measured anew.
        averaging: "ema:STEPS", "mean:EPOCHS" (of the weights after each of the last steps), or "".
    """
    device = next(job.model.parameters()).device
    kind, _, length = averaging.partition(":")
    weights = [p.detach() for p in job.model.parameters() if p.requires_grad]
    averages = [value.clone() for value in weights]
    num_steps = job.batches.num_epochs * job.batches.num_steps
    begin = now(device)
    for done, _ in enumerate(job.images, start=1):
        if kind == "ema":
            torch._foreach_lerp_(averages, weights, 1 / int(length))
        elif kind == "mean":
            count = done - num_steps + int(length) * job.batches.num_steps
            if count > 0:
                torch._foreach_lerp_(averages, weights, 1 / count)
    if kind:
        torch._foreach_copy_(weights, averages)
        last = job.batches.epoch(job.batches.num_epochs - 1)
        some = itertools.islice(last, engine.MEASURED)
        engine.measure_statistics(job.model, some, job.precision)
    return now(device) - begin


def measured(
    job: common.Job, splits: Splits, on: str, averaging: str, tta: str, begun_at: float
) -> dict[str, Any]:
    """Trains a job and evaluates it on a split: accuracies, seconds of its parts, operations."""
    device = splits.train.labels.device
    trained_at = now(device)
    seconds = take_steps(job, averaging)
    evaluated_at = now(device)
    split = splits.test if on == "test" else splits.val
    plain, averaged = evaluation.predict_split(
        job.model, split, splits.stats, job.batches.side, tta
    )
    labels = split.labels.cpu()
    return {
        "top1": metrics.top1(plain, labels),
        "top1_tta": metrics.top1(averaged, labels),
        "start_seconds": trained_at - begun_at,
        "seconds": seconds,
        "evaluation_seconds": now(device) - evaluated_at,
        "pflop": common.training_flop(job.model, job.batches) / 1e15,
    }


def train_recipe(bench: Bench, recipe: str, change: Change, seed: int, on: str) -> dict[str, Any]:
    """Trains the nine-layer CNN with a change."""
    gc.collect()  # a job before and its steps hold each other, and the GPU's memory
    settings = bench.settings(f"train_custom.py --recipe {recipe}", seed, **change.settings)
    splits = bench.splits(settings, on)
    begin = now(bench.args.device)
    make_network = partial(ablation.make_network, change=change)
    job = common.Job(settings, splits, make_network=make_network)
    return measured(job, splits, on, change.averaging, "crops", begin)


def train_pretrained(bench: Bench, arch: str, change: Change, seed: int, on: str) -> dict[str, Any]:
    """Fine-tunes all of a network that begins with the weights of a file."""
    gc.collect()  # see above
    command = f"finetune.py --arch {arch} --unfreeze all --no-cache"
    settings = bench.settings(command, seed, **change.settings)
    splits = bench.splits(settings, on)._replace(stats=IMAGENET_STATS)

    def make_network(
        settings: FineTuneSettings, splits: Splits
    ) -> tuple[nn.Module, dict[str, Any]]:
        model, arguments = finetune.make_network(settings, splits)
        loading.start_weights(model, bench.args.weights[arch], arch, splits.classes)
        return model, arguments

    begin = now(bench.args.device)
    job = common.Job(settings, splits, make_network=make_network)
    return measured(job, splits, on, "", "flip", begin)


def record(bench: Bench, clock: Clock) -> None:
    """The record as written, compiled, and `speedrun` before and after the compiled one."""
    train = partial(train_recipe, bench, "speedrun")
    ours = keys([USUAL], "record", "test", bench.args.num_records)
    half = len(ours) // 2
    uncompiled = {"TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1"}
    gpu_times.run_record(bench, "record uncompiled", uncompiled, clock.left(0.35))
    search(bench, clock, train, AVERAGES, ours[:half])
    gpu_times.run_command(bench, clock, "speedrun", "record", "command", 0)
    gpu_times.run_record(bench, "record compiled", {}, min(COMPILING, clock.left(0.85)))
    search(bench, clock, train, AVERAGES, ours[half:])
    gpu_times.run_command(bench, clock, "speedrun", "record", "command", 1)


def step(bench: Bench, clock: Clock) -> None:
    """Parts of a step at both sides, a run's saves and page, the profiler's table."""
    settings = bench.settings("train_custom.py --recipe speedrun", 0)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32

    def parts(side: int) -> dict[str, Any]:
        peak = throughput.matrix_rate(dtype, bench.args.device)
        return gpu_times.parts_of_a_step(bench, settings, side, peak)

    measures = {
        "32 pixels": partial(parts, 32),
        "24 pixels": partial(parts, 24),
        "run": partial(gpu_times.rest_of_a_run, bench),
        "profile": partial(gpu_times.profiled, bench, settings),
    }
    for name, measure in measures.items():
        key = {"step": "step", "kind": "parts", "setting": name}
        if not bench.rows.find(**key) and clock.left() > 0:
            bench.rows.add(key | measure())
            gc.collect()


def speedrun(bench: Bench, clock: Clock) -> None:
    """Sixteen seeds of each setting, the best two together, the best of all on the test set."""
    num_seeds, num_tests = (2, 2) if bench.args.tiny else (16, 10)
    train = partial(train_recipe, bench, "speedrun")
    improve(bench, clock, "speedrun", train, SPEEDRUN, num_seeds, num_tests, is_paired=True)


def modern(bench: Bench, clock: Clock) -> None:
    """Eight seeds of each setting, the best on the test set."""
    num_seeds, num_tests = (2, 2) if bench.args.tiny else (8, 5)
    train = partial(train_recipe, bench, "modern")
    improve(bench, clock, "modern", train, MODERN, num_seeds, num_tests)


def best(bench: Bench, clock: Clock) -> None:
    """Three seeds to the end."""
    for seed in range(2 if bench.args.tiny else 3):
        gpu_times.run_command(bench, clock, "best", "best", USUAL, seed)


def finetune_all(bench: Bench, clock: Clock) -> None:
    """One seed of each setting, the best on the test set, network by network."""
    begin = time.perf_counter()
    archs = list(bench.args.weights)
    for number, arch in enumerate(archs, start=1):
        spent = time.perf_counter() - begin
        own = Clock((clock.seconds - spent) / (len(archs) - number + 1))
        epochs, fewer, rate = FINE_TUNED[arch]
        candidates = {
            "128 pixels": Change({"image_size": 128, "epochs": epochs}),
            "160 pixels": Change({"image_size": 160, "epochs": fewer}),
        }
        other = {"image_size": 128, "epochs": epochs, "stage_lr_scale": rate}
        candidates[f"128 pixels, stage rates {rate}"] = Change(other)
        train = partial(train_pretrained, bench, arch)
        improve(bench, own, f"finetune {arch}", train, candidates, 1, 1)


STEPS = {
    "record": record,
    "step": step,
    "speedrun": speedrun,
    "modern": modern,
    "best": best,
    "finetune": finetune_all,
}


def table(rows: list[dict[str, Any]]) -> str:
    """What a step has found: a line for each setting, over its seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["kind"], row["setting"]), []).append(row)
    lines = []
    for names, group in groups.items():
        line = ", ".join(names)
        if "top1_tta" in group[0]:
            tta = common.mean_and_spread([100 * row["top1_tta"] for row in group])
            seconds = statistics.median(row["seconds"] for row in group)
            line += f": {len(group)} seeds, with TTA {tta} %, {group[0]['pflop']:.4g} PFLOP"
            line += f", {seconds:.2f} s"
            if group[0].get("command_seconds"):
                line += f" ({group[-1]['command_seconds']:.1f} s by the command)"
        elif names[1] == "parts":
            values = {name: value for name, value in group[0].items() if isinstance(value, float)}
            line += ": " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        lines.append(line)
    return "\n".join(lines)


def weights_of(text: str) -> tuple[str, str]:
    """Reads "arch=FILE"."""
    arch, _, path = text.partition("=")
    if arch not in ARCHS or not Path(path).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be ARCH=FILE, of {', '.join(ARCHS)}, and the file must be there"
        )
    return arch, path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = common.RESULTS / "gpu"
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--budget-scale", type=float, default=1.0, help="times the budgets")
    parser.add_argument("--search-only", action="store_true", help="choose and test nothing")
    parser.add_argument("--record", type=Path, metavar="FILE", help="airbench94_muon.py")
    parser.add_argument("--weights", type=weights_of, nargs="+", default=[], metavar="ARCH=FILE")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is kept"
    )
    parser.add_argument("--device", type=select_device, default="auto", help="auto, cpu, cuda")
    parser.add_argument("--output", type=Path, default=folder, help="where rows and logs go")
    parser.add_argument("--scratch", type=Path, default=Path("checkpoints/gpu"))
    parser.add_argument("--tiny", action="store_true", help="few images, epochs, seeds: a try")
    args = parser.parse_args()
    unknown = [name for name in args.steps if name not in STEPS]
    if unknown:
        parser.error(f"--steps {unknown[0]}: choose of {','.join(STEPS)}")
    args.weights = dict(args.weights)
    args.limit = 16 if args.tiny else None
    args.num_records = 2 if args.tiny else 10
    args.precision = "bf16" if args.device.type == "cuda" else "fp32"
    return args


def main() -> int:
    """The command line; returns the exit code."""
    args = parse()
    about = common.measured({}, args.device)
    same = {"hardware": about["environment"]["hardware"], "tiny": args.tiny}
    rows = Rows(args.output / "rows.jsonl", same)
    rows.add({"step": "session", **about})
    arrays = cifar10(args.data_dir)
    splits = make_splits(arrays, val_fraction=0.1, limit=args.limit, seed=0, device=args.device)
    bench = Bench(args, rows, arrays, splits)
    train_recipe(bench, "speedrun", Change(), 0, "val")  # loads kernels, keeps nothing
    gc.collect()
    gc.freeze()  # what is there now stays: collecting is then quick
    code = 0
    for name in STEPS:
        if name not in args.steps:
            continue
        begin = time.perf_counter()
        try:
            STEPS[name](bench, Clock(args.budget_scale * BUDGETS[name]))
        except Exception:  # a mistake in one must not cost the lent minutes of the others
            traceback.print_exc()
            code = 1
        found = [row for row in rows.find() if row["step"].split()[0] == name]
        print(f"\n{name}, {time.perf_counter() - begin:.0f} s\n{table(found)}\n", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
