"""What is saved of a run, how it is written so that no crash can lose it, how it is read safely."""

import hashlib
import io
import os
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files import write_atomically
from models import create_model

FORMAT = "cifar10-pytorch/1"
# Besides tensors, dicts, lists and tuples; a subclass of these may need code to be read.
PLAIN = (str, int, float, bool, type(None))
# What a finished checkpoint must hold, and the type of each.
FIELDS = {
    "name": str,
    "arch": str,
    "surgery": dict,
    "classes": list,
    "mean": list,
    "std": list,
    "config": dict,
    "metrics": dict,
    "environment": dict,
    "state_dict": dict,
}


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain types atomically, together with the SHA-256 of what they say.

    Args:
        path: the file; an old one is replaced once the new one is whole on the disk.
        content: nested dicts and lists of tensors, strings, numbers, booleans and None.

    Raises:
        OSError: the disk is full or cannot be written; an old file is then untouched.
    """
    content = {"format": FORMAT, **content}
    content["sha256"] = digest(content)
    buffer = io.BytesIO()  # the zip writer of torch hides disk errors; a plain write raises them
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save` wrote; nothing in the file is executed, and its SHA-256 must hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of this project, or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: train one, or give its path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign files before it refuses them
            content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError):
        raise
    # A damaged zip or pickle can fail anywhere inside the reader, with any of these.
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        struct.error,
    ) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint (damaged, or another kind of file): "
            "give one that train_custom.py or finetune.py wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found!r}, not the format {FORMAT!r} of this project")
    stated = content.pop("sha256", None)
    if digest(content) != stated:
        raise ValueError(f"{path} is damaged: its content does not match its own SHA-256")
    return content


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the trained network of a finished checkpoint, ready for evaluation.

    Returns:
        The network in eval mode and channels_last, and the checkpoint without its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no finished checkpoint.
    """
    content = load(path, device)
    for key, kind in FIELDS.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path} is no finished checkpoint: it lacks {key!r}; finish the run")
    model = create_model(content["arch"], content["surgery"])
    try:
        model.load_state_dict(content.pop("state_dict"))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: its weights do not fit {content['arch']}: {reason}") from error
    return model.to(device, memory_format=torch.channels_last).eval(), content


def digest(content: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values, whatever their layout in memory.

    Every value is preceded by its type and length, so that no two contents read alike.
    """
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            sha.update(f"tensor {data.dtype} {tuple(data.shape)};".encode())
            sha.update(data.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            sha.update(f"dict {len(value)};".encode())
            for key, entry in value.items():
                add(key)
                add(entry)
        elif isinstance(value, list | tuple):
            sha.update(f"{type(value).__name__} {len(value)};".encode())
            for entry in value:
                add(entry)
        elif type(value) not in PLAIN:
            raise TypeError(f"{type(value).__name__} {value!r} is not a plain type")
        else:
            text = repr(value).encode()
            sha.update(f"{type(value).__name__} {len(text)};".encode() + text)

    add(content)
    return sha.hexdigest()


def previous(path: Path) -> Path:
    """Where the state before the newest is kept."""
    return path.with_name(path.name + ".previous")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Saves a resume state and keeps the one before it until the next call.

    Raises:
        OSError: as `save`; at least one whole state then remains, if there was one.
    """
    kept = previous(path)
    if path.exists():
        # A second name for the same bytes: at no moment is either name without a whole file.
        spare = kept.with_name(kept.name + ".tmp")
        spare.unlink(missing_ok=True)
        try:
            os.link(path, spare)
        except OSError:  # a file system without hard links
            write_atomically(spare, path.read_bytes())
        os.replace(spare, kept)
    save(path, state)


def load_state(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads the newest whole resume state.

    Returns:
        The state, or None where no file of one exists; and a line for each damaged file skipped.

    Raises:
        ValueError: files exist, but none is whole.
    """
    problems = []
    for candidate in (path, previous(path)):
        if candidate.exists():
            try:
                state = load(candidate)
            except ValueError as error:
                problems.append(str(error))
                continue
            if candidate != path:
                os.replace(candidate, path)  # or the damaged one would become the previous one
            return state, problems
    if problems:
        raise ValueError(f"no saved state is whole: {'; '.join(problems)}; start anew")
    return None, problems


def remove_state(path: Path) -> None:
    """Removes the states of a run that has finished."""
    for file in (path, previous(path)):
        file.unlink(missing_ok=True)
