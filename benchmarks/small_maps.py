"""What it gains to convolve small maps as matrix products (`runtime.amx`), on a CPU with AMX.

First layers alone, forwards and backwards, then the steps of whole jobs. Where there is no AMX the
jobs do not differ.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from runtime.amx import convolve
from runtime.device import now, prepare

# (images, channels in, channels out, side of the map)
LAYERS = [
    (128, 512, 512, 4),
    (128, 512, 512, 3),
    (512, 384, 512, 3),
    (512, 384, 512, 2),
    (1000, 256, 256, 3),
    (1000, 1024, 1024, 3),
    # Where the gradient of the weights alone is a product.
    (512, 256, 384, 5),
    (1000, 512, 1024, 5),
    # Where convolutions stay: larger maps, fewer channels.
    (512, 256, 384, 7),
    (128, 256, 256, 8),
    (512, 64, 64, 4),
]
JOBS = [
    "train_custom.py --recipe modern",
    "train_custom.py --recipe modern --small-first=",
    "train_custom.py --recipe speedrun",
    "train_custom.py --recipe best --network widest",
    "finetune.py --arch resnet18",
]


def channels_last(*shape: int) -> Tensor:
    """Random numbers in bf16 that want a gradient."""
    values = torch.randn(*shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    return values.requires_grad_()


def layer(images: int, channels: int, width: int, side: int) -> dict[str, float]:
    """Milliseconds of a layer's training step in bf16 in both ways, in turn; medians of ten."""
    cpu = torch.device("cpu")
    x = channels_last(images, channels, side, side)
    weight = channels_last(width, channels, 3, 3)
    ways = {"convolution": partial(F.conv2d, padding=1), "products": convolve}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(12):
        for way, convolution in ways.items():
            begin = now(cpu)
            y = convolution(x, weight)
            y.backward(y.detach())
            seconds[way].append(now(cpu) - begin)
    return {way: round(1000 * statistics.median(times[2:]), 1) for way, times in seconds.items()}


def layers() -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of every layer."""
    prepare()
    found = {}
    for shape in LAYERS:
        name = " ".join(str(number) for number in shape)
        found[name] = layer(*shape)
        print(name, found[name], flush=True)
    return {"milliseconds": found}


if __name__ == "__main__":
    common.compare(__file__, __doc__, {"products": False}, JOBS, layers)
