"""What it gains to convolve small maps as matrix products (`runs.small_maps`), on a CPU with AMX.

First layers alone, forwards and backwards, then the steps of whole jobs. Where there is no AMX the
jobs do not differ.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

from benchmarks import common
from runs.device import now, prepare
from runs.records import CPU
from runs.small_maps import SmallMapConv2d

# (images, channels in, channels out, side of the map)
LAYERS = [
    *((128, 128, 128, 16), (128, 256, 256, 8), (128, 512, 512, 4), (128, 512, 512, 3)),
    *((512, 384, 512, 3), (512, 384, 512, 2), (1000, 256, 256, 3), (1000, 1024, 1024, 3)),
]
RECIPES = "modern", "modern --small-first=", "speedrun", "best"
JOBS = [f"train_custom.py --recipe {recipe}" for recipe in RECIPES]
JOBS += [f"finetune.py --arch {arch}" for arch in ("resnet18", "resnet50")]


def layer(images: int, channels: int, width: int, side: int) -> dict[str, float]:
    """Milliseconds of a layer's training step in bf16 in both ways, in turn; medians of ten."""
    x = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last)
    x.requires_grad_()
    seconds: dict[type[nn.Conv2d], list[float]] = {nn.Conv2d: [], SmallMapConv2d: []}
    layers = {kind: kind(channels, width, 3, padding=1, bias=False) for kind in seconds}
    for _ in range(12):
        for kind, conv in layers.items():
            conv.to(memory_format=torch.channels_last)
            begin = now(CPU)
            with torch.autocast("cpu", torch.bfloat16):
                y = conv(x)
            y.backward(y.detach())
            seconds[kind].append(now(CPU) - begin)
    ways = zip(("convolution", "products"), seconds.values(), strict=True)
    return {way: round(1000 * statistics.median(times[2:]), 1) for way, times in ways}


def main() -> None:
    """The command line; the layers' figures stand beside the jobs'."""
    layers = {}
    if "--only" not in sys.argv:
        prepare()
        for shape in LAYERS:
            layers[" ".join(map(str, shape))] = found = layer(*shape)
            print(shape, found, flush=True)
    common.with_and_without(__file__, __doc__, "as_products", JOBS, milliseconds=layers)


if __name__ == "__main__":
    main()
