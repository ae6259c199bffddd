"""Keeps the live page of a run up to date, at a cost that a training does not notice."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from display import pages
from errors import printable
from runtime import launch
from storage.history import Row

MOST_POINTS = 300  # of the loss by step; beyond, every second one goes
MIN_SECONDS = 3.0  # between two pages
SHARE_OF_TIME = 0.005  # that writing pages may take of a training


class Live:
    """What the page of a training shows, gathered while it runs."""

    def __init__(
        self, results_dir: Path, described: dict[str, Any], rows: list[Row], num_steps: int
    ):
        """Begins without a point.

        Args:
            results_dir: of the run; its page lies there.
            described: what `provenance.describe` returned.
            rows: the history, to which the training adds.
            num_steps: of the whole training.
        """
        self.results_dir = results_dir
        self.described = described
        self.rows = rows
        self.num_steps = num_steps
        self.points: list[tuple[int, float, float]] = []  # step, loss (nats), learning rate
        self.every = 1  # a point is taken every so many steps
        self.step = 0
        self.seconds_left = 0.0
        self.next_write = 0.0  # monotonic seconds
        # The epoch in which the last point was taken, and its sums then.
        self.last_epoch = 0
        self.last_loss = 0.0
        self.last_images = 0.0

    def note(
        self, epoch: int, step: int, lr: float, loss: float, images: float, seconds_left: float
    ) -> None:
        """Takes a point: the loss since the last one, or since the epoch began.

        Args:
            epoch: that runs.
            step: of the whole training, from 1.
            lr: its learning rate.
            loss: nats, summed over the images of the running epoch.
            images: of the running epoch so far.
            seconds_left: to go.
        """
        self.step = step
        self.seconds_left = seconds_left
        if epoch != self.last_epoch:
            self.last_epoch = epoch
            self.last_loss = 0.0
            self.last_images = 0.0
        if step % self.every == 0 and images > self.last_images:
            mean = (loss - self.last_loss) / (images - self.last_images)
            self.points.append((step, mean, lr))
            self.last_loss = loss
            self.last_images = images
        if len(self.points) > MOST_POINTS:
            self.points = self.points[1::2]
            self.every *= 2
        self.refresh()

    def refresh(self) -> None:
        """Writes the page, unless that was done a moment ago."""
        if time.monotonic() > self.next_write:
            self.write("running")

    def write(self, status: str, **more: Any) -> None:
        """Writes the page.

        Args:
            status: "running", "stopped" or "finished".
            more: further content of `pages.write`, such as `report`.
        """
        if launch.RANK:
            return
        begin = time.monotonic()
        content = {
            **self.described,
            "status": status,
            "history": self.rows,
            "steps": self.points,
            "step": self.step,
            "num_steps": self.num_steps,
            "seconds": self.rows[-1]["seconds"] if self.rows else 0.0,
            "seconds_left": self.seconds_left,
            "updated": time.time(),
            **more,
        }
        best_effort(pages.write, self.results_dir, content)
        end = time.monotonic()
        self.next_write = end + max(MIN_SECONDS, (end - begin) / SHARE_OF_TIME)


def best_effort(write: Callable[..., None], *arguments: Any) -> None:
    """Writes a page or picture; one that fails is a warning and costs a run nothing else."""
    try:
        write(*arguments)
    except Exception as error:  # whatever it was: the run's numbers do not depend on it
        place = printable(arguments[0])
        print(f"warning: {place}: {type(error).__name__}: {printable(error)}", flush=True)
