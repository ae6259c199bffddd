"""The output of a frozen backbone, computed once for every image and its mirror image."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config.settings import FineTuneSettings
from data import ChannelStats, Draws, Splits, TrainBatches, gather, inputs, pixels, send
from engine import forward
from runs.loading import Validation
from runtime import launch, processes
from runtime.memory import allocate

# Of fewer training images the maps are kept with "most"; in bf16 ResNet-18's take up to 3 GB.
MOST_KEPT = 5000


def keeps(settings: FineTuneSettings, num_images: int, device: torch.device) -> bool:
    """Whether the frozen part's output is kept.

    With "most" it is large and spares 14 % of a step's time. That pays where few images are seen
    often, which rounds are for, and on a CPU, whose memory holds images and maps alike.

    Args:
        settings: of the run, settled.
        num_images: of the training split.
        device: that trains.
    """
    if settings.unfreeze != "most":
        return settings.cached
    few = num_images < MOST_KEPT and settings.rounds > 1
    return settings.cache and few and not settings.cutout and device.type == "cpu"


@torch.inference_mode()
def compute_features(
    backbone: nn.Module,
    images: Tensor,
    stats: ChannelStats,
    side: int,
    precision: str,
    scratch: Path,
    mirrored: bool = True,
) -> Tensor:
    """Runs a frozen backbone over all images, plain and mirrored.

    A frozen backbone in eval mode is a fixed function, and but for moves an image has two variants:
    what takes most of a step's time needs computing only twice an image.

    Args:
        backbone: put into eval mode here.
        images: (N, H, W, 3) uint8 on the backbone's device.
        stats: to normalise by.
        side: of the backbone's input, pixels.
        precision: "fp32" or "bf16", of the computation and of what is kept.
        scratch: beside which path, and named after it, the features go, memory-mapped, when they
            would not fit in memory.
        mirrored: whether the mirrored variant is wanted too.

    Returns:
        Maps (N, 2, H, W, C) or pooled values (N, 2, C), float32 or bfloat16, variant 1 mirrored; or
        one variant, (N, 1, ...). On the CPU.

    Raises:
        OSError: they fit neither in memory nor on the disk.
    """
    backbone.eval()
    features = None
    done = 0
    with tqdm(total=len(images), desc="features", unit="img", disable=None, leave=False) as bar:
        for x in inputs(images, stats, side, batch_size=500):
            variants = [x, x.flip(3)] if mirrored else [x]
            for number, variant in enumerate(variants):
                outputs = forward(backbone, variant, precision)
                if outputs.ndim == 4:
                    outputs = outputs.permute(0, 2, 3, 1)  # as they lie in memory
                if features is None:
                    shape = (len(images), len(variants), *outputs.shape[1:])
                    features = _allocate(shape, precision, scratch)
                features[done : done + len(x), number] = outputs
            done += len(x)
            bar.update(len(x))
    return features


def _allocate(shape: tuple[int, ...], precision: str, scratch: Path) -> Tensor:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    both = ", plain and mirrored" if shape[1] == 2 else ""
    what = f"features of {shape[0]:,} images{both}"
    print(f"{what}: {torch.Size(shape).numel() * dtype.itemsize / 1e6:,.0f} MB", flush=True)
    return allocate(
        shape,
        dtype,
        scratch,
        what,
        "add --no-cache, or take a smaller --image-size or another --checkpoint-dir",
    )


class FeatureBatches(TrainBatches):
    """Cached features in the order, and with the flips, in which `batches` gives the images.

    Where `batches` moves the images, their maps are moved here, by whole cells: by one at least, to
    the nearest of what the images move by. But for the border that is what a convolution makes of
    an image moved by as many strides.

    Of several processes each keeps, and trains on, every n-th image, n being their number.

    Args:
        batches: of the images; without augmentation other than flips and, of maps, moves.
        features: of this process's images, from `compute_features`.
    """

    def __init__(self, batches: TrainBatches, features: Tensor):
        super().__init__(
            batches.split,
            batches.stats,
            batches.batch_size,
            augmentation=batches.augmentation,
            seed=batches.seed,
            side=batches.side,
            num_epochs=batches.num_epochs,
            part=batches.part,
        )
        self.num_variants = features.shape[1]
        self.read_from = features.flatten(0, 1)
        if features.ndim == 5:
            self.reach = _cells(batches.augmentation.translate, features.shape[2])

    def _own(self, draws: Draws, rows: Tensor) -> Tensor:
        rank, count = self.part
        return rows[draws.chosen[rows] % count == rank]

    def _load(self, draws: Draws, side: int) -> tuple[Tensor, Tensor]:
        labels = self.split.labels
        _, count = self.part
        rows = draws.chosen // count * self.num_variants + draws.flipped
        if self.begin_reading:
            self.begin_reading(rows)
        if self.read_from.ndim == 4:
            as_kept = torch.zeros_like(draws.flipped)
            x = gather(self.read_from, rows, as_kept, draws.shifts)
        else:
            x = self.read_from[rows]
        return _to(x, labels.device), labels[send(draws.chosen, labels.device)]


def cached(
    backbone: nn.Module, batches: TrainBatches, splits: Splits, precision: str, scratch: Path
) -> tuple[FeatureBatches, Validation | None]:
    """Batches of a frozen backbone's output, and that output of this process's validation images.

    Order and flips are those of `batches`; all else is as in `compute_features`.
    """
    features = compute_features(
        backbone,
        splits.train.images[launch.RANK :: launch.WORLD_SIZE],
        splits.stats,
        batches.side,
        precision,
        scratch,
        mirrored=batches.augmentation.flip != "none",
    )
    validation = None
    if splits.val:
        plain = compute_features(
            backbone,
            processes.own_part(splits.val.images),
            splits.stats,
            batches.side,
            precision,
            scratch,
            mirrored=False,
        )
        of_images = partial(feature_inputs, plain, splits.val.labels.device)
        validation = Validation(of_images, splits.val.labels)
    return FeatureBatches(batches, features), validation


def _cells(translate: int, side: int) -> int:
    """By how many cells maps of so many move, where images move by `translate` 32nds."""
    if translate == 0:
        return 0
    return min(max(pixels(translate, side), 1), side - 1)


def feature_inputs(features: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yields the plain variants of cached features, in order, as `engine.predict` takes them."""
    for part in features.split(500):
        yield _to(part[:, 0], device)


def _to(x: Tensor, device: torch.device) -> Tensor:
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2)  # channels_last in memory
    return send(x, device)
