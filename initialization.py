"""The head start of airbench (Jordan 2024, arXiv:2404.00498) for a `CustomCNN`."""

import torch
from torch import Tensor, nn

from models import CustomCNN


def initialize_from_images(model: CustomCNN, x: Tensor) -> None:
    """Lets the first convolution whiten image patches, and all that follows begin by passing it on.

    Args:
        model: a network whose first convolution has at most 54 filters, an even number.
        x: normalised training images (N, 3, H, W); some thousands suffice.
    """
    whiten(model, x)
    begin_as_identity(model)
    fix_batchnorm_scales(model)


def whiten(model: CustomCNN, x: Tensor, eps: float = 5e-4) -> None:
    """Makes the first convolution and its BatchNorm whiten 3x3 patches, and freezes both.

    The filters are the eigenvectors of the patches' covariance over the root of their eigenvalues,
    the strongest directions, each with both signs: the activation that follows would lose half.
    Where nothing of a layer trains, no gradient is computed for what comes before the next one.

    Args:
        model: changed in place.
        x: normalised images (N, 3, H, W).
        eps: added to the eigenvalues, so that the noise in the weakest directions stays small.
    """
    covariance, count = torch.zeros(27, 27, dtype=torch.float64), 0
    for part in x.split(500):
        patches = part.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        covariance += (patches.T @ patches).double()
        count += len(patches)
    eigenvalues, vectors = torch.linalg.eigh(covariance / count)
    filters = (vectors / (eigenvalues + eps).sqrt()).T.flip(0)  # strongest direction first
    conv = model.features[0]
    filters = filters[: conv.out_channels // 2].reshape(-1, 3, 3, 3).to(conv.weight)
    number, norm = next(
        (number, layer)
        for number, layer in enumerate(model.features)
        if isinstance(layer, nn.BatchNorm2d)
    )
    momentum, norm.momentum = norm.momentum, None  # None averages over all batches
    with torch.no_grad():
        conv.weight.copy_(torch.cat([filters, -filters]))
        for part in x.split(500):
            model.features[: number + 1](part)
    norm.momentum = momentum
    conv.weight.requires_grad_(False)
    norm.bias.requires_grad_(False)


def begin_as_identity(model: CustomCNN) -> None:
    """Lets every other convolution and hidden linear layer pass its first inputs through (dirac).

    The whitened image reaches the deepest layer at once; outputs beyond the number of inputs keep
    their random weights.
    """
    _, *convs = (module for module in model.features if isinstance(module, nn.Conv2d))
    *hidden, _ = (module for module in model.head if isinstance(module, nn.Linear))
    with torch.no_grad():
        for conv in convs:
            nn.init.dirac_(conv.weight[: conv.in_channels])
        for linear in hidden:
            nn.init.eye_(linear.weight[: linear.in_features])


def fix_batchnorm_scales(model: nn.Module) -> None:
    """Leaves the scales of BatchNorm at 1: the weights that follow can express them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.requires_grad_(False)
