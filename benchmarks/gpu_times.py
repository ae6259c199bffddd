"""What `gpu.py` measures in seconds: the record, a whole command, the parts of a step."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import engine
import train_custom
from benchmarks import common
from benchmarks.gpu_search import Bench, Clock
from config.settings import Settings
from display.live import Live
from runs.training import Training
from runtime.device import now

ROOT = Path(__file__).parent.parent
SHORTEST = 20  # seconds in which the record's script could train at all
RECORD_PFLOP = 0.283  # 8 epochs of 50,000 images, counted as in `common.flop`


def evaluations(text: str) -> list[tuple[float, float]]:
    """Accuracy with TTA and seconds of each training that the record's script has printed."""
    found = []
    for line in text.splitlines():
        numbers = re.findall(r"\d+\.\d+", line)
        if re.search(r"\beval\b", line) and len(numbers) >= 2:
            found.append((float(numbers[-2]), float(numbers[-1])))
    return found[1:]  # the first one warms up, on labels drawn at random


def run_record(bench: Bench, setting: str, environment: dict[str, str], limit: float) -> None:
    """Runs the record's script until it has printed its trainings, or the limit is over."""
    key = {"step": "record", "kind": "test", "setting": setting}
    if bench.args.record is None or bench.rows.find(step="record", setting=setting):
        return
    if limit < SHORTEST:
        print(f"the budget is over: {setting} was not begun")
        return
    folder = bench.args.scratch / "record"
    store_images(bench, folder / "cifar10")
    log = bench.args.output / f"{setting.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", str(bench.args.record.resolve())]
    written = 0
    begin = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # what it starts to compile ends with it
        )
        try:
            is_running = True
            while is_running and written < bench.args.num_records:
                time.sleep(0.1)
                passed = time.perf_counter() - begin
                is_running = process.poll() is None and passed < limit
                found = evaluations(log.read_text(encoding="utf-8", errors="replace"))
                for top1_tta, seconds in found[written : bench.args.num_records]:
                    row = {"seed": written, "top1_tta": top1_tta, "seconds": seconds}
                    row |= {"command_seconds": passed, "pflop": RECORD_PFLOP}
                    bench.rows.add(key | row)
                    written += 1
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if written < bench.args.num_records:
        seconds = time.perf_counter() - begin
        print(f"{setting}: {written} trainings in {seconds:.0f} s; see {log}")
        bench.rows.add(key | {"kind": "ended early", "seconds": seconds})


def store_images(bench: Bench, folder: Path) -> None:
    """Writes the images as the record's script keeps them, or it would fetch them."""
    for split in ("train", "test"):
        path = folder / f"{split}.pt"
        images = torch.from_numpy(getattr(bench.arrays, f"{split}_images"))
        labels = torch.from_numpy(getattr(bench.arrays, f"{split}_labels")).long()
        folder.mkdir(parents=True, exist_ok=True)
        content = {"images": images, "labels": labels, "classes": list(bench.arrays.classes)}
        torch.save(content, path)


def run_command(
    bench: Bench, clock: Clock, recipe: str, step: str, setting: str, seed: int
) -> None:
    """Trains as a user does, in a process of its own, which stops where the budget is over.

    Its state is then kept, and the next command goes on from there.
    """
    key = {"step": step, "kind": "test", "setting": setting, "seed": seed}
    if bench.rows.find(**key) or not clock.fits():
        return
    results = bench.args.output.resolve() / "runs" / f"{recipe}-seed{seed}"
    command = [sys.executable, "train_custom.py", *flags_of(bench, recipe, seed), "--resume"]
    seconds = None  # of a run that a cut left finished, but without its row
    if not (results / "test.json").exists():
        begin = time.perf_counter()
        with clock.timing(), subprocess.Popen(command, cwd=ROOT) as process:
            try:
                code = process.wait(max(clock.left(), 1))
            except subprocess.TimeoutExpired:
                process.terminate()
                code = process.wait()
        seconds = time.perf_counter() - begin
        if code:
            print(f"{results.name} ended with {code}; its state is kept")
            return
    settings = bench.settings(f"train_custom.py --recipe {recipe}", seed)
    job = common.Job(settings, bench.splits(settings, "test"))
    pflop = common.training_flop(job.model, job.batches) / 1e15
    found = figures_of(results) | {"command_seconds": seconds, "pflop": pflop}
    bench.rows.add(key | found)


def flags_of(bench: Bench, recipe: str, seed: int) -> list[str]:
    """The flags of `train_custom.py`, with folders of this benchmark."""
    args = bench.args
    flags = ["--recipe", recipe, "--seed", str(seed), "--run-name", f"{recipe}-seed{seed}"]
    flags += ["--data-dir", str(args.data_dir.resolve()), "--device", str(args.device)]
    flags += ["--checkpoint-dir", str(args.scratch.resolve() / "checkpoints")]
    flags += ["--results-dir", str(args.output.resolve() / "runs")]
    if args.tiny:
        flags += ["--limit", str(args.limit), "--epochs", "2", "--batch-size", "8"]
    return flags


