"""A training as the user meets it: progress, states saved in time, signals heeded, history kept.

The only place that saves states, reacts to signals and prints while `engine.train` learns.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import engine
import optimizers
from data import TrainBatches
from display.live import Live
from engine import Progress
from errors import Stopped
from reports import provenance
from runs.loading import Validation
from runs.run import Run, resume_command
from runtime import launch, processes, signals
from runtime.device import now, rng_state, set_rng_state
from runtime.memory import random_reads
from sources.known_pictures import known
from sources.picture_folder import Picture
from storage import checkpoint, history

LOOK_EVERY = 20  # steps on a GPU: reading a number there waits for all it was given


class Stopwatch:
    """Seconds that a training has taken.

    Attributes:
        total: in all, with validation and saved states.
        epoch: of the running epoch, without validation.

    Args:
        device: that trains.
        total: of an interrupted run so far, or of what was computed before the first step.
        epoch: likewise of its running epoch.
    """

    def __init__(self, device: torch.device, total: float = 0.0, epoch: float = 0.0):
        self.device = device
        self.total = total
        self.epoch = epoch
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begins here: what has passed until now does not count."""
        self.last = time.perf_counter()

    def count(self, training: bool) -> None:
        """Counts what has passed since the last call, as training or as validation."""
        here = now(self.device)
        passed = here - self.last
        self.last = here
        self.total += passed
        if training:
            self.epoch += passed


