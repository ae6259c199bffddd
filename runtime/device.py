"""How a network runs on this machine: which device, which number format, compiled or not."""

import copy
import shutil
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import StepGraphs, forward, train_mode
from errors import UnusableInput, printable
from runtime import memory

# bf16 must be so much faster: near a tie the stopwatch must not decide, for the same command is to
# give the same weights.
LEAST_GAIN = 1.2
# A step that is timed on a CPU has 32 images up to this side, fewer larger ones: enough for bf16 to
# gain what it will, and no more seconds than it takes to see that.
PROBED_SIDE = 128


def select_device(name: str) -> torch.device:
    """Turns "auto", "cpu", "cuda", "cuda:1", "mps", "xpu" into a device that is here.

    Raises:
        UnusableInput: there is no such device.
    """
    accelerator = None
    num_devices = 0
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        num_devices = torch.accelerator.device_count()
    if name == "auto":
        if accelerator is None and torch.version.cuda is None and shutil.which("nvidia-smi"):
            print(
                "an NVIDIA driver is here, but this torch is built without CUDA: training on the "
                "CPU; pytorch.org names the torch to install for the GPU"
            )
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnusableInput(
            f"--device {printable(name)}: choose auto, cpu, cuda, cuda:1, mps or xpu"
        ) from None
    if device.type == "cpu":
        return device
    of_this_kind = accelerator is not None and device.type == accelerator.type
    if not of_this_kind or (device.index or 0) >= num_devices:
        cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        kind = accelerator.type if accelerator else "accelerator"
        raise UnusableInput(
            f"--device {printable(name)}: torch {torch.__version__} ({cuda}) sees {num_devices} "
            f"{kind} devices: install a driver it can use, or take --device cpu"
        )
    return device


def prepare() -> None:
    """Lets convolutions on a GPU repeat to the bit, and this process keep the memory it frees.

    What loading the data takes should go back to the system, so this comes after it.
    """
    torch.backends.cudnn.deterministic = True
    memory.keep_freed_memory()


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has finished what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def rng_state(device: torch.device) -> Tensor | None:
    """State of the device's own random numbers; None for the CPU, whose state torch keeps apart."""
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).get_rng_state(device)


def set_rng_state(state: Tensor | None, device: torch.device) -> None:
    """Restores what `rng_state` gave."""
    if state is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state, device)


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
    inputs, labels = batch
    unit = "images/s"
    if device.type == "cpu":
        side = inputs.shape[-1]
        num_probed = 32 * PROBED_SIDE**2 // max(side, PROBED_SIDE) ** 2
        inputs, labels = inputs[:num_probed], labels[:num_probed]
        unit = "images/s a core"
    rates = _measure_rates(model, inputs, labels, device)
    best = "bf16" if rates["bf16"] > LEAST_GAIN * rates["fp32"] else "fp32"
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return best, f"precision {best}: {measured} {unit} (bf16 is taken if a fifth faster)"


def _measure_rates(
    model: nn.Module, inputs: Tensor, labels: Tensor, device: torch.device
) -> dict[str, float]:
    """Images/s of training steps without an update in each precision; on a CPU of one core."""
    on_cpu = device.type == "cpu"
    num_threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    # Dropout is not to depend on whether this was measured.
    with torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
        # Beside another load, several threads would show how long they wait for each other.
        torch.set_num_threads(1)
        try:
            steps = {precision: _Probe(model, precision) for precision in seconds}
            if device.type == "cuda":  # as training takes its steps
                steps = {name: StepGraphs(step, device) for name, step in steps.items()}
            for turn in range(5):  # in turn, so that what slows the machine down slows both
                for precision, step in steps.items():
                    begin = _clock(device)
                    step(inputs, labels, 0.0)
                    seconds[precision].append(_clock(device) - begin)
                if turn < 2:  # the first one allocates
                    continue
                rates = {name: len(inputs) / min(times[1:]) for name, times in seconds.items()}
                ratio = rates["bf16"] / rates["fp32"]
                if ratio > 2.5 or ratio < 1 / 2.5:
                    break  # no load beside it explains that
        finally:
            torch.set_num_threads(num_threads)
    return rates


def _clock(device: torch.device) -> float:
    """Seconds; a CPU's own clock does not count the time that another load takes from it."""
    return time.thread_time() if device.type == "cpu" else now(device)


class _Probe:
    """A step of a copy of a network without an update."""

    def __init__(self, model: nn.Module, precision: str):
        self.model = copy.deepcopy(model)
        self.precision = precision
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
