"""What is saved of a run, how it is written so that no crash can lose it, how it is read safely."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensorfile
from config import is_file_name
from files import write_atomically
from models import create_model

FORMAT = "cifar10-pytorch/1"
# Besides tensors, dicts, lists and tuples; a subclass of these may need code to be read.
PLAIN = (str, int, float, bool, type(None))


# What a resume state must hold; `engine.fit` writes it.
STATE = {
    *("config", "precision", "identity", "epoch", "step", "history", "spent", "sums"),
    *("rng", "cuda_rng", "model", "optimizer"),
}


def _three_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(entry, float) and 0 <= entry < 10 for entry in value)
    )


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _settings(value: Any) -> bool:
    return _is_dict(value) and (value.get("limit") is None or type(value["limit"]) is int)


def _measured(value: Any) -> bool:
    temperature = value.get("temperature") if _is_dict(value) else ""
    return temperature is None or (isinstance(temperature, float) and 0 < temperature < 1e3)


# What a finished checkpoint must hold, and what each must satisfy.
FIELDS = {
    "name": lambda value: isinstance(value, str) and is_file_name(value),
    "arch": lambda value: isinstance(value, str),
    "surgery": _is_dict,
    "classes": lambda value: (
        isinstance(value, list) and len(value) == 10 and all(isinstance(v, str) for v in value)
    ),
    "mean": _three_numbers,
    "std": lambda value: _three_numbers(value) and min(value) > 0,
    "config": _settings,
    "metrics": _measured,
    "environment": _is_dict,
    "state_dict": _is_dict,
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
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a checkpoint in it")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: train one, or give its path")
    try:
        content = tensorfile.read(path, device)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a readable checkpoint, but damaged or another kind of file ({error}): "
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
    for key, valid in FIELDS.items():
        if not valid(content.get(key)):
            raise ValueError(f"{path} is no finished checkpoint: its {key!r} is missing or odd")
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        model = create_model(content["arch"], content["surgery"])
    state = content.pop("state_dict")
    for key, own in model.state_dict().items():
        given = state.get(key)
        if not isinstance(given, Tensor) or given.shape != own.shape:
            raise ValueError(f"{path}: {key!r} is missing or has not the shape {tuple(own.shape)}")
        if given.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{path}: {key!r} has the type {given.dtype}, not {own.dtype}")
        if not given.isfinite().all():
            raise ValueError(f"{path}: {key!r} holds numbers that are not finite")
        state[key] = given.to(own.dtype)  # weights may be stored in fewer bits
    if unknown := state.keys() - model.state_dict().keys():
        raise ValueError(f"{path} holds {min(unknown)!r}, which {content['arch']} has not")
    model.load_state_dict(state, assign=True)
    model = model.to(device, memory_format=torch.channels_last).eval()
    try:
        with torch.inference_mode():
            shape = model(torch.zeros(1, 3, 32, 32, device=device)).shape
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: its network cannot be run ({reason})") from error
    if shape != (1, len(content["classes"])):
        raise ValueError(f"{path} names {len(content['classes'])} classes, its network has others")
    return model, content


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
        # A second name for the same bytes, which `path` itself holds until the new ones are whole.
        kept.unlink(missing_ok=True)
        try:
            os.link(path, kept)
        except OSError:  # a file system without hard links
            write_atomically(kept, path.read_bytes())
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
                if missing := STATE - state.keys():
                    raise ValueError(f"{candidate} is no state of a run: it lacks {min(missing)}")
            except ValueError as error:
                problems.append(str(error))
                continue
            if candidate != path:
                os.replace(candidate, path)  # or the damaged one would become the previous one
            return state, problems
    if problems:
        raise ValueError(
            f"no saved state is whole: {'; '.join(problems)}; start another run with --run-name "
            "NAME, or remove these files"
        )
    return None, problems


def remove_state(path: Path) -> None:
    """Removes the states of a run that has finished."""
    for file in (previous(path), path):  # the newest last: a kill in between loses nothing
        file.unlink(missing_ok=True)
