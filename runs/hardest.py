"""Batches of the images that are hardest for the network, which learn most from a step."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data import Draws, TrainBatches, send


class HardestBatches(TrainBatches):
    """In most epochs, only the images whose loss was largest when a step last saw them.

    The first quarter of the epochs and the last one show every image once, the others a share of
    them as often as it takes to be as long; choosing costs no operation of the network. After
    airbench96_faster (Jordan 2024), which asks a smaller network.

    Args:
        arguments: of `TrainBatches`.
        hardest: the share, in (0, 1).
        options: of `TrainBatches`.

    Attributes:
        state: `losses`, (N,) float, of each image when last seen, and `shown`, int64 indices of the
            images the running epoch keeps to; on the device.
    """

    def __init__(self, *arguments: Any, hardest: float, **options: Any):
        super().__init__(*arguments, **options)
        self.hardest, device = hardest, self.split.labels.device
        self.state["losses"] = torch.zeros(self.num_images, device=device)
        self.state["shown"] = torch.arange(self.num_images, device=device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As in `TrainBatches`; where an epoch begins, it chooses its images."""
        if not first_step:
            middle = max(1, self.num_epochs // 4) <= epoch < self.num_epochs - 1
            count = round(self.hardest * self.num_images) if middle else self.num_images
            order = self.state["losses"].argsort(descending=True, stable=True)
            self.state["shown"] = order[: max(1, count)]
        yield from super().epoch(epoch, first_step)

    def note(self, step: int, losses: Tensor) -> None:
        """Takes what the images (B,) of a step of the epoch, or of this part of it, cost."""
        (rank, count), chosen, losses = self.part, self.chosen[step], losses.float()
        if count > 1:
            whole = losses.new_zeros(len(chosen))
            whole.tensor_split(count)[rank].copy_(losses)
            dist.all_reduce(losses := whole)
        # An image that a step has twice counts with its larger loss, in whichever order they come.
        seen = torch.full_like(self.state["losses"], -torch.inf)
        seen.scatter_reduce_(0, send(chosen, losses.device), losses, "amax")
        self.state["losses"].copy_(torch.where(seen > -torch.inf, seen, self.state["losses"]))

    def _order(self, epoch: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        shown = self.state["shown"].cpu()
        times = torch.arange(self.num_images) // len(shown)
        orders = [torch.randperm(len(shown), generator=stream) for _ in times[:: len(shown)]]
        return shown[torch.cat(orders)[: self.num_images]], epoch + times

    def _draw(self, epoch: int) -> Draws:
        draws = super()._draw(epoch)
        self.chosen = draws.chosen.tensor_split(self.num_steps)
        return draws