def figures_of(results: Path) -> dict[str, float]:
    """What a run has left: accuracies, and the seconds of its training."""
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    test = json.loads((results / "test.json").read_text(encoding="utf-8"))
    return {
        "top1": test["top1"],
        "top1_tta": test["top1_tta"],
        "seconds": config["train_seconds"],
    }


def seconds_of(
    step: Callable[[Tensor, Tensor, Tensor], Any], x: Tensor, labels: Tensor, as_graph: bool
) -> float:
    """Seconds of a step, mean of many, as a CUDA graph or as Python launches it."""
    device = labels.device
    repeats = 3 if device.type == "cpu" else 50
    rate = torch.zeros((), device=device)
    if as_graph and device.type == "cuda":
        graphs = engine.StepGraphs(step, device)

        def take() -> None:
            graphs(x, labels, 0.0)

    else:

        def take() -> None:
            step(x, labels, rate)

    for _ in range(3):
        take()
    begin = now(device)
    for _ in range(repeats):
        take()
    return (now(device) - begin) / repeats


def parts_of_a_step(bench: Bench, settings: Settings, side: int, peak: float) -> dict[str, Any]:
    """Seconds of the parts of a step on images of a side; peak is in FLOP/s."""
    device = bench.args.device
    splits = bench.splits(settings, "val")
    resizing = f"0.999:{side}" if side < 32 else ""
    settings = replace(settings, small_first=resizing, epochs=10_000)

    def new_job() -> common.Job:
        return common.Job(settings, splits)

    job = new_job()
    list(itertools.islice(job.batches.epoch(0), 3))
    begin = now(device)
    num_steps = sum(1 for _ in job.batches.epoch(1))
    making = (now(device) - begin) / num_steps
    x, labels = next(job.batches.epoch(0))

    def whole(job: common.Job) -> Callable[[Tensor, Tensor, Tensor], Any]:
        options = {"precision": job.precision, "label_smoothing": settings.label_smoothing}
        return partial(engine.train_step, job.model.train(), job.optimizer, **options)

    def gradients(x: Tensor, labels: Tensor, lr: Tensor) -> None:
        F.cross_entropy(engine.forward(job.model, x, job.precision), labels).backward()
        job.model.zero_grad()

    def update(x: Tensor, labels: Tensor, lr: Tensor) -> None:
        job.optimizer.step()

    found = {
        "making_batches": making,
        "step_as_graph": seconds_of(whole(new_job()), x, labels, True),
        "step_as_written": seconds_of(whole(new_job()), x, labels, False),
        "forward_and_backward": seconds_of(gradients, x, labels, True),
    }
    job = new_job()
    F.cross_entropy(engine.forward(job.model.train(), x, job.precision), labels).backward()
    job.optimizer.found_inf = torch.zeros((), device=device)
    found["optimizer"] = seconds_of(update, x, labels, True)
    job = new_job()
    common.throughput(job.images, 3, device)
    found["step_of_training"] = len(labels) / common.throughput(job.images, num_steps, device)
    needed = found["making_batches"] + found["step_as_graph"]
    done = len(labels) * common.flop(job.model, side)
    return found | {
        "gaps": found["step_of_training"] - needed,
        "launches_spared": found["step_as_written"] - found["step_as_graph"],
        "utilisation_of_graph": done / found["step_as_graph"] / peak,
        "utilisation_of_training": done / found["step_of_training"] / peak,
        "peak_flop_per_second": peak,
    }


def profiled(bench: Bench, settings: Settings) -> dict[str, Any]:
    """Writes what the profiler says of ten steps; gives the share of the time the GPU is busy."""
    device = bench.args.device
    job = common.Job(settings, bench.splits(settings, "val"))
    common.throughput(job.images, 3, device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        by = "self_device_time_total"
    with torch.profiler.profile(activities=kinds) as profile:
        begin = now(device)
        num_images = sum(itertools.islice(job.images, 10))
        seconds = now(device) - begin
    events = profile.key_averages()
    table = events.table(sort_by=by, row_limit=40, max_name_column_width=90)
    (bench.args.output / "profile.txt").write_text(table, encoding="utf-8")
    # What ran there itself; the operations that launched it carry the same time again.
    there = [event for event in events if event.device_type.name == "CUDA"]
    busy = sum(event.self_device_time_total for event in there) / 1e6
    return {"images": num_images, "seconds": seconds, "device_busy": busy / seconds}


def rest_of_a_run(bench: Bench) -> dict[str, Any]:
    """Seconds of a run of `speedrun` that are saves, page and validation, and of its training."""
    spent = {"saves": 0.0, "page": 0.0, "validation": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begin

        return wrapper

    calls = [(Training, "_save", "saves"), (engine, "evaluate", "validation")]
    calls += [(Live, name, "page") for name in ("note", "refresh", "write")]
    flags = flags_of(bench, "speedrun", 99)
    begin = time.perf_counter()
    with ExitStack() as stack:
        for owner, name, what in calls:
            wrapper = timed(what, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        code = train_custom.main([*flags, "--resume"])
    seconds = time.perf_counter() - begin
    if code:
        raise RuntimeError(f"the run ended with {code}")
    found = figures_of(bench.args.output / "runs" / "speedrun-seed99")
    return {**spent, "training": found["seconds"], "run": seconds}
