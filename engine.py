"""How a network learns and is evaluated: schedule, step, loop, prediction. Needs torch and tqdm.

`train` is a generator: it yields after every step and at the end of every epoch, so that whoever
runs it may print, save, validate or stop there. With a fused optimiser nothing waits for the
device. Where torch.distributed runs several processes, each trains and predicts its part of every
batch.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# What BatchNorm's statistics are measured on, where they are young: batches at the end of a
# training, and before it images, for more would take longer than they are worth.
MEASURED = 50
MEASURED_BETWEEN = 64


class Batches(Protocol):
    """What `train` learns from; `data.TrainBatches` is one."""

    num_images: int  # of an epoch
    num_steps: int  # of an epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs (B, ...) and labels (B,) int64 from the given step of an epoch."""


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        epoch: epochs behind it.
        step: steps behind it in the running epoch; 0 where an epoch has just ended.
        lr: learning rate of the last step.
        sums: (3,) float32 on the device: loss (nats), correct predictions and images, summed over
            the running epoch, or over the one that has just ended.
        bad_step: on the device, number from 0 of the first step whose loss or gradient was not
            finite; -1 while there is none.
        averages: on the device, a tensor for each parameter that trains: its mean over the steps
            that are averaged so far; empty before the first of them.
        num_averaged: those steps.
        start: on the device, those parameters as they were at first, from which every round begins;
            empty where there is one round.
    """

    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))
    bad_step: Tensor = field(default_factory=lambda: torch.tensor(-1))
    averages: list[Tensor] = field(default_factory=list)
    num_averaged: int = 0
    start: list[Tensor] = field(default_factory=list)


def world_size() -> int:
    """How many processes train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def images_in_step(num_images: int, num_steps: int, step: int) -> int:
    """Images in a step of an epoch, counted from 0: the first steps take those left over."""
    smallest, left_over = divmod(num_images, num_steps)
    return smallest + 1 if step < left_over else smallest


