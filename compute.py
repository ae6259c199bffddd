"""How a network runs on this machine: device, precision, modes, prediction."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import normalize
from graphs import launched_at_once


def select_device(name: str) -> torch.device:
    """Turns auto, cpu or cuda into a device.

    Raises:
        ValueError: CUDA is asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        raise ValueError(
            f"--device cuda: torch {torch.__version__} is {built} and sees "
            f"{torch.cuda.device_count()} devices: install a driver it can use, or take "
            "--device cpu"
        )
    torch.backends.cudnn.deterministic = True  # costs the CNN nothing, and repeats it to the bit
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def choose_precision(
    wanted: str, model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device
) -> tuple[str, str]:
    """Decides between fp32 and bf16 by timing real steps of this model on this device.

    Neither is faster everywhere: on a CPU with bf16 instructions dense convolutions gain a factor
    of two or three and depthwise ones lose as much.

    Returns:
        "fp32" or "bf16", and a line that says why.
    """
    if wanted != "auto":
        return wanted, f"precision {wanted}: as asked"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32", "precision fp32: this GPU has no bf16"
    cpu = device.type == "cpu"
    x, labels = (tensor[:32] for tensor in batch) if cpu else batch
    rates = {}
    # Dropout is not to depend on whether this was measured.
    with torch.random.fork_rng([] if cpu else [device]), _one_thread():
        for precision in ("fp32", "bf16"):
            probe = copy.deepcopy(model)
            train_mode(probe)
            step = launched_at_once(partial(_probe_step, probe, precision), device)
            times = []
            for _ in range(3):  # the first one chooses kernels and allocates
                begin = now(device)
                step(x, labels, 0.0)
                times.append(now(device) - begin)
            rates[precision] = len(x) / min(times)
    # Near a tie the stopwatch must not decide: the same command is to give the same weights.
    best = "bf16" if rates["bf16"] > 1.2 * rates["fp32"] else "fp32"
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    unit = "images/s a core" if cpu else "images/s"
    return best, f"precision {best}: {measured} {unit} (bf16 must gain a fifth)"


def _probe_step(
    model: nn.Module, precision: str, x: Tensor, labels: Tensor, lr: float | Tensor
) -> None:
    F.cross_entropy(forward(model, x, precision), labels).backward()
    model.zero_grad()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Beside another load, several threads would show how long they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def settle_precision(
    wanted: str, model: nn.Module, batches: Any, state: dict[str, Any] | None
) -> str:
    """Takes a resumed run's precision from its state, else chooses one and says why."""
    if state:
        print(f"precision {state['precision']}: as before the interruption", flush=True)
        return state["precision"]
    batch = next(batches.epoch(0))
    precision, reason = choose_precision(wanted, model, batch, batch[0].device)
    print(reason, flush=True)
    return precision


def compile_or_not(model: nn.Module, wanted: bool, device: torch.device) -> nn.Module:
    """Wraps the model in `torch.compile`, or says why that cannot be done here."""
    if not wanted:
        return model
    try:  # a trial on two numbers shows whether there is a compiler at all
        torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # the back ends raise types of their own
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:60]
        print(f"no torch.compile here ({reason}); training without it")
        return model
    # Static shapes: which size came first must not decide the kernel of the other.
    return torch.compile(model, dynamic=False)


def forward(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    """Logits (B, C) in float32, computed in the given precision."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(x).float()


def train_mode(model: nn.Module) -> None:
    """Puts the model into training mode, except BatchNorm layers none of whose parameters train.

    Their running statistics belong to the frozen weights and must not drift.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def views(x: Tensor, tta: str) -> Iterator[Tensor]:
    """The variants of a batch (B, 3, H, W) whose logits test-time augmentation averages.

    none: the batch itself; flip: with its mirror image; crops: both, and both moved one pixel
    up-left and down-right (the six views of airbench, Jordan 2024).
    """
    moves = [x]
    if tta == "crops":
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        moves += [padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
    for moved in moves:
        yield moved
        if tta != "none":
            yield moved.flip(3)


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Tensor,
    mean: list[float],
    std: list[float],
    *,
    batch_size: int = 250,
    precision: str = "fp32",
    tta: str = "none",
) -> tuple[Tensor, Tensor]:
    """Logits of every image, in order, the last partial batch included.

    fp32 by default, so that a reported accuracy does not depend on what the machine does fast.

    Args:
        model: put into eval mode here.
        images: (N, 32, 32, 3) uint8 on the model's device.
        mean: channel means the model was trained with, fractions of 255.
        std: the deviations.
        batch_size: images at a time, of 32x32 pixels; of a model that upsamples accordingly fewer,
            on a GPU four times as many.
        precision: "fp32" or "bf16".
        tta: see `views`.

    Returns:
        (N, C) float32 on the CPU of the images as they are, and averaged over the views.
    """
    model.eval()
    plain, averaged = [], []
    pixels = (getattr(model, "image_size", 32) / 32) ** 2
    size = batch_size / pixels * (4 if images.is_cuda else 1)
    parts = images.split(max(1, int(size)))
    # Upsampled to many pixels this takes minutes, which nobody should have to wonder about.
    for part in tqdm(parts, "evaluating", unit="batch", disable=None, leave=False, delay=2):
        outputs = [forward(model, x, precision) for x in views(normalize(part, mean, std), tta)]
        plain.append(outputs[0])
        averaged.append(torch.stack(outputs).mean(0))
    return torch.cat(plain).cpu(), torch.cat(averaged).cpu()


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
