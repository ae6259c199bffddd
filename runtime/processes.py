"""One training over several processes: which one this is, and what they do together.

`torchrun` starts them, lets them find each other and restarts them; torch.distributed moves the
numbers. Without torchrun there is one process, and everything here costs nothing.
"""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from errors import UnusableInput
from runtime.launch import LOCAL_RANK, LOCAL_WORLD_SIZE, RANK, WORLD_SIZE

T = TypeVar("T")

PATIENCE = timedelta(minutes=5)  # a process that hears nothing from another so long gives up

# Numbers of the CPU (signals, logits) travel by gloo beside a GPU's gradients.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
_times = itertools.count()  # that this process has joined others


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes while the block runs; yields the device of this one.

    When one fails, all end: on each machine the first to notice says why, the others end silently.

    Raises:
        UnusableInput: several processes cannot train on such a device, or more than there are.
    """
    if WORLD_SIZE == 1:
        if device.type != "cpu" and device.index is not None:
            # What is made without naming a device goes to this one.
            torch.accelerator.set_device_index(device.index)
        yield device
        return
    if device.type not in BACKENDS or device.index is not None:
        raise UnusableInput(
            f"--device {device}: each of several processes takes one of its machine's devices; "
            f"choose {', '.join(BACKENDS)}, or run without torchrun"
        )
    if device.type != "cpu":
        count = torch.accelerator.device_count()
        if count < LOCAL_WORLD_SIZE:
            raise UnusableInput(
                f"--device {device}: this machine has {count} for {LOCAL_WORLD_SIZE} processes; "
                "take a smaller --nproc-per-node"
            )
        device = torch.device(device.type, LOCAL_RANK)
        torch.accelerator.set_device_index(LOCAL_RANK)
    store, _, _ = next(dist.rendezvous("env://", RANK, WORLD_SIZE, timeout=PATIENCE))
    # What an earlier attempt left in the store would send this one to processes that are dead.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    store = dist.PrefixStore(f"attempt {attempt}, {next(_times)}", store)
    try:
        with losses_told():
            dist.init_process_group(
                BACKENDS[device.type],
                store=store,
                rank=RANK,
                world_size=WORLD_SIZE,
                timeout=PATIENCE,
            )
            yield device
    except UnusableInput:  # raised in every process alike, see `agreed`
        dist.destroy_process_group()
        raise
    except Exception as error:
        first = _first_to_fail(store)
        if not first and isinstance(error, OSError | RuntimeError | ArithmeticError | MemoryError):
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()  # not after a failure: it would wait for the others


def _first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add(f"failed on machine {os.environ.get('GROUP_RANK')}", 1) == 1
    except RuntimeError:  # the machine that kept the store is lost
        return True


@contextmanager
def losses_told() -> Iterator[None]:
    """Says of what torch.distributed raises that another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if WORLD_SIZE == 1 or not re.search("gloo|nccl|[Tt]imed? ?out|[Cc]onnection", str(error)):
            raise
        raise ConnectionError(
            f"another of the {WORLD_SIZE} processes has ended, or was silent for "
            f"{PATIENCE.total_seconds() / 60:g} minutes"
        ) from error


@contextmanager
def agreed() -> Iterator[None]:
    """Input that one process cannot use is refused by all; also a decorator."""
    fault = None
    try:
        yield
    except UnusableInput as error:
        fault = error
    for found in from_all(fault):
        if found:
            raise found


def own_part(images: Tensor) -> Tensor:
    """This process's part of a split (N, ...); those of all, in order of ranks, make the whole."""
    return images.tensor_split(WORLD_SIZE)[RANK]


def from_first(value: T) -> T:
    """What the first process passes, in all of them."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value: T) -> list[T]:
    """What each process passes, in order of ranks, in all of them."""
    if WORLD_SIZE == 1:
        return [value]
    box: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(box, value)
    return box


def highest(*numbers: float) -> list[float]:
    """The largest of each number over the processes."""
    if WORLD_SIZE == 1:
        return list(numbers)
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on the CPU."""
    tensor = tensor.cpu()
    if WORLD_SIZE > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def shared(model: nn.Module) -> nn.Module:
    """Wraps a network so that every process gets the gradient of the mean over the whole batch.

    BatchNorm then normalises by the whole batch too, so that the number of processes changes
    nothing but rounding. All begin with the first one's weights, each with random numbers (of
    dropout) of its own.
    """
    if WORLD_SIZE == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        _share_batchnorm(model)
    network = DistributedDataParallel(model)
    network.broadcast_buffers = False  # after this start nothing lets them differ
    torch.manual_seed(torch.initial_seed() + RANK)
    return network


def _share_batchnorm(model: nn.Module) -> None:
    """Puts a `_GlobalBatchNorm` in the place of each BatchNorm layer inside a network."""
    for name, module in model.named_children():
        if isinstance(module, _BatchNorm):
            setattr(model, name, _GlobalBatchNorm(module))
        else:
            _share_batchnorm(module)


class _GlobalBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes; torch's own SyncBatchNorm refuses the CPU.

    Args:
        layer: whose parameters and statistics it takes over.
    """

    def __init__(self, layer: _BatchNorm):
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.weight = layer.weight
        self.bias = layer.bias
        self.running_mean = layer.running_mean
        self.running_var = layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=False,
                eps=self.eps,
            )
        out, mean, var, count = _Normalized.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return out


class _Normalized(torch.autograd.Function):
    """Normalises by mean and variance over all processes.

    Forward and backward exchange one vector each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        mean, var = weight.new_zeros(2, len(weight))
        if len(x):  # a batch may leave a process nothing
            mean, var = torch.batch_norm_update_stats(x, mean, var, 0.0)
        own = torch.cat([mean, var, mean.new_tensor([x.numel() / x.shape[1]])])
        everyones = own.new_empty(WORLD_SIZE, len(own))
        dist.all_gather(list(everyones), own)
        means, variances, counts = everyones.split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, weight, mean, var, count = ctx.saved_tensors
        of_x = gradient
        of_affine = weight.new_zeros(2, len(weight))
        if len(x):  # as if the moments were constants
            of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
            of_affine = torch.stack([of_weight, of_bias])
        sums = of_affine.clone()
        dist.all_reduce(sums)
        # What mean and variance take, since they depend on x.
        scale, shift = sums * weight * (var + ctx.eps).rsqrt() / count
        of_x = of_x - F.batch_norm(x, mean, var, scale, shift, training=False, eps=ctx.eps)
        return of_x, of_affine[0], of_affine[1], None
