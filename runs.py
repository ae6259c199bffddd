"""One run's files: its name and lock, what it starts from, what is written when it is done."""

import glob
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from data import Splits, load_splits
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

    def files(self, described: dict[str, Any]) -> RunFiles:
        """What `engine.fit` writes to."""
        history_path = self.results_dir / "history.csv"
        return RunFiles(self.state_path, history_path, self.resume_command, _identity(described))


# What a checkpoint repeats of config.json.
DESCRIBED = ("name", "arch", "surgery", "config", "start_weights", "precision", "environment")


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
    # A finished run is passed over; one to resume too, if a later one of its series is not.
    while _finished(config, name) and (
        not config.resume or _state_exists(config, f"{wanted}-{number + 1}")
    ):
        number += 1
        name = f"{wanted}-{number}"
    if name != wanted:
        print(f"run {wanted} is finished and kept; this one is {name}")
    with locked(config.checkpoint_dir / f"{name}.lock", wait=False) as obtained:
        if not obtained:
            raise ValueError(f"run {name} is being trained by another process; give --run-name")
        if not config.resume and _finished(config, name):
            raise ValueError(f"run {name} has finished this moment; repeat the command")
        _sweep(config, name)
        state_path = _state_path(config, name)
        resume_command = shlex.split(command)
        if not config.resume:
            resume_command += ["--resume"]
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
        elif _state_exists(config, name):
            raise ValueError(
                f"run {name} is unfinished: continue with `{shlex.join(resume_command)}`, "
                "or start another with --run-name NAME"
            )
        try:
            yield Run(
                name,
                _checkpoint_path(config, name),
                state_path,
                config.results_dir / name,
                command,
                state,
                resume_command,
            )
        except (KeyboardInterrupt, cli.Stopped) as stop:
            # `engine.fit` has said how to go on; what comes before and after it has not.
            if "--resume" in str(stop) or not _state_exists(config, name):
                raise
            number = getattr(stop, "number", signal.SIGINT)
            hint = f"{stop or 'stopped'}; continue with\n  {shlex.join(resume_command)}"
            raise cli.Stopped(number, hint) from stop


def _checkpoint_path(config: TrainConfig, name: str) -> Path:
    return config.checkpoint_dir / f"{name}.pt"


def _state_path(config: TrainConfig, name: str) -> Path:
    return config.checkpoint_dir / f"{name}.resume.pt"


def _state_exists(config: TrainConfig, name: str) -> bool:
    path = _state_path(config, name)
    return path.exists() or checkpoint.previous(path).exists()


def _finished(config: TrainConfig, name: str) -> bool:
    """A run is finished once its checkpoint or test result stands and its state is gone."""
    results = _checkpoint_path(config, name), config.results_dir / name / "test.json"
    return not _state_exists(config, name) and any(path.exists() for path in results)


def _sweep(config: TrainConfig, name: str) -> None:
    """Removes what a kill in the middle of a write has left of this run."""
    own = glob.escape(name)
    for pattern in (f".{own}.pt.*.tmp", f".{own}.resume.pt.*.tmp", f"{own}.resume.pt.*.tmp"):
        for path in config.checkpoint_dir.glob(pattern):
            path.unlink(missing_ok=True)
    for path in (config.results_dir / name).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _identity(described: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on besides settings and code."""
    environment = described["environment"]
    return {
        "start_weights": described["start_weights"],
        **{key: environment[key] for key in ("device", "hardware", "torch", "threads")},
    }


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
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
    extras = [n for n in ("avx512_bf16", "amx_bf16") if capabilities.get(n)]
    return ", ".join([f"{os.cpu_count()} cores {name.strip()}", *extras[-1:]])


def load(config: TrainConfig, device: torch.device) -> Splits:
    """Loads the splits a run asks for.

    Raises:
        ValueError: the batch is larger than the training split.
    """
    splits = load_splits(
        config.data_dir,
        val_fraction=config.val_fraction,
        limit=config.limit,
        seed=config.seed,
        device=device,
    )
    if config.batch_size > (size := len(splits.train.labels)):
        raise ValueError(
            f"--batch-size {config.batch_size}: there are {size} training images; "
            "take a smaller batch"
        )
    return splits


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
            if (here := _identity(content)[key]) != saved:
                message = f"the run was started with {key} {saved}, not {here}"
                if key in ("start_weights", "device"):
                    raise ValueError(f"--resume: {message}; restore it or start another run")
                print(f"warning: {message}; the last bits may differ", file=sys.stderr)
        with suppress(OSError, ValueError):  # the command and day of the beginning
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
) -> None:
    """Reads the test set once; writes and prints where checkpoint, numbers and pictures are."""
    described = described | {"train_seconds": history[-1]["seconds"]}
    write_json(run.results_dir / "config.json", described)
    temperature = None
    if splits.val:
        logits, _ = predict(model, splits.val.images, splits.mean, splits.std)
        temperature = metrics.fit_temperature(logits, splits.val.labels.cpu())
    begin = time.perf_counter()
    logits, logits_tta = predict(model, splits.test.images, splits.mean, splits.std, tta="flip")
    seconds = round(time.perf_counter() - begin, 1)
    labels = splits.test.labels.cpu()
    last = {k: v for k, v in history[-1].items() if k not in ("images_per_second", "seconds")}
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
            "tta": "flip",
            "checkpoint_sha256": sha256(run.checkpoint_path),
            "device": described["environment"]["hardware"],
            "seconds": seconds,
            "date": described["date"],
        },
    )
    reports.write_results_readme(run.results_dir.parent)
    checkpoint.remove_state(run.state_path)
    print(
        f"test accuracy {100 * report['top1']:.2f} %, with its mirror image "
        f"{100 * report['top1_tta']:.2f} % ({report['n']:,} images, read once)\n"
        f"weights  {run.checkpoint_path}\nresults  {run.results_dir}/\n"
        f"next     python evaluate.py {run.checkpoint_path} --tta crops"
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


def main(script: str, argv: list[str] | None, train: Callable[[str], None]) -> int:
    """Runs a training script; `train` is given the command a person typed."""

    def body() -> None:
        try:
            train(cli.command_line(script, argv))
        except AlreadyFinished as done:
            print(done)

    return cli.exit_code(body)
