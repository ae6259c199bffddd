"""One run: its name, its lock, its files, what it starts or goes on from, how it begins."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.recipes import BY_NUMBER, BY_SIDE, changed
from config.settings import ABSENT, WITHOUT_EFFECT, Settings, flag, typed
from data import Splits, TrainBatches
from display.live import best_effort
from errors import AlreadyFinished, Stopped, UnusableInput, printable
from reports import evaluation, provenance
from runs.loading import settle_precision
from runtime import launch, processes
from runtime.amx import as_products
from runtime.device import select_device
from storage import checkpoint, outputs
from storage.files import read_json, write_json
from storage.run_files import RunFiles, has_state

# What a resumed run must share with its beginning; other surroundings may differ, with a warning.
FIXED = ("surgery", "start_weights")


@dataclass(frozen=True)
class Run:
    """A claimed name and where its files lie.

    Attributes:
        name: of the run.
        checkpoint_path: where the final weights go.
        state_path: where the state of the unfinished run is kept.
        results_dir: where numbers and pictures go.
        command: that starts it.
        state: what an interrupted run of this name saved; None for one that begins.
        device: of this process.
    """

    name: str
    checkpoint_path: Path
    state_path: Path
    results_dir: Path
    command: str
    state: dict[str, Any] | None
    device: torch.device


@contextmanager
def claim(settings: Settings, default_name: str, command: str) -> Iterator[Run]:
    """Takes a run's name for this process, and those that train with it, until the block ends.

    A finished run is never overwritten: the next free `name-2`, `name-3` is taken and said. With
    `--resume` an unfinished run goes on, and one that has not begun begins, so that one command
    serves both times. Whatever ends the block early, the user reads here how to go on.

    Args:
        settings: of the run.
        default_name: where the settings name none.
        command: that starts it.

    Raises:
        UnusableInput: another process holds the name; or the run is unfinished and `--resume` is
            not given, or was started with other settings; or the device is not here.
        AlreadyFinished: the run to resume has finished.
    """
    with ExitStack() as stack:
        device = stack.enter_context(processes.joined(select_device(settings.device)))
        run = None
        with processes.agreed():
            if launch.RANK == 0:
                claimed = _claimed(settings, default_name, command, device)
                run = stack.enter_context(claimed)
        run = replace(processes.from_first(run), device=device)
        stack.enter_context(_says_how_to_go_on(run))
        stack.enter_context(processes.losses_told())
        yield run


@contextmanager
def _claimed(
    settings: Settings, default_name: str, command: str, device: torch.device
) -> Iterator[Run]:
    for option in ("checkpoint_dir", "results_dir"):
        outputs.make_folder(flag(option), getattr(settings, option))
    files = _free_files(settings, settings.run_name or default_name)
    name = files.name
    with files.held():
        if not settings.resume and files.is_finished():
            raise UnusableInput(f"run {name} has finished this moment; repeat the command")
        if not files.has_state():
            outputs.check_run_dir(files.results_dir)
        files.sweep()
        state = None
        if settings.resume:
            state = _state_to_resume(settings, files)
        elif files.has_state():
            go_on = resume_command(files.results_dir, command)
            raise UnusableInput(
                f"run {name} is unfinished: continue with `{go_on}`, or start another with "
                "--run-name NAME"
            )
        yield Run(
            name=name,
            checkpoint_path=files.checkpoint_path,
            state_path=files.state_path,
            results_dir=files.results_dir,
            command=command,
            state=state,
            device=device,
        )


def _free_files(settings: Settings, wanted: str) -> RunFiles:
    """Those of the run of this name, or of the next free one of its series where it is finished."""
    named = RunFiles(wanted, settings.checkpoint_dir, settings.results_dir)
    files = named.first_unfinished()
    if settings.resume and not files.has_state():
        return named  # nothing of this series is unfinished
    if files != named:
        print(
            f"run {wanted} is finished and kept; this one is {files.name}\n"
            f"(to use the name again, delete {named.checkpoint_path} and {named.results_dir}/)"
        )
    return files


def _state_to_resume(settings: Settings, files: RunFiles) -> dict[str, Any] | None:
    """The saved state of an unfinished run; None where none was saved yet."""
    name = files.name
    if files.is_finished():
        config = read_json(files.results_dir / "config.json").get("config", {})
        _check_same(settings, config, name)
        raise AlreadyFinished(f"run {name} is finished: {files.results_dir}/")
    state, problems = checkpoint.load_state(files.state_path)
    for problem in problems:
        print(f"warning: {problem}; going on from the state before it", file=sys.stderr)
    if state is None:
        print(f"run {name} has no saved state: it begins")
    else:
        _check_same(settings, state["config"], name)
    return state


def begin(
    run: Run,
    settings: Settings,
    model: nn.Module,
    batches: TrainBatches,
    splits: Splits,
    *,
    arch: str,
    arguments: dict[str, Any],
    start_weights: dict[str, str],
    data: dict[str, Any],
) -> dict[str, Any]:
    """Begins a run or goes on with it: settles its precision, writes config.json, says what runs.

    Args:
        run: the claimed run; if it goes on it keeps the command and day of its beginning.
        settings: of the run, settled.
        model: frozen where it is to be; its convolutions may be replaced by faster ones.
        batches: which it is to see; the first is drawn.
        splits: what it learns from.
        arch: "custom_cnn" or a pretrained network's name.
        arguments: how `models.create_model` built the network.
        start_weights: where the weights came from.
        data: where the data came from.

    Returns:
        What config.json says, `precision` among it.

    Raises:
        UnusableInput: the run was started with another network or other weights.
    """
    if launch.RANK == 0:
        batch_path = run.results_dir / "batch.png"
        best_effort(evaluation.draw_batch, batch_path, run.name, batches, splits)
    precision = settle_precision(settings.precision, model, batches, run.state)
    as_products(model, precision, run.device)
    described = provenance.describe(
        name=run.name,
        command=run.command,
        config=settings.plain(),
        changed=changed(settings, len(splits.train.labels)),
        arch=arch,
        arguments=arguments,
        image_size=batches.side,
        model=model,
        splits=splits,
        data=data,
        start_weights=start_weights,
        precision=precision,
    )
    with processes.agreed():
        if launch.RANK == 0:
            path = run.results_dir / "config.json"
            if run.state:
                _check_same(settings, run.state["config"], run.name)
                _check_surroundings(run.state["identity"], provenance.identity(described))
                before = read_json(path)
                for key in ("command", "date"):
                    described[key] = before.get(key, described[key])
            write_json(path, described)
            _announce(run, described)
    return described


def _check_surroundings(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses to go on with another network; warns of another device and other hardware."""
    for key, before in saved.items():
        if here[key] == before:
            continue
        message = f"the run was started with {key} {before}, not {here[key]}"
        if key in FIXED:
            raise UnusableInput(f"--resume: {message}; restore it or start another run")
        print(f"warning: {message}; the last bits may differ", file=sys.stderr)


