"""What a run writes down of itself: settings and surroundings first, results at the end."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import checkpoint
import cli
import metrics
import reports
from compute import predict
from config import TrainConfig
from data import Splits
from downloads import CLASSES
from files import sha256, write_json
from history import TIMINGS
from models import num_parameters
from runs import Run

CPU = torch.device("cpu")
# What a checkpoint repeats of config.json.
DESCRIBED = (
    *("name", "arch", "surgery", "command", "config", "start_weights", "precision"),
    *("environment", "splits", "parameters", "date", "train_seconds"),
)


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on besides settings and code."""
    environment = described["environment"]
    return {
        **{key: described[key] for key in ("surgery", "start_weights")},
        **{key: environment[key] for key in ("device", "hardware", "torch", "threads")},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code: versions and hardware."""
    return {
        "device": device.type,
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def measured(figures: dict[str, Any], device: torch.device = CPU) -> dict[str, Any]:
    """A benchmark's figures after the command, day and machine they come from."""
    return {
        "command": cli.command_line(os.path.relpath(sys.argv[0]), None),
        "date": date.today().isoformat(),
        "environment": environment(device),
        **figures,
    }


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not give its name
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
    extras = [n for n in ("avx512_bf16", "amx_bf16") if capabilities.get(n)]
    return ", ".join([f"{os.cpu_count()} cores {name.strip()}", *extras[-1:]])


def describe(
    run: Run,
    config: TrainConfig,
    *,
    arch: str,
    surgery: dict[str, Any],
    model: nn.Module,
    splits: Splits,
    device: torch.device,
    precision: str,
    weights: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Writes config.json at the start of a run, says what begins, and returns the content."""
    content = {
        "name": run.name,
        "arch": arch,
        "surgery": surgery,
        "command": run.command,
        "config": config.plain(),
        "start_weights": weights,
        "precision": precision,
        "environment": environment(device),
        "splits": {
            "train": len(splits.train.labels),
            "val": len(splits.val.labels) if splits.val else 0,
            "test": len(splits.test.labels),
        },
        "parameters": num_parameters(model),
        "date": date.today().isoformat(),
    }
    path = run.results_dir / "config.json"
    if run.state:
        for key, saved in run.state["identity"].items():
            if (here := identity(content)[key]) != saved:
                message = f"the run was started with {key} {saved}, not {here}"
                if key in ("surgery", "start_weights", "device"):
                    raise ValueError(f"--resume: {message}; restore it or start another run")
                print(f"warning: {message}; the last bits may differ", file=sys.stderr)
        with suppress(OSError, ValueError, KeyError):  # the command and day of the beginning
            content |= {key: json.loads(path.read_text())[key] for key in ("command", "date")}
    write_json(path, content)
    sizes, counts = content["splits"], content["parameters"]
    print(
        f"{run.name}: {arch}, {counts['total']:,} parameters, {counts['trainable']:,} of them "
        f"train, {config.epochs} epochs\n{sizes['train']:,} training, {sizes['val']:,} validation, "
        f"{sizes['test']:,} test images on {content['environment']['hardware']}",
        flush=True,
    )
    return content


def finish(
    run: Run,
    described: dict[str, Any],
    model: nn.Module,
    splits: Splits,
    history: list[dict[str, Any]],
    tta: str,
) -> None:
    """Reads the test set once; writes and prints where checkpoint, numbers and pictures are.

    Args:
        run: whose state is removed at the end.
        described: what `describe` returned.
        model: trained.
        splits: with which statistics.
        history: what `engine.fit` returned.
        tta: test-time augmentation of the second accuracy, see `compute.views`.
    """
    described = described | {"train_seconds": history[-1]["seconds"]}
    write_json(run.results_dir / "config.json", described)
    temperature = None
    if splits.val:
        logits, _ = predict(model, splits.val.images, splits.mean, splits.std)
        temperature = metrics.fit_temperature(logits, splits.val.labels.cpu())
    begin = time.perf_counter()
    logits, logits_tta = predict(model, splits.test.images, splits.mean, splits.std, tta=tta)
    seconds = round(time.perf_counter() - begin, 1)
    labels = splits.test.labels.cpu()
    last = {k: v for k, v in history[-1].items() if k not in TIMINGS}
    checkpoint.save(
        run.checkpoint_path,
        {
            **{key: described[key] for key in DESCRIBED},
            "classes": list(CLASSES),
            "mean": splits.mean,
            "std": splits.std,
            "image_size": described["surgery"].get("image_size", 32),
            "metrics": last
            | {
                "temperature": temperature,
                "test_top1": metrics.top1(logits, labels),
                "test_top1_tta": metrics.top1(logits_tta, labels),
            },
            "state_dict": {key: value.cpu() for key, value in model.state_dict().items()},
        },
    )
    report = reports.write_test_report(
        run.results_dir,
        logits=logits,
        labels=labels,
        logits_tta=logits_tta,
        temperature=temperature,
        images=splits.test.images.cpu(),
        classes=CLASSES,
        name=run.name,
        extra={
            "tta": tta,
            "checkpoint_sha256": sha256(run.checkpoint_path),
            "device": described["environment"]["hardware"],
            "seconds": seconds,
            "date": described["date"],
        },
    )
    reports.write_results_readme(run.results_dir.parent)
    checkpoint.remove_state(run.state_path)
    pictures = [str(run.checkpoint_path), "--predict", "photo.jpg"]
    print(
        f"test accuracy {100 * report['top1']:.2f} %, averaged over views ({tta}) "
        f"{100 * report['top1_tta']:.2f} % ({report['n']:,} images, read once)\n"
        f"weights  {run.checkpoint_path}\nresults  {run.results_dir}/\n"
        f"next     {cli.command_line('evaluate.py', pictures)}"
    )


def validator(
    splits: Splits, logits: Callable[[], Tensor]
) -> Callable[[], tuple[float, float]] | None:
    """Makes what `engine.fit` calls after each epoch, or None where nothing was split off."""
    if splits.val is None:
        return None
    labels = splits.val.labels.cpu()

    def validate() -> tuple[float, float]:
        outputs = logits()
        return metrics.cross_entropy(outputs, labels), metrics.top1(outputs, labels)

    return validate
