"""What is saved of a run, how it is written so that no crash can lose it, how it is read safely."""

import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UnusableInput, printable
from models import create_model
from storage import tensorfile
from storage.files import FULL, previous, write_atomically

FORMAT = "cifar10-pytorch/1"
REMEDY = "that train_custom.py or finetune.py wrote"
# Besides tensors, dicts, lists and tuples; a subclass of these may need code to be read.
PLAIN = (str, int, float, bool, type(None))

# What the state of an unfinished run must hold.
STATE = {
    *("config", "precision", "identity", "epoch", "step", "history", "spent", "sums"),
    *("rng", "device_rng", "model", "optimizer"),
}


def _list_of(value: Any, kind: type, at_least: int, at_most: int) -> bool:
    fits = isinstance(value, list | tuple) and at_least <= len(value) <= at_most
    return fits and all(isinstance(entry, kind) for entry in value)


def _odd(content: dict[str, Any]) -> list[str]:
    """Names what a finished checkpoint lacks, or holds in a form that nothing here writes."""
    name, mean, std = (content.get(key) for key in ("name", "mean", "std"))
    side = content.get("image_size", 32)
    dicts = ("surgery", "config", "metrics", "environment", "state_dict")
    fine = {key: isinstance(content.get(key), dict) for key in dicts} | {
        "name": isinstance(name, str) and re.fullmatch(r"\w[\w.+-]{0,99}", name),  # of a folder
        "arch": isinstance(content.get("arch"), str),
        "classes": _list_of(content.get("classes"), str, 2, 1000),
        "mean": _list_of(mean, float, 3, 3) and all(0 <= value < 10 for value in mean),
        "std": _list_of(std, float, 3, 3) and all(0 < value < 10 for value in std),
        "image_size": type(side) is int and 8 <= side <= 1024,
    }
    if fine["config"] and fine["metrics"]:
        heat = content["metrics"].get("temperature")
        fine["config"] = isinstance(content["config"].get("limit"), int | None)
        fine["metrics"] = heat is None or (isinstance(heat, float) and 0 < heat < 1e3)
    return [key for key, value in fine.items() if not value]


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and plain values, with the SHA-256 of what they say.

    Raises:
        OSError: the disk is full or cannot be written; an old file is then untouched.
    """
    content = {"format": FORMAT, **content}
    content["sha256"] = digest(content)
    buffer = io.BytesIO()  # the zip writer of torch hides disk errors; a plain write raises them
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def is_checkpoint(path: Path) -> bool:
    """Whether a file claims this project's format; it may be damaged."""
    return FORMAT.encode() in path.read_bytes()


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save` wrote; nothing in the file is executed, and its SHA-256 must hold.

    Raises:
        ValueError: it is no whole checkpoint; the message says what was found.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    content = tensorfile.read(path, device)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if (found := content.get("format")) != FORMAT:
        if content and all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError("it holds a state dict alone, which finetune.py takes as --weights")
        raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
    stated = content.pop("sha256", None)
    try:
        own = digest(content)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"it holds more than plain values ({error})") from error
    if own != stated:
        raise ValueError("it is damaged, its content does not match its own SHA-256")
    return content


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the trained network of a finished checkpoint, with as many classes as it names.

    Returns:
        The network in eval mode and channels_last, and the checkpoint without its tensors.

    Raises:
        UnusableInput: there is no such file, or it is no finished checkpoint.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    with tensorfile.refused(path, "checkpoint", REMEDY):
        content = load(path, device)
        if {"optimizer", "step"} <= content.keys():
            raise ValueError("it is the state of an unfinished run: finish it with --resume")
        if odd := _odd(content):
            raise ValueError(f"its {odd[0]!r} is missing or odd")
        num_classes, side = len(content["classes"]), content.get("image_size", 32)
        try:
            with torch.device("meta"):  # no memory and no random numbers for what is replaced
                model = create_model(content["arch"], content["surgery"], num_classes)
            state = _fitted(content.pop("state_dict"), model.state_dict())
            model.load_state_dict(state, assign=True)
            model = model.to(device, memory_format=torch.channels_last).eval()
            with torch.inference_mode():
                logits = model(torch.zeros(1, 3, side, side, device=device))
        except (RuntimeError, TypeError) as error:
            tensorfile.raise_shortage(error)
            reason = str(error).split("\n")[0]
            raise ValueError(f"its network cannot be run ({reason})") from error
        if logits.shape != (1, num_classes):
            raise ValueError(f"it names {num_classes} classes, its network has others")
    return model, content


def _fitted(state: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the types of the network's `own`; ValueError for any other."""
    for key, value in own.items():
        given = state.get(key)
        if not isinstance(given, Tensor) or given.shape != value.shape:
            raise ValueError(f"its {key!r} is missing or has not the shape {tuple(value.shape)}")
        if given.is_floating_point() != value.is_floating_point():
            raise ValueError(f"its {key!r} has the type {given.dtype}, not {value.dtype}")
        if not given.isfinite().all():
            raise ValueError(f"its {key!r} holds numbers that are not finite")
    if unknown := state.keys() - own.keys():
        raise ValueError(f"it holds {min(map(repr, unknown))}, which its network has not")
    return {key: state[key].to(value.dtype) for key, value in own.items()}  # maybe from fewer bits


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
            if missing := STATE - state.keys():
                raise ValueError(f"it is no state of a run, it lacks {min(missing)}")
        except FileNotFoundError:
            continue
        except ValueError as error:
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
    for file in (previous(path), path):  # the newest last: a kill in between loses nothing
        file.unlink(missing_ok=True)
