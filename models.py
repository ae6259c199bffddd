"""The networks: the nine-layer CNN, built from plain settings that a checkpoint can carry."""

from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class CustomCNN(nn.Module):
    """Nine layers: six 3x3 convolutions in three pairs, BatchNorm after each, then three linear.

    The defaults are the tutorial shape: each pair doubles the width and ends in a 2x2 max-pool.
    What counts on a CPU is accuracy per multiplication, and nearly all multiplications are in the
    convolutions, so the `modern` recipe pools earlier and spends them on width: see `MODERN`. The
    last map is reduced by a global max-pool, which keeps the linear layers small: a flattened
    4x4 map would put half of all parameters into the first of them.

    Args:
        widths: output channels of the six convolutions.
        pool_after: the convolutions, counted from 1, that a 2x2 max-pool follows (before BatchNorm,
            so that normalisation and activation see a quarter of the values).
        hidden: widths of the first two linear layers.
        num_classes: width of the third.
        activation: "relu" or "gelu".
        bn_momentum: weight of the newest batch in BatchNorm's running statistics.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128),
        pool_after: tuple[int, ...] = (2, 4, 6),
        hidden: tuple[int, int] = (256, 128),
        num_classes: int = 10,
        activation: str = "relu",
        bn_momentum: float = 0.1,
    ):
        super().__init__()
        act = ACTIVATIONS[activation]
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((3, *widths), widths, strict=False), start=1):
            layers.append(nn.Conv2d(before, width, 3, padding=1, bias=False))
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width, momentum=bn_momentum), act()]
        self.features = nn.Sequential(*layers)  # (B, 3, 32, 32) -> (B, widths[-1], 4, 4)
        self.pool = nn.AdaptiveMaxPool2d(1)  # -> (B, widths[-1], 1, 1)
        first, second = hidden
        self.head = nn.Sequential(
            nn.Linear(widths[-1], first, bias=False),
            nn.BatchNorm1d(first, momentum=bn_momentum),
            act(),
            nn.Linear(first, second, bias=False),
            nn.BatchNorm1d(second, momentum=bn_momentum),
            act(),
            nn.Linear(second, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, 32, 32) to logits (B, num_classes)."""
        return self.head(self.pool(self.features(x)).flatten(1))


# Pooling after convolutions 1, 3 and 5 leaves the wide layers maps of 16, 8 and 4 pixels: 132
# million multiplications an image, three times the tutorial shape's, for a far better network.
MODERN = {
    "widths": (54, 64, 256, 256, 256, 256),
    "pool_after": (1, 3, 5),
    "activation": "relu",
    "bn_momentum": 0.4,
}
ARCHS = {"custom_cnn": CustomCNN}


def create_model(arch: str, surgery: dict[str, Any]) -> nn.Module:
    """Builds a network with random weights from what a checkpoint says of it.

    Args:
        arch: a key of `ARCHS`.
        surgery: keyword arguments of its builder.

    Raises:
        ValueError: the architecture or one of the settings is unknown.
    """
    if arch not in ARCHS:
        raise ValueError(f"architecture {arch!r} is unknown: choose from {', '.join(ARCHS)}")
    try:
        return ARCHS[arch](**surgery)
    except TypeError as error:
        raise ValueError(f"settings {surgery} do not fit architecture {arch}: {error}") from error


def num_parameters(model: nn.Module) -> dict[str, int]:
    """Counts parameters: all of them, and those that train."""
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def initialize_from_images(model: CustomCNN, x: Tensor, eps: float = 5e-4) -> None:
    """Gives a `CustomCNN` the head start of airbench (Jordan 2024, arXiv:2404.00498).

    The first convolution whitens 3x3 patches: its filters are the eigenvectors of the patches'
    covariance over the root of their eigenvalues, each with both signs, and stay as they are. The
    other convolutions begin as partial identities (dirac), so that the whitened image reaches the
    deepest layer at once. BatchNorm scales stay 1; the following weights can express them.

    Args:
        model: a network whose first convolution has at most 54 filters, an even number.
        x: normalised training images (N, 3, H, W); some thousands suffice.
        eps: added to the eigenvalues, so that the noise in the weakest directions stays small.
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    patches = x.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27).double()
    eigenvalues, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (eigenvalues + eps).sqrt()).T.flip(0)  # strongest direction first
    first, *others = convs
    filters = filters[: first.out_channels // 2].reshape(-1, 3, 3, 3).to(first.weight)
    with torch.no_grad():
        first.weight.copy_(torch.cat([filters, -filters]))
        for conv in others:
            nn.init.dirac_(conv.weight[: conv.in_channels])
    first.weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.requires_grad_(False)
