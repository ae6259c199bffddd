"""One run's files: its name and lock, what it starts from, what is written when it is done."""

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import checkpoint
import metrics
import reports
from compute import predict
from config import TrainConfig
from data import Splits
from downloads import CLASSES
from engine import RunFiles
from files import locked, sha256, write_json
from models import num_parameters


@dataclass(frozen=True)
class Run:
    """A claimed name and where its files lie; `state` is what an interrupted run of it saved."""

    name: str
    checkpoint_path: Path
    state_path: Path
    results_dir: Path
    command: str
    state: dict[str, Any] | None
    resume_command: list[str]

    @property
    def files(self) -> RunFiles:
        """What `engine.fit` writes to."""
        return RunFiles(self.state_path, self.results_dir / "history.csv", self.resume_command)


class AlreadyFinished(Exception):
    """`--resume` names a run that needs nothing more."""


@contextmanager
def claim(config: TrainConfig, default_name: str, command: str) -> Iterator[Run]:
    """Takes a run's name for this process alone, until the block ends.

    A finished run is never overwritten: the next free `name-2`, `name-3` is taken and said.

    Raises:
        ValueError: another process holds the name; the run is unfinished and `--resume` is not
            given, or given and there is nothing to resume or other settings were saved.
        AlreadyFinished: the run to resume has finished.
    """
    for option, folder in (("checkpoint", config.checkpoint_dir), ("results", config.results_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise ValueError(
                f"--{option}-dir {folder}: cannot be made ({reason}); name another"
            ) from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--{option}-dir {folder}: cannot be written; name another")
    wanted = config.run_name or default_name
    name, number = wanted, 1
    while not config.resume and _finished(config, name):
        number += 1
        name = f"{wanted}-{number}"
    if name != wanted:
        print(f"run {wanted} is finished and kept; this one is {name}")
    with locked(config.checkpoint_dir / f"{name}.lock", wait=False) as obtained:
        if not obtained:
            raise ValueError(f"run {name} is being trained by another process; give --run-name")
        state_path = config.checkpoint_dir / f"{name}.resume.pt"
        resume_command = shlex.split(command)
        if not config.run_name and name != default_name:
            resume_command += ["--run-name", name]
        if not config.resume:
            resume_command += ["--resume"]
        exists = state_path.exists() or checkpoint.previous(state_path).exists()
        state = None
        if config.resume:
            if _finished(config, name):
                raise AlreadyFinished(f"run {name} is finished: {_checkpoint_path(config, name)}")
            state, problems = checkpoint.load_state(state_path)
            for problem in problems:
                print(f"warning: {problem}; going on from the state before it", file=sys.stderr)
            if state is None:
                raise ValueError(f"--resume: run {name} has no saved state; start it without")
            _check_same(config, state["config"])
        elif exists:
            raise ValueError(
                f"run {name} is unfinished: continue with `{shlex.join(resume_command)}`, "
                "or start another with --run-name NAME"
            )
        yield Run(
            name,
            _checkpoint_path(config, name),
            state_path,
            config.results_dir / name,
            command,
            state,
            resume_command,
        )


def _checkpoint_path(config: TrainConfig, name: str) -> Path:
    return config.checkpoint_dir / f"{name}.pt"


def _finished(config: TrainConfig, name: str) -> bool:
    """A run is finished once its test result and checkpoint stand and its state is gone."""
    if (config.checkpoint_dir / f"{name}.resume.pt").exists():
        return False
    return (
        _checkpoint_path(config, name).exists()
        or (config.results_dir / name / "test.json").exists()
    )


def _check_same(config: TrainConfig, saved: dict[str, Any]) -> None:
    """Refuses to continue a run under settings that would change its result."""
    for key, value in config.binding().items():
        if key != "run_name" and saved.get(key) != value:
            raise ValueError(
                f"--resume with {key} {value}: the run was started with {saved.get(key)}; "
                "repeat its settings, or start another run with --run-name NAME"
            )


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
    extras = [n for n in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(n)]
    return ", ".join([f"{os.cpu_count()} cores {name.strip()}", *extras[-1:]])


def describe(
    run: Run,
    config: TrainConfig,
    arch: str,
    surgery: dict[str, Any],
    model: nn.Module,
    splits: Splits,
    device: torch.device,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Writes config.json at the start of a run and returns its content."""
    content = {
        "name": run.name,
        "arch": arch,
        "surgery": surgery,
        "command": run.command,
        "config": config.plain() | extra,
        "environment": environment(device),
        "splits": {
            "train": len(splits.train.labels),
            "val": len(splits.val.labels) if splits.val else 0,
            "test": len(splits.test.labels),
        },
        "parameters": num_parameters(model),
        "date": date.today().isoformat(),
    }
    write_json(run.results_dir / "config.json", content)
    return content


def finish(
    run: Run,
    described: dict[str, Any],
    model: nn.Module,
    splits: Splits,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Reads the test set once, then writes the checkpoint, the results and the pictures.

    Returns:
        The content of test.json.
    """
    begin = {"train_seconds": history[-1]["seconds"]}
    described = described | begin
    write_json(run.results_dir / "config.json", described)
    temperature = None
    if splits.val:
        logits = predict(model, splits.val.images, splits.mean, splits.std)
        temperature = metrics.fit_temperature(logits, splits.val.labels.cpu())
    logits, logits_tta = (
        predict(model, splits.test.images, splits.mean, splits.std, tta=tta)
        for tta in ("none", "flip")
    )
    labels = splits.test.labels.cpu()
    last = {k: v for k, v in history[-1].items() if k not in ("images_per_second", "seconds")}
    checkpoint.save(
        run.checkpoint_path,
        {
            **{key: described[key] for key in ("name", "arch", "surgery", "config", "environment")},
            "classes": list(CLASSES),
            "mean": splits.mean,
            "std": splits.std,
            "image_size": 32,
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
            "tta": "flip",
            "checkpoint_sha256": sha256(run.checkpoint_path),
            "device": described["environment"]["hardware"],
            "date": described["date"],
        },
    )
    reports.write_results_readme(run.results_dir.parent)
    checkpoint.remove_state(run.state_path)
    return report