def _announce(run: Run, described: dict[str, Any]) -> None:
    sizes = described["splits"]
    counts = described["parameters"]
    side = described["image_size"]
    weights = described["start_weights"]
    begins_from = printable(weights.get("file", weights["source"]))  # its source may be long
    print(
        f"{run.name}: {described['arch']}, {counts['total']:,} parameters, "
        f"{counts['trainable']:,} of them train\n"
        f"first weights: {begins_from}\n"
        f"epochs: {described['config']['epochs']}, input: {side}x{side} pixels\n"
        f"{sizes['train']:,} training, {sizes['val']:,} validation, {sizes['test']:,} test images\n"
        f"on {described['environment']['hardware']}\n"
        f"live page {run.results_dir / 'index.html'}",
        flush=True,
    )


@contextmanager
def _says_how_to_go_on(run: Run) -> Iterator[None]:
    """Adds to what ends a run early what was kept of it and the command that continues."""
    try:
        yield
    except FloatingPointError as error:
        saved = "no state was saved"
        if has_state(run.state_path):
            saved = "the last saved state is good"
        raise FloatingPointError(
            f"{error}; {saved}: start anew with --run-name NAME and a lower --lr, or with "
            "--precision fp32"
        ) from error
    except OSError as error:
        if not has_state(run.state_path):
            raise
        go_on = resume_command(run.results_dir, run.command)
        raise OSError(
            f"{error}; the training's state is kept: once this is mended, continue with `{go_on}`"
        ) from error
    except Stopped as error:
        if has_state(run.state_path):
            go_on = resume_command(run.results_dir, run.command)
            raise Stopped(error.number, f"{error}; continue with\n  {go_on}") from error
        if (run.results_dir / "test.json").exists():
            raise Stopped(
                error.number,
                f"{error}; run {run.name} is finished, but some of its pictures may be missing: "
                f"`python evaluate.py {run.checkpoint_path}` draws them",
            ) from error
        raise


def resume_command(results_dir: Path, command: str) -> str:
    """The command that goes on: as the run was started, not as this one was typed."""
    command = read_json(results_dir / "config.json").get("command", command)
    return command if "--resume" in command.split() else f"{command} --resume"


def _check_same(settings: Settings, saved: dict[str, Any], name: str) -> None:
    """Refuses to continue a run under settings that would change its result.

    Another device is allowed: `_check_surroundings` warns where it is of another kind. A setting
    that the saved ones lack came with a newer version; what was done before stands in
    `settings.ABSENT`. One that is not there must be off.

    Args:
        settings: of the run that is to go on.
        saved: as it began; empty where that is not known.
        name: of the run.
    """
    may_differ = {*WITHOUT_EFFECT, "run_name", "device"}
    if settings.pictures and not settings.pictures.exists():
        may_differ |= BY_SIDE  # nothing tells their sides; loading will say what is missing
    here = settings.plain()
    different = []
    for key, value in here.items():
        if key in may_differ or not saved:
            continue
        if key in BY_NUMBER and value is None:
            continue  # follows from pictures that are yet to be read; `begin` asks again
        before = saved.get(key, ABSENT.get(key))
        if before is None and not value:
            continue
        if before != value:
            was = typed(key, before).removeprefix(flag(key) + " ")
            different.append(f"{typed(key, value)} (was {was})")
    gone = sorted(saved.keys() - here.keys())
    different += [f"no {flag(key)} (was {saved[key]})" for key in gone if saved[key]]
    if different:
        raise UnusableInput(
            f"--resume with {', '.join(different)}: run {name} was started with other settings; "
            "repeat them, or start another run with --run-name NAME"
        )
