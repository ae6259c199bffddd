"""Which parameters are updated how: Adam, AdamW, SGD, and Muon."""

from typing import Any

import torch
from torch import Tensor, nn

MUON_LINEAR = 0.12  # learning rate of hidden linear layers, relative to the convolutions'


def parameter_groups(
    model: nn.Module,
    *,
    optimizer: str,
    weight_decay: float,
    bias_lr_scale: float = 1.0,
    muon_lr_scale: float = 1.0,
    lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for `make_optimizer`; empty groups are left out.

    Decay spares biases and BatchNorm: it would pull scales towards 0 without making the function
    any simpler. Only Adam, the original project's, decays everything, coupled to the loss; and with
    Muon biases shrink as fast as the classifier, whatever their rate. Muon steps all kernels and
    matrices but the last, the classifier's.

    Args:
        model: its parameters with `requires_grad`.
        optimizer: "adam", "adamw", "sgd" or "muon".
        weight_decay: of matrices and kernels.
        bias_lr_scale: learning rate of vectors (biases, BatchNorm), relative to the others'.
        muon_lr_scale: that of the convolutions, where Muon steps them.
        lr_scale: of this model as a whole.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in trained if p.ndim == 1]
    others = [p for p in trained if p.ndim > 1]
    inner = others[:-1] if optimizer == "muon" else []
    of_vectors = weight_decay if optimizer == "adam" else 0.0
    if optimizer == "muon" and bias_lr_scale:
        of_vectors = weight_decay / bias_lr_scale
    groups = [
        {"params": others[len(inner) :], "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": vectors, "weight_decay": of_vectors, "lr_scale": lr_scale * bias_lr_scale},
    ]
    for ndim, relative in ((4, muon_lr_scale), (2, muon_lr_scale * MUON_LINEAR)):
        turned = {"params": [p for p in inner if p.ndim == ndim], "lr_scale": lr_scale * relative}
        groups.append(turned | {"orthogonal": True, "momentum": 0.6})
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], kind: str, lr: float, precision: str
) -> torch.optim.Optimizer:
    """An optimiser over groups that carry `lr_scale`, torch's own as one fused kernel.

    Each skips a step when its `found_inf` (a tensor) is not 0; see `engine.train_step`.

    Args:
        groups: from `parameter_groups`.
        kind: "adam", "adamw", "sgd" (Nesterov) or "muon".
        lr: of a group whose `lr_scale` is 1.
        precision: "fp32" or "bf16", of Muon's matrix products.
    """
    if kind == "muon":
        return Muon(groups, lr, torch.bfloat16 if precision == "bf16" else torch.float32)
    if kind == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
        for parameter in (p for group in groups for p in group["params"]):
            # Torch makes it in the first step, but leaves it unset should that be skipped.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    # As a CUDA graph replays it, the step must not need a number that only Python has.
    on = {"fused": True, "capturable": groups[0]["params"][0].is_cuda}
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr, **on)
    # beta2 0.99 forgets fast enough for runs of a few thousand steps; Adam's own is 0.999.
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), **on)


class Muon(torch.optim.Optimizer):
    """Steps along the matrix nearest to a layer's momentum whose singular values are all about 1.

    So directions with small gradients learn as well (Jordan 2024, https://kellerjordan.github.io
    /posts/muon). As in airbench each kernel is also brought to one norm, the root of its outputs,
    which changes nothing in front of a BatchNorm and makes the learning rate a share of it.
    `torch.optim.Muon` does neither that nor convolutions. Groups that are not `orthogonal` take
    Nesterov's steps along the momentum itself.

    Args:
        groups: of parameters; those with `orthogonal` have two dimensions, or four.
        lr: learning rate.
        dtype: of the matrix products.
    """

    found_inf: Tensor  # not 0: this step is to change nothing

    def __init__(self, groups: list[dict[str, Any]], lr: float, dtype: torch.dtype):
        usual = {"lr": lr, "momentum": 0.85, "weight_decay": 0.0, "orthogonal": False}
        super().__init__(groups, usual)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter from its gradient."""
        skip = self.found_inf > 0
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                before, share = self.state[weight]["momentum"], group["momentum"]
                gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                momentum = before * share + gradient
                ahead, base = gradient.add(momentum, alpha=share), weight
                if group["orthogonal"]:
                    ahead = orthogonalize(ahead.flatten(1).to(self.dtype)).view(weight.shape)
                    if weight.ndim == 4:
                        base = weight * (len(weight) ** 0.5 / weight.norm())
                weight.copy_(torch.where(skip, weight, base - group["lr"] * ahead))
                before.copy_(torch.where(skip, before, momentum))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Brings the singular values of a matrix (M, N) towards 1 and keeps its singular vectors.

    Newton-Schulz iteration of Jordan's quintic, which is steep at 0: after three steps all but the
    smallest values lie between 0.7 and 1.2 or so, which is as good as 1 here.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x
