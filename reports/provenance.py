"""Where a run's numbers come from: settings, versions, hardware, revision of the code."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import Splits
from runtime import launch
from runtime.amx import cpu_features

CPU = torch.device("cpu")
# What a checkpoint repeats of config.json.
REPEATED = (
    "name",
    "arch",
    "surgery",
    "image_size",
    "command",
    "config",
    "changed",
    "start_weights",
    "precision",
    "environment",
    "revision",
    "splits",
    "data",
    "parameters",
    "date",
    "train_seconds",
)
# What a result depends on besides settings and code; the environment's keys are among them.
IDENTITY = ("surgery", "start_weights", "device", "hardware", "torch", "threads", "processes")


def describe(
    *,
    name: str,
    command: str,
    config: dict[str, Any],
    changed: dict[str, Any],
    arch: str,
    arguments: dict[str, Any],
    image_size: int,
    model: nn.Module,
    splits: Splits,
    data: dict[str, Any],
    start_weights: dict[str, str],
    precision: str,
) -> dict[str, Any]:
    """What config.json says of a run.

    Args:
        name: of the run.
        command: that starts it.
        config: its settings.
        changed: what differs in them from the defaults.
        arch: "custom_cnn" or a pretrained network's name.
        arguments: how `models.create_model` built the network.
        image_size: side of the network's input, pixels.
        model: the network, frozen where it is to be.
        splits: what it learns from.
        data: where the data came from.
        start_weights: where the weights came from.
        precision: "fp32" or "bf16".
    """
    sizes = {"train": len(splits.train.labels), "val": 0, "test": len(splits.test.labels)}
    if splits.val:
        sizes["val"] = len(splits.val.labels)
    return {
        "name": name,
        "arch": arch,
        "surgery": arguments,  # the name that the format gives them
        "image_size": image_size,
        "start_weights": start_weights,
        "data": data,
        "command": command,
        "config": config,
        "changed": changed,
        "precision": precision,
        "environment": environment(splits.train.labels.device),
        "revision": revision(),
        "splits": sizes,
        "parameters": num_parameters(model),
        "date": date.today().isoformat(),
        "classes": list(splits.classes),
        "mean": list(splits.stats.mean),
        "std": list(splits.stats.std),
    }


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on besides settings and code, from what `describe` returned."""
    everything = described | described["environment"]
    return {key: everything[key] for key in IDENTITY}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "device": device.type,
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),  # importing it takes seconds
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": launch.WORLD_SIZE,
        "machines": launch.NUM_MACHINES,
    }


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(": ", 1)[1]
                break
    count = _num_cores()
    text = f"{count} {'core' if count == 1 else 'cores'} {name.strip()}"
    features = cpu_features()
    if features.get("amx_bf16"):
        return f"{text}, amx_bf16"
    if features.get("avx512_bf16"):
        return f"{text}, avx512_bf16"
    return text


def _num_cores() -> int | None:
    """Cores that this process may use, which a job system or `taskset` may have made fewer."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def revision() -> str | None:
    """The commit of the code that runs, with "-dirty" where it was changed; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def num_parameters(model: nn.Module) -> dict[str, int]:
    """Counts parameters: all of them, and those that train."""
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
