"""A training as the user meets it: progress, states saved in time, signals heeded, history kept.

The only place that saves states, reacts to signals and prints while `engine.train` learns.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from config.settings import Settings
from data import TrainBatches
from engine import Progress
from errors import Stopped
from reports import history, provenance
from reports.live import Live
from runs.run import Run, resume_command
from runtime import processes, signals
from runtime.device import now, rng_state, set_rng_state
from sources.known_pictures import known
from sources.picture_folder import Picture
from storage import checkpoint

Row = dict[str, Any]
Validate = Callable[[], tuple[float, float]]  # loss (nats) and accuracy on the validation split


@dataclass
class Training:
    """Follows the steps of one run.

    Attributes:
        run: whose state is restored here, if there is one, and kept.
        settings: epochs, minutes between saves.
        model: whose weights are saved; not wrapped by anything.
        optimizer: made by `optimizers.make_optimizer`.
        batches: what is learned from.
        precision: "fp32" or "bf16".
        described: what `provenance.describe` returned; the live page shows it.
        seconds_before: what was spent on features of a frozen trunk; it counts as training.
        pictures: of each split, where they are someone's own.
        rows: the history, a dict of `history.COLUMNS` for each epoch.
    """

    run: Run
    settings: Settings
    model: nn.Module
    optimizer: Any
    batches: TrainBatches
    precision: str
    described: dict[str, Any]
    seconds_before: float = 0.0
    pictures: dict[str, list[Picture]] | None = None

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.rows: list[Row] = []
        self.spent = {"total": 0.0, "epoch": 0.0}  # seconds
        self.progress = Progress()
        self.written, self.bar, self.kept = True, None, ""
        if self.run.state:
            self._restore(self.run.state)
        self.spent["total"] += self.seconds_before
        self.begun_at = self.batches.share_done(self.progress.epoch, self.progress.step)
        num_steps = self.settings.epochs * self.batches.num_steps
        self.live = Live(self.run, self.described, self.rows, num_steps)

    def follow(self, steps: Iterable[Progress], validate: Validate | None) -> None:
        """Takes the steps to their end.

        Args:
            steps: what `engine.train` yields, begun at `self.progress`.
            validate: None without a validation split.

        Raises:
            Stopped: a signal came; the message says whether the state is saved.
            FloatingPointError: loss or gradient is not finite; no state holds anything of it.
            OSError: the history cannot be written, not even at the end; the state is kept.
        """
        if self.progress.epoch or self.progress.step:
            at = self.progress
            print(f"resumed in epoch {at.epoch + 1}, step {at.step}", flush=True)
        print(history.HEADER, flush=True)
        self.clock = self.started = self.saved = time.perf_counter()
        self.save_seconds = 0.0
        self.live.write("running")
        try:
            with signals.collected() as received:
                for at in steps:
                    self.progress = at
                    if at.step:
                        self._after_step(at, received)
                    else:
                        self._after_epoch(at, received, validate)
        except Exception as error:
            self.live.write("stopped", note=f"{type(error).__name__}: {error}")
            raise
        if not self.written:  # no later epoch will write it whole
            history.write(self.run.results_dir / "history.csv", self.rows)

    def _after_step(self, at: Progress, received: list[int]) -> None:
        self._move_bar(at)
        last = at.step == self.batches.num_steps
        due = time.perf_counter() - self.saved > 60 * self.settings.save_every
        # Reading a number waits for a GPU, so that there it is done now and then. Of several
        # processes each looks at the same steps, and what one has seen holds for all.
        alone = processes.SIZE == 1 and (due or received)
        if not (self.device.type == "cpu" or alone or last or at.step % 20 == 0):
            return
        signal, due = processes.highest(max(received, default=0), due)
        self._check(at)
        loss, correct, images = processes.summed(at.sums).tolist()
        self.bar.set_postfix_str(
            f"loss {loss / images:.3f}, train acc {100 * correct / images:.1f}%"
        )
        step = at.epoch * self.batches.num_steps + at.step
        self.live.note(at.epoch, step, at.lr, loss, images, self._seconds_left(at))
        if (due or signal) and not last:  # at its last step the epoch's end saves
            self._tick(training=True)
            kept = self._save(at)
            if signal:
                self._stop(int(signal), kept)

    def _after_epoch(self, at: Progress, received: list[int], validate: Validate | None) -> None:
        self.bar.close()
        self.bar = None
        self._tick(training=True)
        loss, correct, images = processes.summed(at.sums).tolist()
        val_loss, val_accuracy = validate() if validate else (None, None)
        if val_loss is not None and not math.isfinite(val_loss):
            raise FloatingPointError(f"validation loss not finite after epoch {at.epoch}")
        self._tick(training=False)
        values = (
            *(at.epoch, at.epoch * self.batches.num_steps, at.lr, loss / images, correct / images),
            *(val_loss, val_accuracy, images / self.spent["epoch"], self.spent["total"]),
        )
        self.rows.append(dict(zip(history.COLUMNS, values, strict=True)))
        self._write_history()
        self.spent["epoch"] = 0.0
        # A state a minute costs nothing; where epochs take a second it must not cost the time.
        due = not processes.RANK and time.perf_counter() - self.saved > 20 * self.save_seconds
        signal, due = processes.highest(max(received, default=0), due)
        kept = not (signal or due or at.epoch == self.settings.epochs) or self._save(at)
        left = self._seconds_left(at)
        print(history.line(self.rows, self.settings.epochs, left), flush=True)
        self.live.refresh()
        if signal:
            self._stop(int(signal), kept)

    def _write_history(self) -> None:
        path = self.run.results_dir / "history.csv"
        self.written = bool(processes.RANK) or _kept(history.write, path, self.rows)

    def _move_bar(self, at: Progress) -> None:
        per_step, more = divmod(self.batches.num_images, self.batches.num_steps)
        if self.bar is None:
            self.bar = tqdm(
                total=self.batches.num_images,
                desc=f"epoch {at.epoch + 1}/{self.settings.epochs}",
                unit="img",
                disable=True if processes.RANK else None,
                leave=False,
                dynamic_ncols=True,
            )
        self.bar.update(at.step * per_step + min(at.step, more) - self.bar.n)

    def _check(self, at: Progress) -> None:
        if (bad := int(at.bad_step)) >= 0:
            epochs, steps = divmod(bad, self.batches.num_steps)
            raise FloatingPointError(
                f"loss or gradient not finite in epoch {epochs + 1}, step {steps + 1}, learning "
                f"rate about {at.lr:.2g}"
            )

    def _tick(self, training: bool) -> None:
        begin, self.clock = self.clock, now(self.device)
        self.spent["total"] += self.clock - begin
        if training:
            self.spent["epoch"] += self.clock - begin

    def _seconds_left(self, at: Progress) -> float:
        done = self.batches.share_done(at.epoch, at.step)
        spent = time.perf_counter() - self.started
        return spent * (1 - done) / max(done - self.begun_at, 1e-9)

    def _stop(self, signal: int, kept: bool) -> None:
        go_on = resume_command(self.run.results_dir, self.run.command)
        self.live.write("stopped", note=f"To go on: {go_on}")
        what = "state saved" if kept else "state NOT saved, an older one may exist"
        raise Stopped(signal, f"stopped, {what}")

    def _save(self, at: Progress) -> bool:
        begin = self.saved = time.perf_counter()
        kept_by_each = torch.get_rng_state(), rng_state(self.device), at.sums.cpu()
        random, device_random, sums = zip(*processes.from_all(kept_by_each), strict=True)
        if processes.RANK:
            return True
        state = {
            "config": self.settings.plain(),
            "precision": self.precision,
            "identity": provenance.identity(self.described),
            "pictures": known(self.pictures) if self.pictures else None,
            "epoch": at.epoch,
            "step": at.step,
            "history": self.rows,
            "spent": dict(self.spent),
            "sums": torch.stack(sums),
            "rng": list(random),
            "device_rng": list(device_random),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        written = _kept(checkpoint.save_state, self.run.state_path, state, self.kept)
        if written:
            self.kept = _place(at)
        self.save_seconds = time.perf_counter() - begin
        return written

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        rank = processes.RANK
        if rank < len(state["rng"]):  # others, of a run with fewer processes before, keep their own
            torch.set_rng_state(state["rng"][rank])
            set_rng_state(state["device_rng"][rank], self.device)
        self.rows, self.spent = state["history"], state["spent"]
        sums = state["sums"]  # (processes then, 3); those of all are added up
        own = sums[rank] if len(sums) == processes.SIZE else sums.sum(0) * (rank == 0)
        self.progress = Progress(state["epoch"], state["step"], sums=own)
        self.kept = _place(self.progress)


def _place(at: Progress) -> str:
    return f"; the state of epoch {at.epoch + 1}, step {at.step} is kept"


def _kept(write: Callable[..., None], path: Path, content: Any, instead: str = "") -> bool:
    """Writes a file unless the disk refuses: a full disk may have room again an epoch later."""
    try:
        write(path, content)
    except OSError as error:
        print(f"warning: {path} not written ({error}); training goes on{instead}", flush=True)
        return False
    return True
