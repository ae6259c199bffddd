"""Keeps the live page of a run up to date, at a cost that a training does not notice."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import pages
from runtime import launch

MOST_POINTS = 300  # of the loss by step; beyond, every second one goes


@dataclass
class Live:
    """What the page of a training shows, gathered while it runs.

    Attributes:
        results_dir: of the run; the page lies there.
        described: what `provenance.describe` returned.
        rows: the history, which grows.
        num_steps: of the whole training.
    """

    results_dir: Path
    described: dict[str, Any]
    rows: list[dict[str, Any]]
    num_steps: int

    def __post_init__(self):
        self.points: list[tuple[int, float, float]] = []  # step, loss (nats), learning rate
        self.before = (0, 0.0, 0.0)  # epoch, its loss and images when a point was last taken
        self.left, self.next_write, self.every, self.step = 0.0, 0.0, 1, 0

    def note(
        self, epoch: int, step: int, lr: float, loss: float, images: float, left: float
    ) -> None:
        """Takes a point: the loss since the last one, or since the epoch began.

        Args:
            epoch: that runs.
            step: of the whole training, from 1.
            lr: its learning rate.
            loss: nats, summed over the running epoch.
            images: of the running epoch so far.
            left: seconds to go.
        """
        self.step, self.left = step, left
        same, *old = self.before
        old_loss, old_images = old if same == epoch else (0.0, 0.0)
        if step % self.every == 0 and images > old_images:
            self.points.append((step, (loss - old_loss) / (images - old_images), lr))
            self.before = epoch, loss, images
            if len(self.points) > MOST_POINTS:
                self.points, self.every = self.points[1::2], 2 * self.every
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
            "seconds_left": self.left,
            "updated": time.time(),
            **more,
        }
        best_effort(pages.write, self.results_dir, content)
        took = time.monotonic() - begin
        self.next_write = time.monotonic() + max(3.0, 200 * took)  # at most half a per cent


def best_effort(write: Callable[..., None], *arguments: Any) -> None:
    """Writes a page or picture; one that fails is a warning and costs a run nothing else."""
    try:
        write(*arguments)
    except Exception as error:  # whatever it was: the run's numbers do not depend on it
        print(f"warning: {arguments[0]}: {type(error).__name__}: {error}", flush=True)
