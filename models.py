"""The nine-layer CNN and how it begins; every network by its name."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Whitening(nn.Module):
    """Rotates and scales the input's patches so that their values are uncorrelated.

    It is to patches what the division by the standard deviation is to channels: measured on the
    training images (`whiten`) and kept with the checkpoint. The filters never train. Until they are
    measured, the patches come out as they are.

    Args:
        side: of the square patches, pixels.
        biased: add a bias that trains.
    """

    def __init__(self, side: int, biased: bool = False):
        super().__init__()
        # Both signs of each direction: the activation that follows would lose half of one.
        filters = torch.eye(3 * side**2).reshape(-1, 3, side, side)
        self.register_buffer("filters", torch.cat([filters, -filters]))
        self.bias = nn.Parameter(torch.zeros(6 * side**2)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to (B, 6 side^2, H - side + 1, W - side + 1)."""
        return F.conv2d(x, self.filters, self.bias)


class Residual(nn.Sequential):
    """Adds to its input what its layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C) to (B, C)."""
        return x + super().forward(x)


class CustomCNN(nn.Module):
    """Nine layers: six 3x3 convolutions in three pairs, BatchNorm after each, then three linear.

    The defaults are the tutorial shape: each pair doubles the width and ends in a 2x2 max-pool.
    What counts on a CPU is accuracy per multiplication, and nearly all multiplications are in the
    convolutions, so the other shapes pool earlier and spend them on width: see `NETWORKS`. The last
    map is reduced by a global max-pool, which keeps the linear layers small, and lets images of any
    size in: a flattened 4x4 map would put half of all parameters into the first of them.

    Args:
        widths: output channels of the six convolutions.
        pool_after: the convolutions, counted from 1, that a 2x2 max-pool follows (before BatchNorm,
            so that normalisation and activation see a quarter of the values).
        hidden: widths of the first two linear layers; with `residual` the first alone counts.
        num_classes: width of the third.
        activation: "relu" or "gelu".
        whitened: side of the patches that a fixed layer, with an activation of its own, whitens
            before the nine layers; 0 for none.
        biased: let that layer add a bias that trains.
        momentum: share of the newest batch in BatchNorm's running statistics.
        residual: let the first two linear layers add to the features instead of replacing them,
            `hidden[0]` wide in between: they fit the training images less closely.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128),
        pool_after: tuple[int, ...] = (2, 4, 6),
        hidden: tuple[int, int] = (256, 128),
        num_classes: int = 10,
        activation: str = "relu",
        whitened: int = 0,
        biased: bool = False,
        momentum: float = 0.1,
        residual: bool = False,
    ):
        super().__init__()
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
        layers: list[nn.Module] = []
        channels = 3
        if whitened:
            layers += [Whitening(whitened, biased), act()]
            channels = 6 * whitened**2
        for number, width in enumerate(widths, start=1):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            channels = width
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width, momentum=momentum), act()]
        self.features = nn.Sequential(*layers)  # (B, 3, 32, 32) -> (B, widths[-1], 4, 4)
        self.pool = nn.AdaptiveMaxPool2d(1)  # -> (B, widths[-1], 1, 1)
        first = hidden[0]
        second = channels if residual else hidden[1]  # what is added is as wide as the features
        layers = [
            nn.Linear(channels, first, bias=False),
            nn.BatchNorm1d(first, momentum=momentum),
            act(),
            nn.Linear(first, second, bias=False),
        ]
        if residual:
            classifier = nn.Linear(second, num_classes, bias=False)
            self.head = nn.Sequential(Residual(*layers), classifier)
        else:
            layers += [nn.BatchNorm1d(second, momentum=momentum), act()]
            self.head = nn.Sequential(*layers, nn.Linear(second, num_classes))
        self.classifier_name = f"head.{len(self.head) - 1}"

    @property
    def classifier(self) -> nn.Linear:
        """The layer whose outputs are the logits."""
        return self.get_submodule(self.classifier_name)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to logits (B, num_classes)."""
        return self.head(self.pool(self.features(x)).flatten(1))


