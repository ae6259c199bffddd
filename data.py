"""From arrays of pictures to augmented, normalised batches that already lie on the device."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Arrays(NamedTuple):
    """A data set in memory: images (N, H, W, 3) uint8, labels (N,) that index `classes`."""

    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    val_images: np.ndarray | None = None
    val_labels: np.ndarray | None = None


class ChannelStats(NamedTuple):
    """Mean and standard deviation of the three channels over all pixels, as fractions of 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Split(NamedTuple):
    """Images (N, H, W, 3) uint8 and labels (N,) int64 on one device."""

    images: Tensor
    labels: Tensor


class Splits(NamedTuple):
    """Everything a training sees; `stats` are those of the training images."""

    classes: tuple[str, ...]
    stats: ChannelStats
    train: Split
    val: Split | None
    test: Split


def make_splits(
    arrays: Arrays, *, val_fraction: float, limit: int | None, seed: int, device: torch.device
) -> Splits:
    """Puts a data set on the device, with a stratified validation split off the training images.

    Args:
        arrays: the data set.
        val_fraction: share of every class that validates, where the data set brings no such split.
        limit: keep so many images of each split, see `first_of_all`; None keeps all.
        seed: chooses the validation images, so that equal seeds compare equal splits.
        device: where the tensors are put; CIFAR-10 takes 184 MB there.
    """

    def split(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Split:
        if len(rows) < len(labels):  # all of them are not copied: they may not fit a second time
            images = images[rows]
            labels = labels[rows]
        labels = labels.astype(np.int64)
        return Split(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))

    if arrays.val_images is not None:
        train_rows = first_of_all(arrays.train_labels, limit)
        val_rows = first_of_all(arrays.val_labels, limit)
        val = split(arrays.val_images, arrays.val_labels, val_rows)
    else:
        train_rows, val_rows = drawn_rows(arrays.train_labels, val_fraction, limit, seed)
        val = None
        if val_fraction:
            val = split(arrays.train_images, arrays.train_labels, val_rows)
    train = split(arrays.train_images, arrays.train_labels, train_rows)
    test = split(arrays.test_images, arrays.test_labels, first_of_all(arrays.test_labels, limit))
    return Splits(arrays.classes, channel_stats(train.images.cpu().numpy()), train, val, test)


