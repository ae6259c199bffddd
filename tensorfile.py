"""Files of tensors, opened without running or unpacking anything that they could hide."""

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What torch.load fails with on a file that is something else, or cut short, or flipped.
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile),
    *(NotImplementedError, zipfile.LargeZipFile),
)

# Around the reason torch.load puts what a programmer could do.
TORCH_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")

MAX_VALUES = 1_000_000


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """Opens what `torch.save` wrote: tensors and plain types, nothing else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, damaged, or made to run code or to fill the memory;
            the message is the reason alone.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    if sum(member.file_size for member in archive.infolist()) > size:
                        raise ValueError("it is compressed, which torch.save never does")
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of its part {damaged} is wrong")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of odd files before it refuses them
                content = torch.load(file, map_location=device, weights_only=True)
            _check(content, size)
        except UNREADABLE as error:
            lines = (line.strip() for line in str(error).splitlines())
            reasons = (line for line in lines if line and not line.startswith(TORCH_ADVICE))
            reason = next(reasons, "no tensors in it").rstrip(".")[:120]
            raise ValueError(f"{type(error).__name__}: {reason}") from error
    return content


def _check(content: Any, size: int) -> None:
    """Refuses bytes that are repeated many times, and structures that unfold without end."""
    waiting, seen, num_bytes = [content], 0, 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                raise ValueError("it holds a tensor without plain values")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("it holds a tensor larger than its bytes")
            num_bytes += value.numel() * value.element_size()
            if num_bytes > 4 * size:  # a few shared weights are usual
                raise ValueError("it holds the same tensor many times")
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        seen += 1
        if seen > MAX_VALUES or len(waiting) > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