class Training:
    """Follows the steps of one run, from where its saved state left it.

    Attributes:
        progress: where it stands; `engine.train` begins there.
        rows: the history, a dict of `history.COLUMNS` for each epoch.

    Args:
        run: whose state is restored here, if there is one, and kept.
        described: what `runs.run.begin` returned.
        model: whose weights are saved; not wrapped by anything.
        optimizer: made by `optimizers.make_optimizer`.
        batches: what is learned from.
        validated: what the validation images are shown to, by default the model.
        epochs: of the whole training.
        save_every: minutes between saved states, at most.
        pictures: of each split, where they are someone's own.
        seconds_before: what was spent on features of a frozen backbone; it counts as training.
    """

    def __init__(
        self,
        run: Run,
        described: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: TrainBatches,
        *,
        validated: nn.Module | None = None,
        epochs: int,
        save_every: float,
        pictures: dict[str, list[Picture]] | None = None,
        seconds_before: float = 0.0,
    ):
        self.run = run
        self.described = described
        self.model = model
        self.validated = validated or model
        self.optimizer = optimizer
        self.batches = batches
        self.epochs = epochs
        self.save_every = save_every
        self.pictures = pictures
        self.precision = described["precision"]

        self.rows: list[history.Row] = []
        self.progress = Progress()
        self.kept_place = ""  # of the newest state on the disk, in words
        self.stopwatch = Stopwatch(run.device, total=seconds_before)
        if run.state:
            self._restore(run.state, seconds_before)
        self.share_at_begin = batches.share_done(self.progress.epoch, self.progress.step)
        self.started_at = time.perf_counter()
        self.saved_at = time.perf_counter()
        self.save_seconds = 0.0  # that the last save took
        self.history_written = not self.rows  # an interrupted run may have failed to
        self.bar: tqdm | None = None
        self.live = Live(run.results_dir, described, self.rows, epochs * batches.num_steps)

    def follow(self, steps: Iterable[Progress], validation: Validation | None) -> None:
        """Takes the steps to their end.

        Args:
            steps: what `engine.train` yields, begun at `self.progress`.
            validation: None without a validation split.

        Raises:
            Stopped: a signal came; the message says whether the state is saved.
            FloatingPointError: loss or gradient is not finite; no state holds anything of it.
            OSError: the history cannot be written, not even at the end; the state is kept.
        """
        if self.progress.epoch == self.epochs:
            print("resumed after the last epoch", flush=True)
        elif self.progress.epoch or self.progress.step:
            print(f"resumed in {_place(self.progress)}", flush=True)
        print(history.HEADER, flush=True)
        self.batches.begin_reading = random_reads(self.batches.read_from)
        self.stopwatch.start()
        self.started_at = time.perf_counter()
        self.saved_at = time.perf_counter()
        self.live.write("running")
        try:
            with signals.collected() as received:
                for at in steps:
                    self.progress = at
                    if at.step:
                        self._after_step(at, received)
                    else:
                        self._after_epoch(at, received, validation)
        except Exception as error:
            self.live.write("stopped", note=f"{type(error).__name__}: {error}")
            raise
        if not self.history_written:  # no later epoch will write it whole
            history.write(self.run.results_dir / "history.csv", self.rows)

    def _after_step(self, at: Progress, received: list[int]) -> None:
        self._move_bar(at)
        is_last = at.step == self.batches.num_steps
        due = time.perf_counter() - self.saved_at > 60 * self.save_every
        # Of several processes each looks at the same steps, and what one has seen holds for all.
        must_look = self.run.device.type == "cpu" or is_last or at.step % LOOK_EVERY == 0
        if launch.WORLD_SIZE == 1 and (due or received):
            must_look = True
        if not must_look:
            return
        signal, due = processes.highest(max(received, default=0), due)
        self._check_finite(at)
        loss, correct, images = processes.summed(at.sums).tolist()
        if self.bar is not None:
            accuracy = f"train acc {100 * correct / images:.1f}%"
            self.bar.set_postfix_str(f"loss {loss / images:.3f}, {accuracy}")
        step = at.epoch * self.batches.num_steps + at.step
        self.live.note(at.epoch, step, at.lr, loss, images, self._seconds_left(at))
        if (due or signal) and not is_last:  # at its last step the epoch's end saves
            self.stopwatch.count(training=True)
            is_saved = self._save(at)
            if signal:
                self._stop(int(signal), is_saved)

    def _after_epoch(
        self, at: Progress, received: list[int], validation: Validation | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.stopwatch.count(training=True)
        loss, correct, images = processes.summed(at.sums).tolist()
        val_loss = None
        val_accuracy = None
        if validation:
            val_loss, val_accuracy = engine.evaluate(
                self.validated, validation.inputs(), validation.labels, self.precision
            )
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"validation loss not finite after epoch {at.epoch}")
        self.stopwatch.count(training=False)
        self.rows.append(
            history.Row(
                epoch=at.epoch,
                step=at.epoch * self.batches.num_steps,
                lr=at.lr,
                train_loss=loss / images,
                train_accuracy=correct / images,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                images_per_second=images / self.stopwatch.epoch,
                seconds=self.stopwatch.total,
            )
        )
        self._write_history()
        self.stopwatch.epoch = 0.0
        # A state a minute costs nothing; where epochs take a second it must not cost the time.
        waited = time.perf_counter() - self.saved_at
        due = launch.RANK == 0 and waited > 20 * self.save_seconds
        signal, due = processes.highest(max(received, default=0), due)
        is_saved = False
        if signal or due or at.epoch == self.epochs:
            is_saved = self._save(at)
        print(history.line(self.rows, self.epochs, self._seconds_left(at)), flush=True)
        self.live.refresh()
        if signal:
            self._stop(int(signal), is_saved)

    def _write_history(self) -> None:
        if launch.RANK == 0:
            path = self.run.results_dir / "history.csv"
            self.history_written = self._attempt(history.write, path, self.rows)

    def _move_bar(self, at: Progress) -> None:
        if self.bar is None:
            self.bar = tqdm(
                total=self.batches.num_images,
                desc=f"epoch {at.epoch + 1}/{self.epochs}",
                unit="img",
                disable=True if launch.RANK > 0 else None,  # None: where there is no terminal
                leave=False,
                dynamic_ncols=True,
            )
        # The first batches of an epoch hold an image more where they do not divide it evenly.
        smallest, num_larger = divmod(self.batches.num_images, self.batches.num_steps)
        images_seen = at.step * smallest + min(at.step, num_larger)
        self.bar.update(images_seen - self.bar.n)

    def _check_finite(self, at: Progress) -> None:
        bad_step = int(at.bad_step)
        if bad_step >= 0:
            epoch, step = divmod(bad_step, self.batches.num_steps)
            raise FloatingPointError(
                f"loss or gradient not finite in epoch {epoch + 1}, step {step + 1}, learning "
                f"rate about {at.lr:.2g}"
            )

    def _seconds_left(self, at: Progress) -> float:
        done = self.batches.share_done(at.epoch, at.step)
        spent = time.perf_counter() - self.started_at
        return spent * (1 - done) / max(done - self.share_at_begin, 1e-9)

    def _stop(self, signal: int, is_saved: bool) -> None:
        go_on = resume_command(self.run.results_dir, self.run.command)
        self.live.write("stopped", note=f"To go on: {go_on}")
        what = "state saved" if is_saved else "state NOT saved, an older one may exist"
        raise Stopped(signal, f"stopped, {what}")

    def _save(self, at: Progress) -> bool:
        """Saves the state; returns whether it is on the disk, as seen by the first process."""
        begin = time.perf_counter()
        self.saved_at = begin
        of_each_process = processes.from_all(
            {
                "rng": torch.get_rng_state(),
                "device_rng": rng_state(self.run.device),
                "sums": at.sums.cpu(),
            }
        )
        if launch.RANK > 0:
            return True
        state = {
            "config": self.described["config"],
            "described": self.described,
            "precision": self.precision,
            "identity": provenance.identity(self.described),
            "pictures": known(self.pictures) if self.pictures else None,
            "epoch": at.epoch,
            "step": at.step,
            "history": self.rows,
            "spent": {"total": self.stopwatch.total, "epoch": self.stopwatch.epoch},
            "sums": torch.stack([kept["sums"] for kept in of_each_process]),
            "rng": [kept["rng"] for kept in of_each_process],
            "device_rng": [kept["device_rng"] for kept in of_each_process],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": at.averages,
            "num_averaged": at.num_averaged,
            "start": at.start,
        }
        is_saved = self._attempt(checkpoint.save_state, self.run.state_path, state)
        if is_saved:
            self.kept_place = _place(at)
        self.save_seconds = time.perf_counter() - begin
        return is_saved

    def _restore(self, state: dict[str, Any], seconds_before: float) -> None:
        self.model.load_state_dict(state["model"])
        optimizers.load_state(self.optimizer, state["optimizer"])
        rank = launch.RANK
        if rank < len(state["rng"]):  # others, of a run with fewer processes before, keep their own
            torch.set_rng_state(state["rng"][rank])
            set_rng_state(state["device_rng"][rank], self.run.device)
        self.rows = state["history"]
        spent = state["spent"]
        self.stopwatch = Stopwatch(
            self.run.device, total=spent["total"] + seconds_before, epoch=spent["epoch"]
        )
        sums = state["sums"]  # (processes then, 3)
        if len(sums) == launch.WORLD_SIZE:
            own_sums = sums[rank]
        elif rank == 0:
            own_sums = sums.sum(0)
        else:
            own_sums = torch.zeros(3)
        self.progress = Progress(
            state["epoch"],
            state["step"],
            sums=own_sums,
            averages=state.get("averages", []),  # older states have none
            num_averaged=state.get("num_averaged", 0),
            start=state.get("start", []),
        )
        self.kept_place = _place(self.progress)

    def _attempt(self, write: Callable[[Path, Any], None], path: Path, content: Any) -> bool:
        """Writes a file unless the disk refuses: it may have room again an epoch later."""
        try:
            write(path, content)
        except OSError as error:
            kept = f"; the state of {self.kept_place} is kept" if self.kept_place else ""
            print(f"warning: {path} not written ({error}); training goes on{kept}", flush=True)
            return False
        return True


def _place(at: Progress) -> str:
    return f"epoch {at.epoch + 1}, step {at.step}"
