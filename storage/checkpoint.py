"""What is saved of a run, how it is written so that no crash can lose it, how it is read safely."""

import io
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from errors import UnusableInput, printable
from metrics import MIN_CALIBRATION
from models import create_model
from storage.files import FULL, Unreadable, check_zip, previous, write_atomically

FORMAT = "cifar10-pytorch/1"
# What a finished checkpoint must hold; "surgery" are the arguments of the network.
FINISHED = (
    "name",
    "arch",
    "surgery",
    "classes",
    "mean",
    "std",
    "config",
    "metrics",
    "environment",
    "state_dict",
)
# What the state of an unfinished run must hold.
STATE = (
    "config",
    "precision",
    "identity",
    "epoch",
    "step",
    "history",
    "spent",
    "sums",
    "rng",
    "device_rng",
    "model",
    "optimizer",
)
# What torch.load raises on bytes that torch.save did not write, or that were damaged.
NOT_OF_TORCH = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
)


class Classifier(nn.Module):
    """A trained network that takes pictures as they are; it normalises and resizes them itself.

    Attributes:
        network: from normalised images (B, 3, side, side) to logits.
        classes: their names, in the order of the logits.
        stats: mean and standard deviation that the network expects, of channels in [0, 1].
        side: of the network's input, pixels.
    """

    def __init__(
        self, network: nn.Module, classes: list[str], stats: data.ChannelStats, side: int
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.stats = stats
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """Classifies pictures.

        Args:
            images: (B, H, W, 3) uint8, RGB, on the network's device; square, of any side.

        Returns:
            Logits (B, classes) float32.
        """
        return self.network(data.resize(data.normalize(images, self.stats), self.side))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """Opens a finished checkpoint as a network in eval mode that takes pictures as they are.

        model = load_model("checkpoints/custom_cnn.pt")
        picture = Image.open("photo.jpg").convert("RGB").resize((model.side, model.side))
        images = torch.from_numpy(np.array(picture))[None]  # (1, side, side, 3) uint8
        with torch.inference_mode():
            print(model.classes[model(images).argmax()])

    Raises:
        UnusableInput: there is no such file, or it is no finished checkpoint.
    """
    network, content = load_checkpoint(path, device)
    stats = data.ChannelStats(tuple(content["mean"]), tuple(content["std"]))
    return Classifier(network, content["classes"], stats, content.get("image_size", 32)).eval()


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the trained network of a finished checkpoint.

    Returns:
        The network in eval mode and channels_last, for normalised images (B, 3, side, side); and
        the checkpoint without its tensors.

    Raises:
        UnusableInput: there is no such file, or it is no finished checkpoint.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    path = Path(path)
    with refused(path, "checkpoint", "that train_custom.py or finetune.py wrote"):
        content = load(path)
        if "optimizer" in content:
            raise Unreadable("it is the state of an unfinished run: finish it with --resume")
        for key in FINISHED:
            if key not in content:
                raise Unreadable(f"it lacks {key!r}")
        network = _rebuilt(content, content.pop("state_dict"))
    num_val = content.get("splits", {}).get("val", MIN_CALIBRATION)
    if num_val < MIN_CALIBRATION:  # older versions fitted it on however few images
        content["metrics"]["temperature"] = None
    # The checkpoint that comes with the clone holds its weights in half the bits.
    network.to(device, torch.float32, memory_format=torch.channels_last)
    return network.eval(), content


def load_unfinished(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the network of a run that has not finished, as its saved state holds it.

    Returns:
        What `load_checkpoint` returns of a finished one, without metrics, and in the content under
        `unfinished` how far the run has come, in words.

    Raises:
        UnusableInput: there is no such file, or it is no state whose network can be rebuilt.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    path = Path(path)
    with refused(path, "state of an unfinished run", "that train_custom.py or finetune.py wrote"):
        state = load(path)
        for key in STATE:
            if key not in state:
                raise Unreadable(f"it lacks {key!r}")
        if "described" not in state:
            raise Unreadable("an older version wrote it: finish its run with --resume")
        content = {**state["described"], "pictures": state["pictures"], "metrics": {}}
        done = f"{state['epoch']} of {content['config']['epochs']} epochs"
        if state["step"]:
            done += f" and {state['step']} steps"
        content["unfinished"] = f"an unfinished run, after {done}"
        num_kept = sum(tensor.numel() for tensor in state["model"].values())
        if num_kept < content["parameters"]["total"]:  # of a frozen part whose output was kept
            raise Unreadable("it lacks the layers that do not train: finish its run with --resume")
        network = _rebuilt(content, state["model"])
    network.to(device, torch.float32, memory_format=torch.channels_last)
    return network.eval(), content


def _rebuilt(content: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    try:
        network = create_model(
            content["arch"], content["surgery"], len(content["classes"]), device="meta"
        )
    except ValueError as error:
        raise Unreadable(str(error)) from error
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise Unreadable(f"its weights do not fit its network ({reason})") from error
    return network


@contextmanager
def refused(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Turns what is wrong with a user's file in the block into UnusableInput."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        problem = f"{printable(path)} cannot be read ({error.strerror})"
        raise UnusableInput(f"{problem}: give a {kind} {remedy}") from None
    except Unreadable as error:
        problem = f"{printable(path)} is no whole {kind}: {printable(error)}"
        raise UnusableInput(f"{problem}; give one {remedy}") from error


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and plain values; the zip holds their checksums.

    Raises:
        OSError: the disk is full or cannot be written; an old file is then untouched.
    """
    buffer = io.BytesIO()  # the zip writer of torch hides disk errors; a plain write raises them
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def is_checkpoint(path: Path) -> bool:
    """Whether a file claims this project's format; it may be damaged."""
    return FORMAT.encode() in path.read_bytes()


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote; nothing in the file is executed, and its checksums must hold.

    Raises:
        Unreadable: it is no whole checkpoint.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    content = read(path)
    if not isinstance(content, dict):
        raise Unreadable(f"it holds a {type(content).__name__}")
    found = content.get("format")
    if found != FORMAT:
        if content and all(isinstance(value, Tensor) for value in content.values()):
            raise Unreadable("it holds a state dict alone, which finetune.py takes as --weights")
        raise Unreadable(f"its format is {found!r}, not {FORMAT!r}")
    content.pop("sha256", None)  # of older files, beside the checksums of the zip
    return content


def read(path: Path) -> Any:
    """Opens what `torch.save` wrote: tensors on the CPU and plain types, nothing else.

    torch does not verify the checksums of its own zips, so they are verified here. Files of before
    torch 1.6, as some of torchvision's still are, are no zips and have none.

    Raises:
        Unreadable: it is another kind of file, damaged, or made to run code.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    content = path.read_bytes()
    file = io.BytesIO(content)
    if content.startswith(b"PK\x03\x04"):  # of a zip
        check_zip(file)
        file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd files before it refuses them
            return torch.load(file, map_location="cpu", weights_only=True)
    except NOT_OF_TORCH as error:
        said = str(error)
        if "allocate memory" in said or "not enough memory" in said:
            raise MemoryError(said.split("\n")[0]) from error  # torch has no own type on the CPU
        named = re.search(r"GLOBAL (\S+)", said)  # all else in the message is advice
        if named:
            found = f"it holds a pickled {named[1]}, and only tensors are opened"
        elif "TorchScript" in said:
            found = "it is a TorchScript archive, a program and not weights alone"
        else:
            found = "it is damaged, or no file that torch.save wrote"
        raise Unreadable(found) from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Saves the state of an unfinished run and keeps the one before it until the next call.

    Raises:
        OSError: as `save`; at least one whole state then remains, if there was one.
    """
    kept = previous(path)
    try:
        if path.exists():
            # A second name for bytes that `path` itself holds until the new ones are whole.
            kept.unlink(missing_ok=True)
            try:
                os.link(path, kept)
            except OSError:  # a file system without hard links
                write_atomically(kept, path.read_bytes())
        save(path, state)
    except OSError as error:
        if error.errno not in FULL or not path.exists():
            raise
        kept.unlink(missing_ok=True)  # `path` is newer
        save(path, state)


def load_state(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads the newest whole state of an unfinished run.

    Returns:
        The state, or None where no file of one exists; and a line for each damaged file skipped.

    Raises:
        UnusableInput: files exist, but none is whole.
        MemoryError, OSError: reading failed, which is no reason to take an older state.
    """
    problems = []
    for candidate in (path, previous(path)):
        try:
            state = load(candidate)
            for key in STATE:
                if key not in state:
                    raise Unreadable(f"it is no state of a run, it lacks {key!r}")
        except FileNotFoundError:
            continue
        except Unreadable as error:
            problems.append(printable(f"{candidate}: {error}"))
            continue
        if candidate != path:
            os.replace(candidate, path)  # or the damaged one would become the previous one
        return state, problems
    if problems:
        raise UnusableInput(
            f"no saved state is whole: {'; '.join(problems)}; start another run with --run-name "
            "NAME, or remove these files"
        )
    return None, problems


def remove_state(path: Path) -> None:
    """Removes the states of a run that has finished."""
    previous(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # the newest last: a kill in between loses nothing
