"""One run: its name, its lock, its files, and what it starts or goes on from."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.settings import WITHOUT_EFFECT, Settings, flag, typed
from errors import AlreadyFinished, Stopped, UnusableInput, printable
from storage.files import holder, locked, previous, read_json


@dataclass(frozen=True)
class Run:
    """A claimed name and where its files lie; `state` is what an interrupted run of it saved."""

    name: str
    checkpoint_path: Path
    state_path: Path
    results_dir: Path
    command: str
    state: dict[str, Any] | None


@contextmanager
def claim(settings: Settings, default_name: str, command: str) -> Iterator[Run]:
    """Takes a run's name for this process, and those that train with it, until the block ends.

    A finished run is never overwritten: the next free `name-2`, `name-3` is taken and said. With
    `--resume` an unfinished run goes on, and one that has not begun begins, so that one command
    serves both times. Whatever ends the block early, the user reads here how to go on.

    Raises:
        UnusableInput: another process holds the name; or the run is unfinished and `--resume` is
            not given, or was started with other settings.
        AlreadyFinished: the run to resume has finished.
    """
    from runtime import processes  # and torch, which --help need not wait for

    with ExitStack() as stack:
        run = None
        with processes.agreed():
            if not processes.RANK:
                run = stack.enter_context(_claimed(settings, default_name, command))
        run = processes.from_first(run)
        stack.enter_context(_says_how_to_go_on(run))
        stack.enter_context(processes.losses_told())
        yield run


@contextmanager
def _claimed(settings: Settings, default_name: str, command: str) -> Iterator[Run]:
    for option in ("checkpoint_dir", "results_dir"):
        _make_folder(flag(option), getattr(settings, option))
    name = _free_name(settings, settings.run_name or default_name)
    with (
        _own(settings.checkpoint_dir / f"{name}.lock", name),
        _own(settings.results_dir / f".{name}.lock", name),
    ):
        if not settings.resume and _finished(settings, name):
            raise UnusableInput(f"run {name} has finished this moment; repeat the command")
        _sweep(settings, name)
        state_path = _state_path(settings, name)
        results_dir = settings.results_dir / name
        state = None
        if settings.resume:
            if _finished(settings, name):
                _check_same(
                    settings, read_json(results_dir / "config.json").get("config", {}), name
                )
                raise AlreadyFinished(f"run {name} is finished: {results_dir}/")
            from storage import checkpoint

            state, problems = checkpoint.load_state(state_path)
            for problem in problems:
                print(f"warning: {problem}; going on from the state before it", file=sys.stderr)
            if state is None:
                print(f"run {name} has no saved state: it begins")
            else:
                _check_same(settings, state["config"], name)
        elif _exists(_state_path(settings, name)):
            go_on = resume_command(results_dir, command)
            raise UnusableInput(
                f"run {name} is unfinished: continue with `{go_on}`, or start another with "
                "--run-name NAME"
            )
        yield Run(name, _checkpoint_path(settings, name), state_path, results_dir, command, state)


@contextmanager
def _says_how_to_go_on(run: Run) -> Iterator[None]:
    """Adds to what ends a run early what was kept of it and the command that continues."""
    try:
        yield
    except (KeyboardInterrupt, Stopped, OSError, FloatingPointError) as error:
        kept = _exists(run.state_path)
        go_on = resume_command(run.results_dir, run.command)
        if isinstance(error, FloatingPointError):
            saved = "the last saved state is good" if kept else "no state was saved"
            raise FloatingPointError(
                f"{error}; {saved}: start anew with --run-name NAME and a lower --lr, or with "
                "--precision fp32"
            ) from error
        if not kept:
            raise
        if isinstance(error, OSError):
            raise OSError(
                f"{error}; the training's state is kept: once this is mended, continue with "
                f"`{go_on}`"
            ) from error
        number = getattr(error, "number", signal.SIGINT)
        reason = str(error) or "stopped by Ctrl-C"
        raise Stopped(number, f"{reason}; continue with\n  {go_on}") from error


def resume_command(results_dir: Path, command: str) -> str:
    """The command that goes on: as the run was started, not as this one was typed."""
    command = read_json(results_dir / "config.json").get("command", command)
    return command if "--resume" in command.split() else f"{command} --resume"


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableInput(
            f"{option} {printable(folder)}: cannot be made ({error.strerror}); name another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UnusableInput(f"{option} {printable(folder)}: cannot be written; name another")


def _free_name(settings: Settings, wanted: str) -> str:
    name, number = wanted, 1
    while _finished(settings, name):
        number += 1
        name = f"{wanted}-{number}"
    if settings.resume and not _exists(_state_path(settings, name)):
        return wanted  # nothing of this series is unfinished
    if name != wanted:
        files = _checkpoint_path(settings, wanted), settings.results_dir / wanted
        print(
            f"run {wanted} is finished and kept; this one is {name}\n"
            f"(to use the name again, delete {files[0]} and {files[1]}/)"
        )
    return name


@contextmanager
def _own(path: Path, name: str) -> Iterator[None]:
    with locked(path, wait=False) as obtained:
        if not obtained:
            process = holder(path)
            raise UnusableInput(
                f"run {name} is being trained by another process"
                + (f" ({process}, perhaps suspended)" if process else "")
                + ": wait for it, or give --run-name"
            )
        yield


def _checkpoint_path(settings: Settings, name: str) -> Path:
    return settings.checkpoint_dir / f"{name}.pt"


def _state_path(settings: Settings, name: str) -> Path:
    return settings.checkpoint_dir / f"{name}.resume.pt"


def _exists(state_path: Path) -> bool:
    return any(path.exists() for path in (state_path, previous(state_path)))


def _finished(settings: Settings, name: str) -> bool:
    """A run is finished once its checkpoint or test result stands and its state is gone."""
    results = _checkpoint_path(settings, name), settings.results_dir / name / "test.json"
    return not _exists(_state_path(settings, name)) and any(path.exists() for path in results)


def _sweep(settings: Settings, name: str) -> None:
    """Removes what a kill in the middle of a write has left of this run."""
    checkpoints, results = settings.checkpoint_dir, settings.results_dir / name
    left = *checkpoints.glob(f".{name}.pt.*.tmp"), *checkpoints.glob(f".{name}.resume.pt.*.tmp")
    for path in (*left, *results.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def _check_same(settings: Settings, saved: dict[str, Any], name: str) -> None:
    """Refuses to continue a run under settings that would change its result."""
    different = [
        f"{typed(key, value)} (was {typed(key, saved[key]).removeprefix(flag(key) + ' ')})"
        for key, value in settings.plain().items()
        if key not in WITHOUT_EFFECT and key != "run_name" and saved.get(key, value) != value
    ]
    if different:
        raise UnusableInput(
            f"--resume with {', '.join(different)}: run {name} was started with other settings; "
            "repeat them, or start another run with --run-name NAME"
        )