def lr_factor(step: int, num_steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Learning rate relative to its peak: a linear rise, then mostly a fall to 0.

    Args:
        step: optimiser step, from 0.
        num_steps: of the whole training.
        warmup: share of the steps that rise.
        schedule: "cosine" falls along half a cosine, "linear" along a line; "constant" stays.
    """
    rise = warmup * num_steps
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rise) / (num_steps - rise)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    *,
    epochs: int,
    lr: float,
    warmup: float = 0.0,
    schedule: str = "cosine",
    precision: str = "fp32",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    average: float = 0.0,
    rounds: int = 1,
    progress: Progress | None = None,
) -> Iterator[Progress]:
    """Trains a model in place.

    The same `Progress` is yielded each time. Who keeps it with the states of model and optimiser
    and of torch's random numbers can go on from there, to the bit.

    Args:
        model: on its device.
        optimizer: of torch, or made by `optimizers.make_optimizer`; not one that needs a closure.
            Its `lr` is overwritten: a group learns at the rate of the step times its `lr_scale`,
            where it has one. A fused optimiser costs no waiting for the device; on a GPU a
            capturable one (where it is Adam) lets the steps be replayed as CUDA graphs.
        batches: a pure function of (epoch, step).
        epochs: passes over the training images, in all rounds together.
        lr: peak learning rate of a group whose `lr_scale` is 1.
        warmup: see `lr_factor`.
        schedule: see `lr_factor`.
        precision: "fp32" or "bf16".
        label_smoothing: in [0, 1).
        class_weights: see `train_step`.
        average: share of the steps, the last ones, whose weights the model gets the mean of at the
            end. Where the learning rate stays high, they surround a better place than any of them
            (Izmailov et al. 2018, arXiv:1803.05407). 0 keeps the last weights.
        rounds: so often the training begins, from the same weights, each time with its share of
            the epochs, of the schedule and of the averaged steps. What was trained apart is better
            averaged than trained on (Wortsman et al. 2022, arXiv:2203.05482). The optimiser's state
            is set to 0, which is where Adam's, SGD's and Muon's begins, but not, say, Rprop's.
        progress: where an interrupted training stood.

    Raises:
        ValueError: the rounds do not divide the epochs, or average nothing.
    """
    epochs_of_round = epochs // rounds
    steps_of_round = epochs_of_round * batches.num_steps
    if rounds > 1 and (epochs % rounds or average * steps_of_round < 1):
        raise ValueError(f"{rounds} rounds must divide the {epochs} epochs and average some steps")
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    at = progress or Progress()
    at.sums = at.sums.to(device)
    at.bad_step = at.bad_step.to(device)
    at.averages = [mean.to(device) for mean in at.averages]
    at.start = [weight.to(device) for weight in at.start]
    num_steps = batches.num_steps
    processes = world_size()

    def take_step(
        x: Tensor, labels: Tensor, lr: float | Tensor, count: float | None = None
    ) -> tuple[Tensor, Tensor]:
        return train_step(
            model,
            optimizer,
            x,
            labels,
            lr,
            precision=precision,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            count=count,
        )

    graphs = None
    can_replay = all(group.get("capturable", True) for group in optimizer.param_groups)
    if device.type == "cuda" and processes == 1 and can_replay and skips_by_itself(optimizer):
        graphs = StepGraphs(take_step, device)
    while at.epoch < epochs:
        train_mode(model)
        epoch_of_round = at.epoch % epochs_of_round
        if at.step == 0:
            at.sums.zero_()
            if rounds > 1 and epoch_of_round == 0:
                begin_round(at, trained, optimizer)
        for x, labels in batches.epoch(at.epoch, at.step):
            done = at.epoch * num_steps + at.step
            done_in_round = epoch_of_round * num_steps + at.step
            at.lr = lr * lr_factor(done_in_round, steps_of_round, warmup, schedule)
            if graphs:
                measured, bad = graphs(x, labels, at.lr)
            elif processes > 1:  # gradients are averaged over the processes
                images = images_in_step(batches.num_images, num_steps, at.step)
                measured, bad = take_step(x, labels, at.lr, images / processes)
            else:
                measured, bad = take_step(x, labels, at.lr)
            at.sums += measured
            at.bad_step = torch.where((at.bad_step < 0) & bad, done, at.bad_step)
            at.step += 1
            if done_in_round >= (1 - average) * steps_of_round:
                add_to_averages(at, trained)
            yield at
        use_averages = len(at.averages) > 0 and at.epoch + 1 == epochs
        if use_averages:
            with torch.no_grad():
                torch._foreach_copy_(trained, at.averages)
        # After 12 steps at momentum 0.1 they would still hold 28 % of their initial values.
        is_moved = use_averages and len(tracking_batchnorms(model)) > 0
        if is_moved or statistics_are_young(model, (epoch_of_round + 1) * num_steps):
            num_measured = MEASURED
            if at.epoch + 1 < epochs:
                num_measured = math.ceil(MEASURED_BETWEEN * num_steps / batches.num_images)
            some = itertools.islice(batches.epoch(at.epoch), num_measured)
            measure_statistics(model, some, precision)
        at.epoch += 1
        at.step = 0
        yield at


@torch.no_grad()
def begin_round(at: Progress, trained: list[Tensor], optimizer: Any) -> None:
    """Goes back to the weights of the beginning, with an optimiser that remembers nothing."""
    if not at.start:
        at.start = [weight.clone() for weight in trained]
        return
    torch._foreach_copy_(trained, at.start)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()  # in place: CUDA graphs know where it lies


@torch.no_grad()
def add_to_averages(at: Progress, trained: list[Tensor]) -> None:
    """Lets the present weights count in the means, as much as those of each step before."""
    at.num_averaged += 1
    if at.averages:
        torch._foreach_lerp_(at.averages, trained, 1 / at.num_averaged)
    else:
        at.averages = [weight.clone() for weight in trained]


def train_step(
    model: nn.Module,
    optimizer: Any,
    x: Tensor,
    labels: Tensor,
    lr: float | Tensor,
    *,
    precision: str = "fp32",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    count: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimiser step; it changes nothing at all where loss or gradient are not finite.

    Neither parameters, nor the optimiser's moments, nor BatchNorm's running statistics then move.

    Args:
        model: in training mode.
        optimizer: see `train`.
        x: inputs (B, ...).
        labels: (B,) int64.
        lr: learning rate of a group whose `lr_scale` is 1.
        precision: "fp32" or "bf16".
        label_smoothing: in [0, 1).
        class_weights: (C,) float32 on the device, factors of the loss of an image by its class.
            Their mean over the training images is to be 1: the loss is divided by the number of
            images, so that no batch, and no process's part of one, counts more than another.
        count: images the loss is a mean over, where these are a part of a larger batch; None for
            those of `x`.

    Returns:
        (3,) summed loss (nats), correct predictions and images; and whether a number was not finite
        (bool). Both stay on the device, so that nothing waits for it where the optimiser is fused.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    logits = forward(model, x, precision)
    if class_weights is None:
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    else:
        # The weight of cross_entropy itself would also weigh the classes that smoothing adds: the
        # rare one would become the target of the frequent one's images.
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        loss = (losses * class_weights[labels]).sum()
    if count is None:
        count = len(labels)
    (loss / count).backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in trained if p.grad is not None]
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    bad = ~torch.isfinite(nn.utils.get_total_norm(gradients) + loss.detach())
    if world_size() > 1:  # the loss is that of a part
        any_bad = bad.float()
        dist.all_reduce(any_bad, dist.ReduceOp.MAX)
        bad = any_bad > 0
    if skips_by_itself(optimizer):
        optimizer.found_inf = bad.float()
        optimizer.step()
    elif not bad:  # this waits for the device
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))
    correct = (logits.detach().argmax(1) == labels).sum()
    size = torch.full_like(correct, len(labels))
    return torch.stack([loss.detach(), correct, size]), bad


def skips_by_itself(optimizer: Any) -> bool:
    """Whether an optimiser changes nothing where its `found_inf` (a tensor) is not 0.

    Torch's fused ones do, and say so by the attribute that its GradScaler asks for, too. But SGD's
    momentum, which its first step makes, is left unset where that step is skipped.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and "momentum_buffer" not in optimizer.state[parameter]:
                    return False
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def forward(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    """Logits (B, C) in float32, computed in the given precision, "fp32" or "bf16"."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(x).float()


def train_mode(model: nn.Module) -> None:
    """Puts the model into training mode, except BatchNorm layers none of whose parameters train.

    Their running statistics belong to the frozen weights and must not drift.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            trains = any(p.requires_grad for p in module.parameters())
            module.train(trains)


def tracking_batchnorms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers whose running statistics follow the batches."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.running_mean is not None
        and module.momentum is not None
    ]


def statistics_are_young(model: nn.Module, num_steps: int) -> bool:
    """Whether BatchNorm's statistics still hold a thousandth of what they held before the steps."""
    return any((1 - norm.momentum) ** num_steps > 1e-3 for norm in tracking_batchnorms(model))


@torch.no_grad()
def measure_statistics(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str
) -> None:
    """Sets running statistics to the means over batches, as the network now is.

    Dropout is off, as in evaluation: so nothing draws random numbers, and training goes on as if
    nothing had been measured.

    Args:
        model: in training mode.
        batches: inputs (B, ...) and labels.
        precision: "fp32" or "bf16".
    """
    norms = tracking_batchnorms(model)
    momenta = [norm.momentum for norm in norms]
    means = [torch.zeros_like(norm.running_mean) for norm in norms]
    variances = [torch.zeros_like(norm.running_var) for norm in norms]
    count = 0
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # what runs is then the newest batch alone
        for x, _ in batches:
            forward(model, x, precision)
            count += 1
            for norm, mean, variance in zip(norms, means, variances, strict=True):
                mean += norm.running_mean
                variance += norm.running_var
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        train_mode(model)
    for norm, mean, variance in zip(norms, means, variances, strict=True):
        norm.running_mean.copy_(mean / count)
        norm.running_var.copy_(variance / count)


class RecordedStep(NamedTuple):
    """A step as a graph, and the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    labels: Tensor
    result: Any


class StepGraphs:
    """A training step that a GPU replays as a CUDA graph, one for each shape of the batch.

    A step of a small network is some hundred kernels of microseconds each, which the GPU runs
    faster than Python can launch them; a graph launches all at once. The first step of a shape runs
    as written, which makes the optimiser's state and chooses kernels; the second is recorded.

    Args:
        step: of inputs, labels and learning rate (a number on the device); reads nothing back.
        device: the GPU.
    """

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Any], device: torch.device):
        self.step = step
        self.lr = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream()  # what is recorded must not be the main stream
        self.pool = torch.cuda.graph_pool_handle()  # the graphs run in turn, in the same memory
        self.recorded: dict[torch.Size, RecordedStep] = {}
        self.seen: set[torch.Size] = set()
        self.works = True

    def __call__(self, x: Tensor, labels: Tensor, lr: float) -> Any:
        """Takes the step; what it returns is overwritten by the next one."""
        self.lr.fill_(lr)
        if x.shape not in self.seen or not self.works:
            self.seen.add(x.shape)
            return self._as_written(x, labels)
        if x.shape not in self.recorded:
            own_x = x.clone()
            own_labels = labels.clone()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = self.step(own_x, own_labels, self.lr)
            except RuntimeError as error:
                reason = str(error).split("\n")[0]
                tqdm.write(f"no CUDA graph of the training step ({reason}); training without")
                self.works = False
                return self._as_written(x, labels)
            self.recorded[x.shape] = RecordedStep(graph, own_x, own_labels, result)
        recorded = self.recorded[x.shape]
        recorded.x.copy_(x)
        recorded.labels.copy_(labels)
        recorded.graph.replay()
        return recorded.result

    def _as_written(self, x: Tensor, labels: Tensor) -> Any:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # it is going to be
            result = self.step(x, labels, self.lr)
        main.wait_stream(self.stream)
        return result


def views(x: Tensor, tta: str) -> Iterator[Tensor]:
    """The variants of a batch (B, 3, S, S) whose logits test-time augmentation averages.

    none: the batch itself; flip: with its mirror image; shifts: with both moves by a pixel (of 32),
    up-left and down-right; crops: these three and their mirror images (the six views of airbench,
    Jordan 2024, arXiv:2404.00498). Mirrored views are for networks that were trained with them.
    """
    moved = [x]
    if tta in ("shifts", "crops"):
        side = x.shape[3]
        by = max(1, side // 32)
        padded = F.pad(x, (by, by, by, by), mode="reflect")
        moved += [padded[..., at : at + side, at : at + side] for at in (0, 2 * by)]
    for view in moved:
        yield view
        if tta in ("flip", "crops"):
            yield view.flip(3)


@torch.inference_mode()
def predict(
    model: nn.Module,
    inputs: Iterable[Tensor],
    *,
    precision: str = "fp32",
    tta: str = "none",
) -> tuple[Tensor, Tensor]:
    """Logits of every input, in order.

    fp32 by default, so that a reported accuracy does not depend on what the machine does fast.

    Args:
        model: put into eval mode here.
        inputs: batches (B, ...) on the model's device; `data.inputs` makes them. Of several
            processes each gives its part of the split, in order of ranks; all get all logits.
        precision: "fp32" or "bf16".
        tta: see `views`.

    Returns:
        (N, C) float32 on the CPU of the inputs as they are, and averaged over the views.
    """
    model.eval()
    plain = []
    averaged = []
    for x in tqdm(inputs, "evaluating", unit="batch", disable=None, leave=False, delay=2):
        outputs = [forward(model, view, precision) for view in views(x, tta)]
        plain.append(outputs[0])
        averaged.append(torch.stack(outputs).mean(0))
    return _of_all(torch.cat(plain).cpu()), _of_all(torch.cat(averaged).cpu())


def _of_all(logits: Tensor) -> Tensor:
    """Logits of all processes, in order of ranks."""
    if world_size() == 1:
        return logits
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, logits)
    return torch.cat(parts)


def evaluate(
    model: nn.Module, inputs: Iterable[Tensor], labels: Tensor, precision: str = "fp32"
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and top-1 accuracy on a split; the loss of a broken network is NaN.

    Args:
        model: put into eval mode here.
        inputs: see `predict`.
        labels: (N,) int64.
        precision: "fp32" or "bf16".
    """
    logits, _ = predict(model, inputs, precision=precision)
    labels = labels.cpu()
    loss = F.cross_entropy(logits.double(), labels).item()
    return loss, (logits.argmax(1) == labels).double().mean().item()
