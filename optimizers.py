"""Which parameters are updated how: Adam, AdamW, SGD, and Muon."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MUON_LINEAR = 0.12  # learning rate of hidden linear layers, relative to the convolutions'


def parameter_groups(
    model: nn.Module,
    *,
    optimizer: str,
    classifier: nn.Module,
    weight_decay: float,
    bias_lr_scale: float = 1.0,
    muon_lr_scale: float = 1.0,
    lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for `make_optimizer`; empty groups are left out.

    Decay spares biases and BatchNorm: it would pull scales towards 0 without making the function
    any simpler. There are two exceptions. Adam decays every parameter, by adding to the gradient.
    With Muon the decay of biases is divided by their `bias_lr_scale`, so that they shrink as fast
    as the classifier. Muon steps all kernels and matrices but the classifier's.

    Args:
        model: its parameters with `requires_grad`.
        optimizer: "adam", "adamw", "sgd" or "muon".
        classifier: the layer whose outputs are the logits; it need not be in `model`.
        weight_decay: of matrices and kernels.
        bias_lr_scale: learning rate of vectors (biases, BatchNorm), relative to the others'.
        muon_lr_scale: that of the convolutions, where Muon steps them.
        lr_scale: of this model as a whole.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in trained if p.ndim == 1]
    plain = [p for p in trained if p.ndim > 1]
    kernels = []
    matrices = []
    if optimizer == "muon":
        hidden = [p for p in plain if p is not classifier.weight]
        plain = [p for p in plain if p is classifier.weight]
        kernels = [p for p in hidden if p.ndim > 2]
        matrices = [p for p in hidden if p.ndim == 2]
    vector_decay = 0.0
    if optimizer == "adam":
        vector_decay = weight_decay
    elif optimizer == "muon" and bias_lr_scale > 0:
        vector_decay = weight_decay / bias_lr_scale
    groups = [
        {"params": plain, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": vectors, "weight_decay": vector_decay, "lr_scale": lr_scale * bias_lr_scale},
        {
            "params": kernels,
            "lr_scale": lr_scale * muon_lr_scale,
            "orthogonal": True,
            "momentum": 0.6,
        },
        {
            "params": matrices,
            "lr_scale": lr_scale * (muon_lr_scale * MUON_LINEAR),
            "orthogonal": True,
            "momentum": 0.6,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], kind: str, lr: float, precision: str
) -> torch.optim.Optimizer:
    """An optimiser over groups that carry `lr_scale`, torch's own as one fused kernel.

    Each skips a step when its `found_inf` (a tensor) is not 0; see `engine.train_step`.

    Args:
        groups: from `parameter_groups`.
        kind: "adam", "adamw", "sgd" (Nesterov) or "muon".
        lr: to begin with, of a group whose `lr_scale` is 1; `engine.train_step` sets each step's.
        precision: "fp32" or "bf16", of Muon's matrix products.
    """
    if kind == "muon":
        return Muon(groups, lr, torch.bfloat16 if precision == "bf16" else torch.float32)
    if kind == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
        for group in groups:
            for parameter in group["params"]:
                # Torch makes it in the first step, but leaves it unset should that be skipped.
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    # As a CUDA graph replays it, the step must not need a number that only Python has.
    on_gpu = groups[0]["params"][0].is_cuda
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=on_gpu)
    # beta2 0.99 forgets fast enough for runs of a few thousand steps; Adam's own is 0.999.
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True, capturable=on_gpu)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores an optimiser's state, which may have been saved on another kind of device.

    Args:
        optimizer: from `make_optimizer`.
        state: from the `state_dict` of one like it. Whether a CUDA graph can replay its steps is
            not taken from there: that belongs to the device.
    """
    capturable = [group.get("capturable") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, here in zip(optimizer.param_groups, capturable, strict=True):
        if here is not None:
            group["capturable"] = here


class Muon(torch.optim.Optimizer):
    """Steps along the matrix nearest to a layer's momentum whose singular values are all about 1.

    So directions with small gradients learn as well (Jordan 2024, https://kellerjordan.github.io
    /posts/muon). As in airbench each kernel is also brought to one norm, the root of its outputs,
    which changes nothing in front of a BatchNorm and makes the learning rate a share of it.
    `torch.optim.Muon` does neither that nor convolutions. Groups that are not `orthogonal` take
    Nesterov's steps along the momentum itself.

    Args:
        groups: of parameters; those with `orthogonal` have two dimensions or more.
        lr: learning rate.
        dtype: of the matrix products.
    """

    # As with torch's fused optimisers: where it is set and not 0, a step changes nothing.
    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # the name by which torch knows that

    def __init__(self, groups: list[dict[str, Any]], lr: float, dtype: torch.dtype):
        defaults = {"lr": lr, "momentum": 0.85, "weight_decay": 0.0, "orthogonal": False}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter from its gradient; those without one stay.

        Args:
            closure: computes the loss and the gradients anew, as torch's optimisers take it.

        Returns:
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        old = state["momentum"]
        gradient = weight.grad.add(weight, alpha=group["weight_decay"])
        momentum = old * group["momentum"] + gradient
        direction = gradient.add(momentum, alpha=group["momentum"])  # Nesterov's
        base = weight
        if group["orthogonal"]:
            matrix = direction.flatten(1).to(self.dtype)
            direction = orthogonalize(matrix).view(weight.shape)
            if weight.ndim > 2:
                base = weight * (len(weight) ** 0.5 / weight.norm())
        moved = base - group["lr"] * direction
        if self.found_inf is not None:
            skip = self.found_inf > 0
            moved = torch.where(skip, weight, moved)
            momentum = torch.where(skip, old, momentum)
        weight.copy_(moved)
        old.copy_(momentum)


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
