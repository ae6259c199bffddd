"""How a network runs on this machine: which device, which number format, compiled or not."""

import copy
import ctypes
import time
from contextlib import ExitStack, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import StepGraphs, forward, train_mode
from errors import UnusableInput, printable


def select_device(name: str) -> torch.device:
    """Turns "auto", "cpu", "cuda", "cuda:1", "mps", "xpu" into a device that is here.

    Raises:
        UnusableInput: there is no such device.
    """
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnusableInput(
            f"--device {printable(name)}: choose auto, cpu, cuda, cuda:1, mps or xpu"
        ) from None
    count = torch.accelerator.device_count() if accelerator else 0
    here = accelerator and device.type == accelerator.type and (device.index or 0) < count
    if device.type != "cpu" and not here:
        cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        kind = accelerator.type if accelerator else "accelerator"
        raise UnusableInput(
            f"--device {printable(name)}: torch {torch.__version__} ({cuda}) sees {count} {kind} "
            "devices: install a driver it can use, or take --device cpu"
        )
    return device


def prepare() -> None:
    """Lets convolutions on a GPU repeat to the bit, and this process keep the memory it frees.

    Left alone, glibc (Linux) gives the maps of a batch, some 10 MB each, back to the system, which
    hands them out again page by page, zeroed: up to a sixth of a step's time. What loading the data
    takes should go back, so this comes after it.
    """
    torch.backends.cudnn.deterministic = True
    with suppress(AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap never shrinks


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def rng_state(device: torch.device) -> Tensor | None:
    """State of the device's own random numbers; None for the CPU, whose state torch keeps apart."""
    return None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)


def set_rng_state(state: Tensor | None, device: torch.device) -> None:
    """Restores what `rng_state` gave."""
    if state is not None and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state, device)


def choose_precision(
    wanted: str, model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device
) -> tuple[str, str]:
    """Decides between fp32 and bf16 by timing real steps of this model on this device.

    Neither is faster everywhere: on a CPU with bf16 instructions dense convolutions gain a factor
    of two or three and depthwise ones lose as much.

    Args:
        wanted: "fp32", "bf16" or "auto".
        model: unchanged by the trial.
        batch: inputs and labels of a step.
        device: where both are.

    Returns:
        "fp32" or "bf16", and a line that says why.
    """
    if wanted != "auto":
        return wanted, f"precision {wanted}: as asked"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32", "precision fp32: this GPU has no bf16"
    cpu = device.type == "cpu"
    x, labels = (tensor[:32] for tensor in batch) if cpu else batch
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    # Dropout is not to depend on whether this was measured.
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([] if cpu else [device], device_type=device.type))
        # Beside another load, several threads would show how long they wait for each other.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        steps = {p: _Probe(model, p) for p in seconds}
        if device.type == "cuda":  # as training takes its steps
            steps = {p: StepGraphs(step, device) for p, step in steps.items()}
        for turn in range(5):  # in turn, so that what slows the machine down slows both
            for precision, step in steps.items():
                # A CPU's own clock does not count the time that another load takes from it.
                clock = time.thread_time if cpu else lambda: now(device)
                begin = clock()
                step(x, labels, 0.0)
                seconds[precision].append(clock() - begin)
            if turn < 2:  # the first one allocates
                continue
            rates = {p: len(x) / min(times[1:]) for p, times in seconds.items()}
            if not 1 / 3 < rates["bf16"] / rates["fp32"] < 3:
                break  # no load beside it explains that
    # Near a tie the stopwatch must not decide: the same command is to give the same weights.
    best = "bf16" if rates["bf16"] > 1.2 * rates["fp32"] else "fp32"
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    unit = "images/s a core" if cpu else "images/s"
    return best, f"precision {best}: {measured} {unit} (bf16 must gain a fifth)"


class _Probe:
    """A step of a copy of a network without an update."""

    def __init__(self, model: nn.Module, precision: str):
        self.model, self.precision = copy.deepcopy(model), precision
        train_mode(self.model)

    def __call__(self, x: Tensor, labels: Tensor, lr: float | Tensor) -> None:
        F.cross_entropy(forward(self.model, x, self.precision), labels).backward()
        self.model.zero_grad()


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