def drawn_rows(
    labels: np.ndarray, val_fraction: float, limit: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which training images of a data set train and which validate, where it has no such split.

    Args:
        labels: (N,) integers.
        val_fraction: share of every class that validates.
        limit: keep so many images of each split; None keeps all.
        seed: chooses.

    Returns:
        The indices of both, int64.
    """
    train = np.arange(len(labels))
    val = train[:0]
    if val_fraction:
        train, val = stratified_split(labels, val_fraction, seed)
    return train[first_of_all(labels[train], limit)], val[first_of_all(labels[val], limit)]


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Factors of the loss by which every class weighs as much as any other.

    Args:
        labels: (N,) int64, of the training images.
        num_classes: C.

    Returns:
        (C,) float32 on the device of the labels. Their mean over the images is 1.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    num_present = (counts > 0).sum()  # a limit may leave a class out
    return len(labels) / (num_present * counts.clamp(min=1)).float()


def first_of_all(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """The first images of a split, in which no class is missing that could be there.

    They are simply the first where those show every class, or as many classes as images are wanted;
    otherwise the classes take turns.

    Args:
        labels: (N,) integers.
        limit: how many images are wanted; None wants all.

    Returns:
        (min(limit, N),) int64, their indices.
    """
    if limit is None:
        return np.arange(len(labels))
    first = np.arange(min(limit, len(labels)))
    num_possible = min(len(first), len(np.unique(labels)))
    if len(np.unique(labels[first])) == num_possible:
        return first
    turn = np.empty(len(labels), np.int64)  # of each image among those of its class
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.argsort(turn, kind="stable")[:limit]


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Takes images away from each class; gives the indices that stay and those taken, sorted.

    Of a class `round(fraction * its size)` images go, chosen by `seed`: at least one, and so few
    that one stays. `labels` are (N,) integers.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        parts.append(rng.permutation(members)[:count])
    taken = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), taken, assume_unique=True), taken


def channel_stats(images: np.ndarray) -> ChannelStats:
    """Statistics over all pixels of images (N, H, W, 3) uint8.

    The pixel values are counted, so that the sums are exact integers whatever the number of images.
    The deviation is that of all pixels, not the mean of per-image deviations (0.2023, ...) that
    many repositories copy from each other.
    """
    values = torch.arange(256)
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for some in torch.from_numpy(images).split(1000):  # each channel is copied to be counted
        channels = some.reshape(-1, 3).T
        counts += torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
    num_pixels = counts[0].sum()
    mean = (counts * values).sum(1).double() / num_pixels
    mean_square = (counts * values**2).sum(1).double() / num_pixels
    variance = mean_square - mean**2
    std = variance.clamp(min=1e-4).sqrt()  # one flat colour: no division by 0
    return ChannelStats(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


def normalize(images: Tensor, stats: ChannelStats) -> Tensor:
    """Turns uint8 images (B, H, W, 3) into floats (B, 3, H, W), channels_last in memory.

    Channels are innermost already, so the permutation moves no bytes.
    """
    scale = torch.tensor([1 / (255 * s) for s in stats.std])
    shift = torch.tensor([m / s for m, s in zip(*stats, strict=True)])
    device = images.device
    x = images.float().mul_(send(scale, device)).sub_(send(shift, device))
    return x.permute(0, 3, 1, 2)


def resize(x: Tensor, side: int) -> Tensor:
    """Resamples images (B, 3, H, W) to (B, 3, side, side), bilinear and, downwards, antialiased."""
    if x.shape[2:] == (side, side):
        return x
    smaller = side < x.shape[2]
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=smaller)


def inputs(
    images: Tensor, stats: ChannelStats, side: int, batch_size: int = 250
) -> Iterator[Tensor]:
    """Yields images as a network sees them in evaluation, in order, nothing left out.

    Args:
        images: (N, H, W, 3) uint8.
        stats: what the network was trained with.
        side: of the network's input, pixels.
        batch_size: images of 32x32 pixels at a time, of larger ones accordingly fewer.

    Yields:
        x (B, 3, side, side) float.
    """
    for some in images.split(max(1, batch_size * 32**2 // side**2)):
        yield resize(normalize(some, stats), side)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what runs there."""
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        flip: "none", "random" (each image by a coin every epoch) or "alternating" (a coin in the
            first epoch, then every second epoch; Jordan 2024, arXiv:2404.00498).
        translate: moves by up to that many 32nds of the image's side and reflects the border.
        cutout: side of a blanked square, 32nds of the image's (DeVries and Taylor 2017,
            arXiv:1708.04552); of CIFAR-10's images both are pixels.
    """

    flip: str = "none"
    translate: int = 0
    cutout: int = 0


def pixels(share: int, side: int) -> int:
    """So many 32nds of a side in pixels, rounded."""
    return round(share * side / 32)


class Draws(NamedTuple):
    """The random numbers of one epoch, a row for each image in the order of training."""

    chosen: Tensor  # (N,) int64 index of the image
    flipped: Tensor  # (N,) bool
    shifts: Tensor  # (N, 2) int64, pixels, or cells of maps, down and right
    corners: Tensor  # (N, 2) int64, upper left of the blanked square

    def rows(self, index: Tensor) -> "Draws":
        """Those of some images; `index` (B,) int64."""
        return Draws(*(column[index] for column in self))

    def to(self, device: torch.device) -> "Draws":
        """The same on a device."""
        return Draws(*(send(column, device) for column in self))


# What a stream of random numbers is for; no two of them coincide.
_ORDER = 1
_FIRST_FLIP = 2

# A GPU's batches are made together, up to so many values: one alone is too little work for it.
_VALUES_AT_ONCE = 2**26


class TrainBatches:
    """Shuffled, augmented, normalised batches of a training split; every image once an epoch.

    All randomness is a function of (seed, epoch), never of what ran before: any epoch can be
    entered at any step and yields the very same batches. Batch sizes of an epoch differ by one
    image at most, so that no crumb of a batch spoils the BatchNorm statistics.

    Args:
        split: images and labels on the device.
        stats: to normalise by.
        batch_size: images of a step, over all processes together.
        augmentation: what is done to the images.
        seed: of order and augmentation.
        side: of the network's input, pixels; None keeps the images'.
        resizing: progressive resizing, as (share of all steps, side) pairs; until that share is
            reached the images have that side. What is learned from small images serves large ones,
            for fewer operations.
        num_epochs: of the whole training, of which `resizing` gives shares.
        part: (rank, number of processes): only that part of each batch is made.
    """

    def __init__(
        self,
        split: Split,
        stats: ChannelStats,
        batch_size: int,
        *,
        augmentation: Augmentation = Augmentation(),
        seed: int = 0,
        side: int | None = None,
        resizing: tuple[tuple[float, int], ...] = (),
        num_epochs: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        self.split = split
        self.stats = stats
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        self.side = side or split.images.shape[1]
        self.resizing = resizing
        self.num_epochs = num_epochs
        self.part = part
        self.read_from = split.images  # the rows of a batch are taken out of it
        self.begin_reading: Callable[[Tensor], None] | None = None  # may be told them before
        stored = min(split.images.shape[1:3])
        self.reach = min(pixels(augmentation.translate, stored), stored - 1)  # reflected once
        self.hole = pixels(augmentation.cutout, stored)
        self.num_images = len(split.labels)  # of an epoch
        self.num_steps = math.ceil(self.num_images / batch_size)  # of an epoch
        self.flipped_first = torch.rand(self.num_images, generator=self._stream(_FIRST_FLIP)) < 0.5

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields x (B, 3, S, S) float and labels (B,) from the given step; both count from 0."""
        draws = self._draw(epoch)
        batches = torch.arange(self.num_images).tensor_split(self.num_steps)
        step = first_step
        while step < self.num_steps:
            side = self.side_at(epoch, step)
            end = self._loaded_until(epoch, step, len(batches[step]))
            own = [self._own(draws, rows) for rows in batches[step:end]]
            x, labels = self._load(draws.rows(torch.cat(own)), side)
            sizes = [len(rows) for rows in own]
            yield from zip(x.split(sizes), labels.split(sizes), strict=True)
            step = end

    def side_at(self, epoch: int, step: int) -> int:
        """Side of the network's input in a step, pixels."""
        done = (epoch * self.num_steps + step) / (self.num_epochs * self.num_steps)
        for share, side in self.resizing:
            if done < share:
                return side
        return self.side

    def share_done(self, epoch: int, step: int) -> float:
        """Share of the training's operations that lie before a step; large images take more."""
        done = (epoch + step / self.num_steps) / self.num_epochs
        work = 0.0
        whole = 0.0
        begin = 0.0
        for end, side in (*self.resizing, (1.0, self.side)):
            work += max(min(end, done) - begin, 0) * side**2
            whole += (end - begin) * side**2
            begin = end
        return work / whole

    def _loaded_until(self, epoch: int, step: int, num_images: int) -> int:
        """The step before which batches are made at once: several, of one side, on a GPU."""
        side = self.side_at(epoch, step)
        count = 1
        if self.split.labels.device.type != "cpu":
            count = max(1, _VALUES_AT_ONCE // (3 * side**2 * num_images))
        end = step + 1
        last = min(step + count, self.num_steps)
        while end < last and self.side_at(epoch, end) == side:
            end += 1
        return end

    def _own(self, draws: Draws, rows: Tensor) -> Tensor:
        """The rows (B,) of a batch that this process trains on."""
        rank, count = self.part
        return rows.tensor_split(count)[rank]

    def _load(self, draws: Draws, side: int) -> tuple[Tensor, Tensor]:
        images, labels = self.split
        if self.begin_reading:
            self.begin_reading(draws.chosen)
        draws = draws.to(labels.device)
        x = normalize(gather(images, draws.chosen, draws.flipped, draws.shifts), self.stats)
        if self.hole:
            x = erase(x, draws.corners, self.hole)
        return resize(x, side), labels[draws.chosen]

    def _stream(self, *key: int) -> torch.Generator:
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    def _draw(self, epoch: int) -> Draws:
        stream = self._stream(_ORDER, epoch)
        count = self.num_images
        chosen = torch.randperm(count, generator=stream)
        coins = torch.rand(count, generator=stream)
        if self.augmentation.flip == "alternating":
            flipped = self.flipped_first[chosen] ^ (epoch % 2 == 1)
        else:
            flipped = coins < (0.5 if self.augmentation.flip == "random" else 0)
        shifts = torch.randint(-self.reach, self.reach + 1, (count, 2), generator=stream)
        height, width = self.split.images.shape[1:3]
        nearest = min(1 - self.hole, 0)  # it may hang over the border, as in the paper
        rows = torch.randint(nearest, height, (count,), generator=stream)
        columns = torch.randint(nearest, width, (count,), generator=stream)
        corners = torch.stack([rows, columns], 1)
        return Draws(chosen, flipped, shifts, corners)


def gather(images: Tensor, chosen: Tensor, flipped: Tensor, shifts: Tensor) -> Tensor:
    """Takes images out of an array, mirrored and moved, in one indexing operation.

    Args:
        images: (N, H, W, C), any dtype.
        chosen: (B,) int64 indices into the first dimension.
        flipped: (B,) bool, True mirrors left to right.
        shifts: (B, 2) int64, pixels down and right, less than the side; what comes in is reflected
            at the border.

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
    in_rows = (rows >= 0) & (rows < side)  # (B, H)
    in_columns = (columns >= 0) & (columns < side)  # (B, W)
    return x.masked_fill_((in_rows[:, :, None] & in_columns[:, None])[:, None], 0)
