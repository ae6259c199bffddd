"""Where in a picture a network found what it took the picture for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CustomCNN


def heat_maps(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """How much each place of the last maps speaks for a class: gradient times activation.

    The maps are those that the pooling before the classifier reads. Their values times the gradient
    of the class's logit are summed over the channels, and what speaks against the class is 0. Where
    the pooling takes the mean, the gradient is the same everywhere and this is Grad-CAM (Selvaraju
    et al. 2017, arXiv:1610.02391). Where it takes the maximum, the one place that counts in each
    channel has all of its gradient; Grad-CAM would spread it over places without influence
    (Draelos and Carin 2020, arXiv:2011.08891).

    Args:
        model: in eval mode; every network of `models.create_model`.
        x: normalised images (B, 3, S, S).
        classes: (B,) int64.

    Returns:
        (B, S, S) float32 in [0, 1] on the CPU, enlarged from the maps; each picture's peak is 1, or
        all is 0 where nothing speaks for the class.
    """
    pooling = model.pool if isinstance(model, CustomCNN) else model.network.avgpool
    maps: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps.append(inputs[0])

    hook = pooling.register_forward_pre_hook(note)
    with torch.enable_grad():
        # Frozen weights need no gradient, but then the maps must have one from their beginning.
        logits = model(x.clone().requires_grad_(True))
        hook.remove()
        (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)
    heat = (gradients * maps[0].detach()).sum(1, keepdim=True).clamp(min=0)  # (B, 1, h, w)
    heat = F.interpolate(heat, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    peaks = heat.amax((1, 2), keepdim=True)
    return (heat / peaks.clamp(min=torch.finfo(heat.dtype).tiny)).cpu()
