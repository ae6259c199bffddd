"""Which parameters are updated how: Adam, AdamW, and Muon for the convolutions."""

from typing import Any

import torch
from torch import Tensor, nn

from config import TrainConfig

MUON_MOMENTUM = 0.6


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups the trainable parameters for `make_optimizer`.

    With AdamW, decay spares biases and BatchNorm: it would pull scales towards 0 without making the
    function any simpler. Adam is the original project's: decay, coupled, on everything.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    muon = [p for p in trained if p.ndim == 4 and config.optimizer == "muon"]
    vectors = [p for p in trained if p.ndim == 1]
    matrices = [p for p in trained if p.ndim > 1 and not (muon and p.ndim == 4)]
    decay = config.weight_decay
    groups = [
        {"params": matrices, "weight_decay": decay, "lr_scale": 1.0},
        {
            "params": vectors,
            "weight_decay": decay if config.optimizer == "adam" else 0.0,
            "lr_scale": config.bias_lr_scale,
        },
        {"params": muon, "lr_scale": config.muon_lr / config.lr, "momentum": MUON_MOMENTUM},
    ]
    return [group for group in groups if group["params"]]


class MuonAdamW:
    """Muon for the convolutions, AdamW for everything else, with the interface of an optimizer.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) steps not along a layer's momentum
    but along the matrix nearest to it whose singular values are all about 1, so that directions
    with small gradients learn as well. As in airbench the layer is also brought to one norm, the
    root of its outputs, which changes nothing in front of a BatchNorm and makes the learning rate
    a share of it. `torch.optim.Muon` does neither that nor convolutions.

    Args:
        convolutions: the group whose parameters (O, I, H, W) Muon takes.
        adamw: over the other groups.
        dtype: of Muon's matrix products.
    """

    found_inf: Tensor  # not 0: this step is to change nothing; see `engine.train_step`

    def __init__(self, convolutions: dict[str, Any], adamw: torch.optim.AdamW, dtype: torch.dtype):
        self.convolutions = {"lr": convolutions["lr_scale"] * adamw.defaults["lr"], **convolutions}
        self.adamw, self.dtype = adamw, dtype
        self.momenta = [torch.zeros_like(p) for p in convolutions["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, whose `lr` may be set."""
        return [*self.adamw.param_groups, self.convolutions]

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter from its gradient."""
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        lr, share = self.convolutions["lr"], self.convolutions["momentum"]
        for weight, momentum in zip(self.convolutions["params"], self.momenta, strict=True):
            momentum.mul_(share).add_(weight.grad)
            ahead = weight.grad.add(momentum, alpha=share)  # Nesterov's
            direction = orthogonalize(ahead.flatten(1).to(self.dtype)).view(weight.shape)
            moved = weight * (len(weight) ** 0.5 / weight.norm()) - lr * direction
            weight.copy_(torch.where(self.found_inf > 0, weight, moved))

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"adamw": self.adamw.state_dict(), "momenta": self.momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.adamw.load_state_dict(state["adamw"])
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """Brings the singular values of a matrix towards 1 and keeps its singular vectors.

    Newton-Schulz iteration of Jordan's quintic, which is steep at 0: after three steps all but the
    smallest values lie between 0.7 and 1.2 or so, which is as good as 1 here.

    Args:
        matrix: (M, N), of the dtype to compute in.
        steps: of the iteration.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T, steps).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


def make_optimizer(
    groups: list[dict[str, Any]], config: TrainConfig, precision: str
) -> torch.optim.Optimizer | MuonAdamW:
    """The configured optimizer over groups that carry `lr_scale`, Adam's as one fused kernel.

    Args:
        groups: from `parameter_groups`.
        config: `optimizer` and `lr`.
        precision: "fp32" or "bf16", of Muon's matrix products.
    """
    # As a CUDA graph replays it, the step must not need a number that only Python has.
    on = {"fused": True, "capturable": groups[0]["params"][0].is_cuda}
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, **on)
    muon = [group for group in groups if "momentum" in group]
    others = [group for group in groups if "momentum" not in group]
    # beta2 0.99 forgets fast enough for runs of a few thousand steps; Adam's own is 0.999.
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), **on)
    if not muon:
        return adamw
    return MuonAdamW(*muon, adamw, torch.bfloat16 if precision == "bf16" else torch.float32)
