"""The output of a frozen trunk, computed once for every image and its mirror image."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compute import forward
from data import Augmentation, Split, TrainBatches, normalize, send


@torch.inference_mode()
def compute_features(
    trunk: nn.Module,
    images: Tensor,
    mean: list[float],
    std: list[float],
    precision: str,
    scratch: Path,
    mirrored: bool = True,
    batch_size: int = 100,
) -> Tensor:
    """Runs a frozen trunk over all images, plain and mirrored.

    A frozen trunk in eval mode is a fixed function, and with flips as the only augmentation an
    image has two variants: what takes most of a step's time needs computing only twice an image.

    Args:
        trunk: put into eval mode here.
        images: (N, 32, 32, 3) uint8 on the trunk's device.
        mean: channel means the trunk was trained with.
        std: the deviations.
        precision: "fp32" or "bf16", of the computation.
        scratch: beside which path, and named after it, the features go, memory-mapped, when they
            would not fit in memory.
        mirrored: whether the mirrored variant is wanted too.
        batch_size: images at a time.

    Returns:
        (N, 2, ...) bfloat16, variant 1 mirrored, or (N, 1, ...); on the CPU.

    Raises:
        OSError: they fit neither in memory nor on the disk.
    """
    trunk.eval()
    shape = forward(trunk, normalize(images[:1], mean, std), precision).shape[1:]
    features = _allocate((len(images), 1 + mirrored, *shape), scratch)
    with tqdm(total=len(images), desc="features", unit="img", disable=None, leave=False) as bar:
        for start in range(0, len(images), batch_size):
            x = normalize(images[start : start + batch_size], mean, std)
            for variant, view in enumerate((x, x.flip(3))[: 1 + mirrored]):
                features[start : start + len(x), variant] = forward(trunk, view, precision)
            bar.update(len(x))
    return features


def _allocate(shape: tuple[int, ...], scratch: Path) -> Tensor:
    size = 2 * torch.Size(shape).numel()
    free = available_memory()
    on_disk = size > free / 2
    place = f"a file in {scratch.parent}/" if on_disk else "memory"
    both = ", plain and mirrored" if shape[1] == 2 else ""
    print(f"features of {shape[0]:,} images{both}: {size / 1e6:,.0f} MB in {place}", flush=True)
    if not on_disk:
        return torch.empty(shape, dtype=torch.bfloat16)
    # Named as a temporary file of the run: what is left of it is swept away with the others.
    handle, name = tempfile.mkstemp(prefix=f".{scratch.name}.", suffix=".tmp", dir=scratch.parent)
    try:
        try:
            features = torch.from_file(name, True, size // 2, dtype=torch.bfloat16).view(shape)
        finally:
            with suppress(PermissionError):  # Windows keeps what is mapped
                os.unlink(name)  # the mapping keeps the bytes alive
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk shows now, not as a crash later
        return features
    except OSError as error:
        raise OSError(
            f"{size / 1e9:.1f} GB of features fit neither in memory nor in {scratch.parent}/ "
            f"({error}): add --no-cache, or take a smaller --image-size or another "
            "--checkpoint-dir"
        ) from error
    finally:
        os.close(handle)


def available_memory() -> float:
    """Bytes that can be allocated without swapping; where the system does not say, a guess."""
    limits = []
    with suppress(OSError, ValueError):  # a container's own limit; "max" where there is none
        group = Path("/sys/fs/cgroup")
        used = (group / "memory.stat").read_text().split()[1]  # "anon", what no file holds too
        limits.append(int((group / "memory.max").read_text()) - int(used))
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    if not limits and hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=4e9)


class FeatureBatches(TrainBatches):
    """Batches of cached features, in the order and with the flips `TrainBatches` gives images."""

    def __init__(
        self,
        features: Tensor,
        split: Split,
        batch_size: int,
        flip: str,
        seed: int,
        dtype: torch.dtype,
    ):
        super().__init__(split, batch_size, [], [], Augmentation(flip), seed)
        self.features, self.dtype = features, dtype

    def _load(
        self, chosen: Tensor, flipped: Tensor, shifts: Tensor, holes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.features[chosen, flipped.long()]
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        device = self.split.labels.device
        return send(x, device).to(self.dtype), self.split.labels[send(chosen, device)]


@torch.inference_mode()
def predict_features(
    model: nn.Module, features: Tensor, precision: str, dtype: torch.dtype
) -> Tensor:
    """Logits (N, C) float32 on the CPU from the plain variants of cached features."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat(
        [
            forward(model, part[:, 0].to(device, dtype), precision).cpu()
            for part in features.split(500)
        ]
    )
