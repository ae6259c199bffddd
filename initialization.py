"""The head start of airbench (Jordan 2024, arXiv:2404.00498) for a `CustomCNN`."""

import torch
from torch import Tensor, nn

from models import CustomCNN, Whitening


def initialize_from_images(model: CustomCNN, x: Tensor) -> None:
    """Fits the whitening, and lets every layer after it begin by passing its input on.

    Args:
        model: a network with a `Whitening`.
        x: normalised training images (N, 3, H, W); some thousands suffice.
    """
    whiten(model.features[0], x)
    begin_as_identity(model)
    fix_batchnorm_scales(model)


def whiten(layer: Whitening, x: Tensor, eps: float = 5e-4) -> None:
    """Fits the filters: the eigenvectors of patches' covariance over the root of their eigenvalues.

    Args:
        layer: changed in place.
        x: normalised images (N, 3, H, W); their mean is taken to be 0.
        eps: added to the eigenvalues, so that the noise in the weakest directions stays small.
    """
    side = layer.filters.shape[-1]
    size = 3 * side**2
    covariance, count = torch.zeros(size, size, dtype=torch.float64), 0
    for part in x.split(500):
        patches = part.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)
        patches = patches.reshape(-1, size)
        covariance += (patches.T @ patches).double()
        count += len(patches)
    eigenvalues, vectors = torch.linalg.eigh(covariance / count)
    filters = (vectors / (eigenvalues + eps).sqrt()).T.reshape(-1, 3, side, side)
    layer.filters.copy_(torch.cat([filters, -filters]))


def begin_as_identity(model: CustomCNN) -> None:
    """Lets every convolution and hidden linear layer pass its first inputs through (dirac).

    The whitened image reaches the deepest layer at once; outputs beyond the number of inputs keep
    their random weights.
    """
    convs = (module for module in model.features if isinstance(module, nn.Conv2d))
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
