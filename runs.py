"""One run: its name, its lock, its files, and what it starts or goes on from."""

import glob
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import checkpoint
import cli
from config import TrainConfig
from data import Splits, load_splits
from engine import RunFiles
from files import locked


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

    def files(self, identity: dict[str, Any]) -> RunFiles:
        """What `engine.fit` writes to."""
        history_path = self.results_dir / "history.csv"
        return RunFiles(self.state_path, history_path, self.resume_command, identity)


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
    while _finished(config, name):
        number += 1
        name = f"{wanted}-{number}"
    if config.resume and not _state_exists(config, name):
        name = wanted  # nothing of this series is unfinished
    if name != wanted:
        print(f"run {wanted} is finished and kept; this one is {name}")
    with (
        locked(config.checkpoint_dir / f"{name}.lock", wait=False) as weights_are_ours,
        locked(config.results_dir / f".{name}.lock", wait=False) as results_are_ours,
    ):
        if not (weights_are_ours and results_are_ours):
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
                raise AlreadyFinished(f"run {name} is finished: {config.results_dir / name}/")
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
            reason = str(stop) or "stopped by Ctrl-C"
            hint = f"{reason}; continue with\n  {shlex.join(resume_command)}"
            raise cli.Stopped(number, hint) from stop
        except OSError as error:
            if isinstance(error, FileNotFoundError) or not _state_exists(config, name):
                raise
            raise OSError(
                f"{error}; the training's state is kept: once this is mended, continue with "
                f"`{shlex.join(resume_command)}`"
            ) from error


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
    for pattern in (f".{own}.pt.*.tmp", f".{own}.resume.pt.*.tmp"):
        for path in config.checkpoint_dir.glob(pattern):
            path.unlink(missing_ok=True)
    for path in (config.results_dir / name).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _check_same(config: TrainConfig, saved: dict[str, Any]) -> None:
    """Refuses to continue a run under settings that would change its result."""
    for key, value in config.binding().items():
        if key != "run_name" and saved.get(key) != value:
            raise ValueError(
                f"--resume with {key} {value}: the run was started with {saved.get(key)}; "
                "repeat its settings, or start another run with --run-name NAME"
            )


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


def main(script: str, argv: list[str] | None, train: Callable[[str], None]) -> int:
    """Runs a training script; `train` is given the command a person typed."""

    def body() -> None:
        try:
            train(cli.command_line(script, argv))
        except AlreadyFinished as done:
            print(done)

    return cli.exit_code(body)
