"""CIFAR-10 from verified arrays to normalised batches that already lie on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from downloads import cifar10


class Split(NamedTuple):
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 on one device."""

    images: Tensor
    labels: Tensor


class Splits(NamedTuple):
    """The three splits and the channel statistics (three fractions of 255 each) of the first."""

    train: Split
    val: Split | None
    test: Split
    mean: list[float]
    std: list[float]


def load_splits(
    data_dir: Path, *, val_fraction: float, limit: int | None, seed: int, device: torch.device
) -> Splits:
    """Loads CIFAR-10 and carves a stratified validation split out of the training set.

    Args:
        data_dir: where the data is kept; it is fetched there where absent.
        val_fraction: share of every class that becomes validation data; 0 makes none.
        limit: keep the first `limit` images of each split.
        seed: chooses the validation images, so that equal seeds compare equal splits.
        device: where the tensors are put; all 60,000 images take 184 MB.
    """
    arrays = cifar10(data_dir)
    train, val = stratified_split(arrays.train_labels, val_fraction, seed)
    if not len(train):
        raise ValueError(f"--val-fraction {val_fraction}: leaves no training image; take less")
    mean, std = channel_stats(arrays.train_images[train[:limit]])

    def split(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray | slice) -> Split:
        labels = labels[chosen][:limit].astype(np.int64)
        return Split(
            torch.from_numpy(images[chosen][:limit]).to(device), torch.from_numpy(labels).to(device)
        )

    train_arrays = arrays.train_images, arrays.train_labels
    return Splits(
        split(*train_arrays, train),
        split(*train_arrays, val) if len(val) else None,
        split(arrays.test_images, arrays.test_labels, slice(None)),
        mean,
        std,
    )


def stratified_split(
    labels: np.ndarray, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices 0..N-1 into training and validation, class by class; both come out sorted.

    Args:
        labels: (N,) integers.
        val_fraction: in [0, 1); every class gives `round(val_fraction * its size)` images.
        seed: chooses which.

    Returns:
        Indices of the training and of the validation images, int64.
    """
    rng = np.random.default_rng(seed)
    val = [
        rng.permutation(members)[: round(val_fraction * len(members))]
        for members in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), val, assume_unique=True), val


def channel_stats(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, as fractions of 255.

    The pixel values are counted, so that the sums are exact integers whatever the number of images.
    The deviation is that of all pixels, not the mean of per-image deviations (0.2023, ...) that
    many repositories copy from each other.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        Three means and three population standard deviations in [0, 1].
    """
    mean, std = [], []
    for channel in range(3):
        counts = np.zeros(256, dtype=np.int64)
        for part in np.array_split(images[..., channel], max(1, len(images) // 5000)):
            counts += np.bincount(part.ravel(), minlength=256)
        total = int(counts.sum())
        first = sum(value * int(count) for value, count in enumerate(counts)) / total
        second = sum(value**2 * int(count) for value, count in enumerate(counts)) / total
        mean.append(first / 255)
        std.append(
            max(second - first**2, 1e-4) ** 0.5 / 255
        )  # one flat colour must not divide by 0
    return mean, std


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Turns uint8 images (B, H, W, 3) into floats (B, 3, H, W), channels_last in memory.

    Channels are the innermost dimension already, so the permutation moves no bytes.
    """
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)])
    device = images.device
    x = images.float().mul_(send(scale, device)).sub_(send(shift, device))
    return x.permute(0, 3, 1, 2)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what runs there."""
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    `flip` is "none", "random" (each image by a coin every epoch) or "alternating" (a coin in the
    first epoch, then every second epoch; Jordan 2024, arXiv:2404.00498). `translate` moves by up to
    that many pixels and reflects the border; `cutout` blanks a square of that side (DeVries and
    Taylor 2017).
    """

    flip: str = "none"
    translate: int = 0
    cutout: int = 0


# What a stream of random numbers is for; no two of them coincide.
_ORDER, _STEP, _FLIP = 1, 2, 3


class TrainBatches:
    """Shuffled, augmented, normalised batches of a training split; every image once an epoch.

    All randomness is a function of (seed, epoch, step), never of what ran before: any epoch can be
    entered at any step and yields the very same batches. Batch sizes of an epoch differ by one
    image at most, so that no crumb of a batch spoils the BatchNorm statistics.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mean: list[float],
        std: list[float],
        augmentation: Augmentation,
        seed: int,
    ):
        self.split, self.mean, self.std = split, mean, std
        self.augmentation, self.seed = augmentation, seed
        self.num_images = len(split.labels)
        self.num_steps = -(-self.num_images // batch_size)
        self.flipped_first = torch.rand(self.num_images, generator=self._generator(_FLIP)) < 0.5

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields x (B, 3, H, W) float and labels (B,) from the given step; both count from 0."""
        order = torch.randperm(self.num_images, generator=self._generator(_ORDER, epoch))
        for step, chosen in enumerate(order.tensor_split(self.num_steps)):
            if step >= first_step:
                yield self._load(chosen, *self._draw(epoch, step, chosen))

    def _load(
        self, chosen: Tensor, flipped: Tensor, shifts: Tensor, holes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = self.split.labels.device
        chosen = send(chosen, device)
        images = gather(self.split.images, chosen, send(flipped, device), send(shifts, device))
        x = normalize(images, self.mean, self.std)
        if holes is not None:
            x = erase(x, send(holes, device), self.augmentation.cutout)
        return x, self.split.labels[chosen]

    def _generator(self, *key: int) -> torch.Generator:
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    def _draw(self, epoch: int, step: int, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws flips (B,) bool, shifts (B, 2) and, with cutout, hole corners (B, 2) on the CPU."""
        kind, reach = self.augmentation.flip, self.augmentation.translate
        generator, size = self._generator(_STEP, epoch, step), len(chosen)
        if kind == "alternating":
            flipped = self.flipped_first[chosen] ^ (epoch % 2 == 1)
        else:
            flipped = torch.rand(size, generator=generator) < (0.5 if kind == "random" else 0)
        shifts = torch.randint(-reach, reach + 1, (size, 2), generator=generator)
        if not (hole := self.augmentation.cutout):
            return flipped, shifts, None
        sides = self.split.images.shape[1:3]
        corners = [
            torch.randint(1 - hole, side, (size,), generator=generator) for side in sides
        ]  # the hole may hang over the border, as in the paper
        return flipped, shifts, torch.stack(corners, 1)


def gather(images: Tensor, chosen: Tensor, flipped: Tensor, shifts: Tensor) -> Tensor:
    """Takes images out of an array, mirrored and moved, in one indexing operation.

    Args:
        images: (N, H, W, C), any dtype.
        chosen: (B,) int64 indices into the first dimension.
        flipped: (B,) bool, True mirrors left to right.
        shifts: (B, 2) int64, pixels down and right; what comes in is reflected at the border.

    Returns:
        (B, H, W, C) of the same dtype.
    """
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device) - shifts[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]  # (B, W)
    rows = height - 1 - (height - 1 - rows.abs()).abs()
    columns = width - 1 - (width - 1 - columns.abs()).abs()
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    flat = (chosen[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    return images.reshape(-1, images.shape[3])[flat]


def erase(x: Tensor, corners: Tensor, side: int) -> Tensor:
    """Sets a square of each image (B, 3, H, W) to 0, the mean colour; corners are (B, 2) int64."""
    rows = torch.arange(x.shape[2], device=x.device) - corners[:, :1]
    columns = torch.arange(x.shape[3], device=x.device) - corners[:, 1:]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[
        :, None
    ]
    return x.masked_fill_(inside[:, None], 0)
