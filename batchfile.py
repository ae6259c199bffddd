"""The official batches of CIFAR-10: pickles, read without running anything that they name."""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MAX_OPCODES = 1_000_000  # of a pickled batch; a true one has some 60,000


def read_labels(values: Any) -> np.ndarray:
    """Turns a list of class indices into a (N,) uint8 array.

    Raises:
        ValueError: it is no list of numbers from 0 to 255.
    """
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise ValueError("labels are no list of numbers")
    return np.frombuffer(bytes(values), np.uint8)  # bytes() refuses all but 0...255


class _Pickled:
    """Holds what a pickle says of an array or dtype; nothing of numpy is called."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


def _pickled_bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes into a protocol-2 pickle


class _BatchUnpickler(pickle.Unpickler):
    """Opens an official batch without importing or calling anything that it names."""

    stand_ins: Mapping[tuple[str, str], Callable] = {
        ("numpy.core.multiarray", "_reconstruct"): _Pickled,
        ("numpy._core.multiarray", "_reconstruct"): _Pickled,  # as numpy 2 writes it
        ("numpy", "ndarray"): _Pickled,
        ("numpy", "dtype"): _Pickled,
        ("_codecs", "encode"): _pickled_bytes,
    }

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch needs")
        return self.stand_ins[module, name]


def _check_memo(content: bytes) -> None:
    """Refuses a pickle that numbers an object so high that its table would fill the memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument}")
        if count > MAX_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} steps")


def read_batch(name: str, content: bytes, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads one official batch.

    Args:
        name: of the file, for messages.
        content: of the file.
        num_images: how many it must hold.

    Returns:
        Images (N, 32, 32, 3) and labels (N,), both uint8.

    Raises:
        ValueError: it is not such a batch.
    """
    try:
        # latin1: the official files are from Python 2, whose strings are bytes.
        _check_memo(content)
        entry = _BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
        _, shape, dtype, fortran_order, raw = entry["data"].state
        if dtype.args[0] != "u1":
            raise ValueError(f"images are of type {dtype.args[0]}, not u1")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        planes = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")
        images = planes.reshape(num_images, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), read_labels(entry["labels"])
    except (
        *(pickle.UnpicklingError, EOFError, MemoryError, AttributeError, ImportError),
        *(LookupError, TypeError, ValueError, OverflowError),
    ) as error:
        raise ValueError(f"{name} is no batch of CIFAR-10 ({error})") from error
