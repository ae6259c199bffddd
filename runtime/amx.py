"""Convolutions of small maps as matrix products, which processors with AMX compute faster.

oneDNN gives the matrix unit of such a processor a row of the map at a time, and short rows leave
most of it idle. As products of patches and weights a step of such a layer takes a sixth to four
fifths of the time (`benchmarks/small_maps.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to which side of the maps, pixels, products are the faster way
LARGEST = 4  # of the convolution itself: from 5 on it gains as much as patches cost
LARGEST_BACKWARD = 6  # of the gradient of its weights, which convolutions find at half the rate
FEWEST = 256  # channels: with fewer, copying the patches costs more than it saves
GEOMETRY = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


def cpu_features() -> dict[str, bool | int | str]:
    """What this processor has, such as "avx512_bf16"; nothing where torch, like 2.8, cannot say."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def as_products(model: nn.Module, precision: str, device: torch.device) -> None:
    """Replaces a model's 3x3 convolutions of many channels where products are the faster way.

    Parameters, their names and what is computed in float32 stay as they are.

    Args:
        model: changed in place; the convolutions are modules of it.
        precision: it trains in, "fp32" or "bf16".
        device: it trains on.
    """
    if device.type != "cpu" or precision != "bf16" or not cpu_features().get("amx_bf16"):
        return
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and _gains(module):
            model.set_submodule(name, SmallMapConv2d(module))


def _gains(conv: nn.Conv2d) -> bool:
    many = min(conv.in_channels, conv.out_channels) >= FEWEST
    return many and all(getattr(conv, key) == value for key, value in GEOMETRY.items())


class SmallMapConv2d(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1 that, in bf16, takes small maps as products.

    Args:
        conv: shares its parameters with this one.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, O, H, W)."""
        if max(x.shape[2:]) > LARGEST_BACKWARD or not torch.is_autocast_enabled("cpu"):
            return F.conv2d(x, self.weight, self.bias, padding=1)
        y = convolve(x.bfloat16(), self.weight.bfloat16())
        return y if self.bias is None else y + self.bias.bfloat16()[:, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _convolve(gradient, weight.transpose(0, 1).flip(2, 3))
        if ctx.needs_input_grad[1]:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, O)
            of_weight = (rows.T @ _patches(x)).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return of_x, of_weight


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(x, weight, padding=1)` of maps (B, C, H, W) and kernels (O, C, 3, 3), one dtype.

    Patches of the input times weights; the gradient of the input is the convolution of the
    gradient with the turned kernels, that of the weights the gradient times patches.
    """
    return _Convolution.apply(x, weight)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if max(height, width) > LARGEST:
        return F.conv2d(x, weight, padding=1)
    rows = _patches(x) @ weight.permute(2, 3, 1, 0).flatten(0, 2)
    return rows.unflatten(0, (len(x), height, width)).permute(0, 3, 1, 2)


def _patches(x: Tensor) -> Tensor:
    """The 3x3 surroundings of every pixel of (B, C, H, W): (B H W, 9 C), zeros beyond the edge."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    height, width = x.shape[2:]
    moved = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.cat(moved, 3).flatten(0, 2)
