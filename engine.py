"""Schedule, one step, a whole training that can stop and go on anywhere."""

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import history
from cli import Stopped
from compute import compile_or_not, forward, now, train_mode
from config import TrainConfig
from graphs import launched_at_once
from optimizers import MuonAdamW, make_optimizer


class Batches(Protocol):
    """What `fit` trains on; `data.TrainBatches` is one."""

    num_images: int
    num_steps: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs and labels from the given step of an epoch."""


def lr_factor(step: int, num_steps: int, warmup: float) -> float:
    """Learning rate relative to its peak: a linear rise, then half a cosine down to 0.

    Args:
        step: optimiser step, from 0.
        num_steps: of the whole training.
        warmup: share of the steps that rise.
    """
    rise = warmup * num_steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (num_steps - rise)))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | MuonAdamW,
    precision: str,
    label_smoothing: float,
    x: Tensor,
    labels: Tensor,
    lr: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """One optimiser step, which updates no parameter where loss or gradient are not finite.

    Args:
        model: in training mode.
        optimizer: made by `optimizers.make_optimizer`.
        precision: "fp32" or "bf16".
        label_smoothing: in [0, 1).
        x: inputs (B, ...).
        labels: (B,) int64.
        lr: learning rate of a group whose `lr_scale` is 1.

    Returns:
        (3,) summed loss (nats), correct predictions and images; and whether a number was not finite
        (bool). Both stay on the device, so that nothing waits for it.
    """
    logits = forward(model, x, precision)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    bad = ~torch.isfinite(nn.utils.get_total_norm(gradients) + loss.detach())
    optimizer.found_inf = bad.float()  # as GradScaler does: the fused kernel then skips the step
    optimizer.step()
    optimizer.zero_grad()
    correct = (logits.detach().argmax(1) == labels).sum()
    size = torch.full_like(correct, len(labels))
    return torch.stack([loss.detach() * len(labels), correct, size]), bad


def stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | MuonAdamW,
    config: TrainConfig,
    precision: str,
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """`train_step` of inputs, labels and learning rate, the fastest way this device offers."""
    device = next(model.parameters()).device
    network = compile_or_not(model, config.compile, device)
    step = partial(train_step, network, optimizer, precision, config.label_smoothing)
    return launched_at_once(step, device)


@dataclass(frozen=True)
class RunFiles:
    """Where a training keeps its state and its history, and the command that resumes it.

    `identity` is stored with the state: what else the result depends on (hardware, weights).
    """

    state_path: Path
    history_path: Path
    resume_command: list[str]
    identity: dict[str, Any]


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: Batches,
    validate: Callable[[], tuple[float, float]] | None,
    config: TrainConfig,
    precision: str,
    files: RunFiles,
    state: dict[str, Any] | None = None,
    seconds_before: float = 0.0,
) -> list[dict[str, Any]]:
    """Trains a model in place; the one place that prints the progress of a training.

    Args:
        model: on its device, channels_last.
        groups: parameter groups with `lr_scale`.
        batches: yields the training data, a pure function of (epoch, step).
        validate: loss (nats) and top-1 accuracy on the validation split, or None without one.
        config: epochs, learning rate, label smoothing, minutes between saves.
        precision: "fp32" or "bf16".
        files: where to keep state and history.
        state: what an interrupted run saved, to continue exactly from there.
        seconds_before: what was spent on features of a frozen trunk; it counts as training.

    Returns:
        The history: a dict of `history.COLUMNS` for each epoch.

    Raises:
        Stopped: Ctrl-C or SIGTERM came; the state is saved.
        FloatingPointError: loss or gradient is not finite; the last good state is kept.
        OSError: the history cannot be written, not even at the end; the state is kept.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(groups, config, precision)
    num_steps = config.epochs * batches.num_steps
    rows: list[dict[str, Any]] = []
    epoch = step = 0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
    bad_step = torch.full((), -1, device=device)  # the first whose loss or gradient was not finite
    spent = {"total": seconds_before, "epoch": 0.0}  # seconds
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        rows, epoch, step, spent = (state[k] for k in ("history", "epoch", "step", "spent"))
        sums.copy_(state["sums"])
        spent["total"] += seconds_before
    take_step = stepper(model, optimizer, config, precision)
    written = _kept(history.write, files.history_path, rows)
    clock = saved = time.perf_counter()

    def tick(training: bool) -> None:
        nonlocal clock
        begin, clock = clock, now(device)
        spent["total"] += clock - begin
        if training:
            spent["epoch"] += clock - begin

    def not_finite(done: int) -> str:
        lr = config.lr * lr_factor(done, num_steps, config.warmup)
        epochs, steps = divmod(done, batches.num_steps)
        return (
            f"loss or gradient not finite in epoch {epochs + 1}, step {steps + 1}, learning rate "
            f"{lr:.2g}; no weight was changed by it, and the last saved state is good: start anew "
            "with --run-name NAME and a lower --lr"
            + (" or --precision fp32" if precision == "bf16" else "")
        )

    def save_state() -> bool:
        nonlocal saved
        saved = time.perf_counter()
        content = {
            "config": config.plain(),
            "precision": precision,
            "epoch": epoch,
            "step": step,
            "history": rows,
            "spent": dict(spent),
            "sums": sums.cpu(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "identity": files.identity,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        return _kept(checkpoint.save_state, files.state_path, content)

    if state:
        print(f"resumed in epoch {epoch + 1}, step {step}", flush=True)
    print(history.HEADER, flush=True)
    with _signals() as received:
        while epoch < config.epochs:
            train_mode(model)
            with tqdm(
                total=batches.num_images,
                initial=int(sums[2]),
                desc=f"epoch {epoch + 1}/{config.epochs}",
                unit="img",
                disable=None,
                leave=False,
                dynamic_ncols=True,
            ) as bar:
                for x, labels in batches.epoch(epoch, step):
                    done = epoch * batches.num_steps + step
                    lr = config.lr * lr_factor(done, num_steps, config.warmup)
                    measured, bad = take_step(x, labels, lr)
                    sums += measured
                    bad_step = torch.where((bad_step < 0) & bad, done, bad_step)
                    step += 1
                    bar.update(len(labels))
                    due = received or time.perf_counter() - saved > 60 * config.save_every
                    # Reading a number waits for a GPU, so that there it is done now and then.
                    if device.type == "cpu" or due or step % 50 == 0 or step == batches.num_steps:
                        if bad_step >= 0:
                            raise FloatingPointError(not_finite(int(bad_step)))
                        bar.set_postfix_str(f"loss {sums[0] / sums[2]:.3f} acc {_percent(sums)}")
                    if due and step < batches.num_steps:  # at its last step the epoch's end saves
                        tick(training=True)
                        kept = save_state()
                        if received:
                            raise Stopped(received[0], _stopped(kept, files))
            tick(training=True)
            loss, accuracy, images = sums.tolist()
            try:
                val_loss, val_accuracy = validate() if validate else (None, None)
            except ValueError as error:  # logits that are not finite
                raise FloatingPointError(not_finite(done)) from error
            tick(training=False)
            values = (
                epoch + 1,
                (epoch + 1) * batches.num_steps,
                lr,
                loss / images,
                accuracy / images,
                val_loss,
                val_accuracy,
                images / spent["epoch"],
                spent["total"],
            )
            rows.append(dict(zip(history.COLUMNS, values, strict=True)))
            written = _kept(history.write, files.history_path, rows)
            epoch, step = epoch + 1, 0
            sums.zero_()
            spent["epoch"] = 0.0
            kept = save_state()
            print(history.line(rows, config.epochs, seconds_before), flush=True)
            if received:
                raise Stopped(received[0], _stopped(kept, files))
    if not written:  # no later epoch will write it whole
        history.write(files.history_path, rows)
    return rows


def _kept(write: Callable[..., None], path: Path, content: Any) -> bool:
    """Writes a file unless the disk refuses: a full disk may have room again an epoch later."""
    try:
        write(path, content)
    except OSError as error:
        print(f"warning: {path} not written ({error}); training goes on", flush=True)
        return False
    return True


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first Ctrl-C or SIGTERM instead of breaking off; the second breaks off."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise Stopped(number, "stopped at once; a state saved before is untouched")
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _percent(sums: Tensor) -> str:
    return f"{100 * sums[1] / sums[2]:.1f} %"


def _stopped(kept: bool, files: RunFiles) -> str:
    what = "state saved" if kept else "state NOT saved, an older one may exist"
    return f"stopped, {what}; continue with\n  {shlex.join(files.resume_command)}"