# The pool stands early in each pair: the wide convolutions see maps of 15, 7, 7 and 3 pixels, the
# widest the smallest. A 2x2 colour patch has twelve directions: 24 channels.
_EARLY_POOLING = {
    "pool_after": (1, 3, 5),
    "activation": "gelu",
    "whitened": 2,
    "biased": True,
    "residual": True,
    "hidden": (512, 128),
}
# Keyword arguments of `CustomCNN`, by the network's name
NETWORKS: dict[str, dict[str, Any]] = {
    "tutorial": {},  # 39 million multiplications an image of 32x32
    "slim": {"widths": (64, 64, 256, 256, 256, 256), **_EARLY_POOLING},  # 118 million
    "wide": {"widths": (64, 64, 256, 256, 384, 512), **_EARLY_POOLING},  # 144 million
    "wider": {"widths": (128, 128, 384, 384, 384, 384), **_EARLY_POOLING},  # 302 million
    "widest": {"widths": (128, 128, 512, 512, 1024, 1024), **_EARLY_POOLING},  # 626 million
}


def begin_from_images(model: CustomCNN, x: Tensor) -> None:
    """Gives a network with a `Whitening` the head start of airbench (Jordan, arXiv:2404.00498).

    Args:
        model: changed in place.
        x: normalised training images (N, 3, H, W); some thousands suffice.
    """
    whiten(model.features[0], x)
    begin_as_identity(model)
    fix_batchnorm_scales(model)


# Variance of a direction, relative to the largest one, below which it hardly occurs. The weakest of
# CIFAR-10's has 6e-5; the colours of grey pictures have 0, or 2e-5 where they carry a little noise.
FAINT = 4e-5


def whiten(layer: Whitening, x: Tensor, eps: float = 5e-4) -> None:
    """Fits the filters: the eigenvectors of patches' covariance over the root of their eigenvalues.

    Directions that hardly occur (`FAINT`) are left out: nothing was learned of them, and a network
    of grey pictures would see little but the tint of one that has some.

    Args:
        layer: changed in place.
        x: normalised images (N, 3, H, W); their mean is taken to be 0.
        eps: added to the eigenvalues, so that the noise in the weakest directions stays small.
    """
    side = layer.filters.shape[-1]
    size = 3 * side**2
    covariance = torch.zeros(size, size, dtype=torch.float64)
    count = 0
    for part in x.split(500):
        patches = part.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)
        patches = patches.reshape(-1, size)
        covariance += (patches.T @ patches).double()
        count += len(patches)
    eigenvalues, vectors = torch.linalg.eigh(covariance / count)
    filters = vectors / (eigenvalues.clamp(min=0) + eps).sqrt()
    filters[:, eigenvalues < FAINT * eigenvalues.max()] = 0
    filters = filters.T.reshape(-1, 3, side, side)
    layer.filters.copy_(torch.cat([filters, -filters]))


def begin_as_identity(model: CustomCNN) -> None:
    """Lets convolutions pass their first inputs through (dirac) and residual layers add nothing.

    So the whitened image reaches the classifier at once; outputs beyond the number of inputs keep
    their random weights.
    """
    with torch.no_grad():
        for layer in model.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight[: layer.in_channels])
        if isinstance(model.head[0], Residual):
            nn.init.zeros_(model.head[0][-1].weight)
            classifier = model.classifier
            nn.init.normal_(classifier.weight, std=1 / classifier.in_features)


def fix_batchnorm_scales(model: nn.Module) -> None:
    """Leaves the scales of BatchNorm at 1: the weights that follow can express them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.requires_grad_(False)


def create_model(
    arch: str, arguments: dict[str, Any], num_classes: int, device: str = "cpu"
) -> nn.Module:
    """Builds a network with random weights from what a checkpoint says of it.

    Args:
        arch: "custom_cnn" or a key of `pretrained.ARCHS`.
        arguments: keyword arguments of `CustomCNN` or `pretrained.PretrainedNetwork`.
        num_classes: width of the last layer.
        device: where its weights lie; "meta" takes neither memory nor random numbers.

    Raises:
        ValueError: the architecture or one of the arguments is unknown.
    """
    try:
        if arch == "custom_cnn":
            with torch.device(device):
                return CustomCNN(**arguments, num_classes=num_classes)
        # torchvision takes seconds to import, and torch 2.8 cannot do so where a device is set.
        from pretrained import ARCHS, PretrainedNetwork

        if arch in ARCHS:
            with torch.device(device):
                return PretrainedNetwork(arch, **arguments, num_classes=num_classes)
    except (TypeError, LookupError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"arguments {arguments} do not fit architecture {arch}: {error}"
        ) from error
    raise ValueError(f"architecture {arch!r} is unknown: choose custom_cnn or {', '.join(ARCHS)}")
