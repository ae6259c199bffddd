"""What a run writes down of itself at its start: settings, surroundings, revision of the code."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.recipes import changed
from config.settings import Settings
from data import Splits
from errors import UnusableInput
from runs.run import Run
from runtime import processes
from runtime.amx import cpu_features
from storage.files import read_json, write_json

CPU = torch.device("cpu")
# What a checkpoint repeats of config.json.
REPEATED = (
    *("name", "arch", "surgery", "image_size", "command", "config", "changed", "start_weights"),
    *("precision", "environment", "revision", "splits", "data", "parameters", "date"),
    "train_seconds",
)


def identity(described: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on besides settings and code."""
    keys = ("surgery", "start_weights", "device", "hardware", "torch", "threads", "processes")
    everything = described | described["environment"]
    return {key: everything[key] for key in keys}


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code: versions and hardware."""
    return {
        "device": device.type,
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),  # importing it takes seconds
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": processes.SIZE,
        "machines": processes.MACHINES,
    }


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # not Linux, or a processor that gives no name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    extras = [n for n in ("avx512_bf16", "amx_bf16") if cpu_features().get(n)]
    return ", ".join([f"{os.cpu_count()} cores {name.strip()}", *extras[-1:]])


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


@processes.agreed()
def describe(
    run: Run, settings: Settings, model: nn.Module, splits: Splits, precision: str, **more: Any
) -> dict[str, Any]:
    """Writes config.json at the start of a run, says what begins, and returns the content.

    Args:
        run: the claimed run; if it goes on it keeps the command and day of its beginning.
        settings: of the run.
        model: the network, frozen where it is to be.
        splits: what it learns from.
        precision: "fp32" or "bf16".
        more: `arch`, `surgery` (how the network was built), `image_size` (of its input, pixels),
            `start_weights` and `data` (where they came from).

    Raises:
        UnusableInput: the run was started with another network, weights or kind of device.
    """
    device = splits.train.labels.device
    held = {"train": splits.train, "val": splits.val, "test": splits.test}
    content = {
        "name": run.name,
        **more,
        "command": run.command,
        "config": settings.plain(),
        "changed": changed(settings),
        "precision": precision,
        "environment": environment(device),
        "revision": revision(),
        "splits": {name: len(split.labels) if split else 0 for name, split in held.items()},
        "parameters": num_parameters(model),
        "date": date.today().isoformat(),
    }
    if processes.RANK:
        return content
    path = run.results_dir / "config.json"
    if run.state:
        _compare(run.state["identity"], identity(content))
        before = read_json(path)
        content |= {key: before[key] for key in ("command", "date") if key in before}
    write_json(path, content)
    _announce(run, content)
    return content


def _announce(run: Run, content: dict[str, Any]) -> None:
    sizes, counts = content["splits"], content["parameters"]
    print(
        f"{run.name}: {content['arch']}, {counts['total']:,} parameters, {counts['trainable']:,} "
        f"of them train, {content['config']['epochs']} epochs\n{sizes['train']:,} training, "
        f"{sizes['val']:,} validation, {sizes['test']:,} test images\n"
        f"on {content['environment']['hardware']}\n"
        f"live page {run.results_dir / 'index.html'}",
        flush=True,
    )


def _compare(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses to go on with another network; warns of other hardware."""
    for key, before in saved.items():
        if here[key] != before:
            message = f"the run was started with {key} {before}, not {here[key]}"
            if key in ("surgery", "start_weights", "device"):
                raise UnusableInput(f"--resume: {message}; restore it or start another run")
            print(f"warning: {message}; the last bits may differ", file=sys.stderr)
