"""Files of tensors, opened without running or unpacking anything that they could hide."""

import io
import math
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UnusableInput, printable

# What torch.load, numpy and zipfile fail with on a file that is something else, or cut, or flipped.
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, OverflowError, SyntaxError, tokenize.TokenError),
    *(NotImplementedError, zipfile.LargeZipFile, zipfile.BadZipFile, zlib.error, struct.error),
)
MAX_VALUES = 1_000_000


@contextmanager
def refused(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Turns what is wrong with a user's file in the block into UnusableInput."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        problem = f"{printable(path)} cannot be read ({error.strerror})"
        raise UnusableInput(f"{problem}: give a {kind} {remedy}") from None
    except ValueError as error:
        problem = f"{printable(path)} is no whole {kind}: {printable(error)}"
        raise UnusableInput(f"{problem}; give one {remedy}") from error


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """Opens what `torch.save` wrote: tensors and plain types, nothing else.

    Raises:
        OSError, MemoryError: it cannot be read, which says nothing of its content.
        ValueError: it is another kind of file, damaged, or made to run code or to fill the memory;
            the message says what was found.
    """
    if path.exists() and not path.is_file():  # a fifo would keep us waiting
        raise ValueError("it is no file")
    content = path.read_bytes()
    file, size = io.BytesIO(content), len(content)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if sum(member.file_size for member in members) > size:
                    raise ValueError("it is compressed, which torch.save never does")
                if any(member.filename.endswith("/constants.pkl") for member in members):
                    raise ValueError("it is a TorchScript archive, a program and not weights alone")
                if damaged := archive.testzip():
                    raise ValueError(f"it is damaged, the checksum of its {damaged} is wrong")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd files before it refuses them
            loaded = torch.load(file, map_location=device, weights_only=True)
        _check(loaded, size)
    except UNREADABLE as error:
        raise_shortage(error, 4 * size)
        reason = str(error)
        if named := re.search(r"GLOBAL (\S+)", reason):  # all else in it is advice
            reason = f"it holds a pickled {named[1]}, and only tensors are opened"
        elif not reason.startswith("it "):
            reason = "it is damaged, or no file that torch.save wrote"
        raise ValueError(reason) from error
    return loaded


def raise_shortage(error: Exception, num_bytes: float = math.inf) -> None:
    """Raises MemoryError where an error of torch means that: it is no fault of a file.

    One that asks for more than `num_bytes` is damaged, whatever the memory.
    """
    asked = re.search(r"allocate (\d+) bytes", str(error))
    if re.search("(not enough|out of|allocate) memory", str(error)) and not (
        asked and int(asked[1]) > num_bytes
    ):
        raise MemoryError(str(error).split("\n")[0]) from error


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
