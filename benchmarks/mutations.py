"""What the loader fuzz does to files: damage to the bytes, and odd or hostile content."""

import io
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Code:
    """Unpickled by a careless loader, makes a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        """What pickle runs."""
        return os.mkdir, (str(self.trace),)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Truncates, flips bits, zeroes, repeats or swaps pieces of a file."""
    kind, size = chance.randrange(6), len(content)
    data = bytearray(content)
    start, length = chance.randrange(size), 1 + chance.randrange(min(size, 4096))
    if kind == 0:
        return content[: chance.randrange(size)]
    if kind == 1:
        for _ in range(chance.choice((1, 1, 2, 20))):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif kind == 2:
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif kind == 3:
        data[start:start] = data[start : start + length]
    elif kind == 4:
        del data[start : start + length]
    else:
        # Half of all flips hit the directory at the end and the pickle at the front.
        for _ in range(4):
            near = chance.randrange(min(size, 2000))
            data[chance.choice((near, size - 1 - near))] = chance.randrange(256)
    return bytes(data)


def odd_value(chance: random.Random, trace: Path) -> Any:
    """A value that has no place where it is put."""
    tensors = (
        *(torch.zeros(3, dtype=torch.int8), torch.full((2, 2), float("nan"))),
        *(torch.zeros(1).expand(10**9), torch.eye(3).to_sparse()),
    )
    plain = (None, -1, 10**30, float("nan"), "../../outside", [], {"a": [1, 2]})
    return chance.choice((*plain, *tensors, Code(trace), endless()))


def endless() -> list:
    """A list of 2^60 values that takes a few bytes."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


def rewritten(content: dict[str, Any], chance: random.Random, trace: Path) -> dict[str, Any]:
    """Drops, renames, swaps or replaces entries of a saved dict, at the top or in its tensors."""
    content = dict(content)
    where = content
    if isinstance(content.get("state_dict"), dict) and chance.random() < 0.5:
        where = content["state_dict"] = dict(content["state_dict"])
    keys = list(where)
    one, other = chance.choice(keys), chance.choice(keys)
    kind = chance.randrange(5)
    if kind == 0:
        del where[one]
    elif kind == 1:
        where[one + "x"] = where.pop(one)
    elif kind == 2:
        where[one], where[other] = where[other], where[one]
    elif kind == 3 and isinstance(where[one], torch.Tensor):
        changed = (torch.Tensor.double, torch.Tensor.int, lambda t: t[None], lambda t: t.flatten())
        where[one] = chance.choice(changed)(where[one])
    else:
        where[one] = odd_value(chance, trace)
    return content


def saved(content: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed(content: bytes) -> bytes:
    """The same zip archive, deflated, with a member that unpacks to far more than it weighs."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in source.infolist():
            packed.writestr(member.filename, source.read(member))
        packed.writestr("archive/data/bomb", bytes(50_000_000))
    return buffer.getvalue()


def hostile_npz(arrays: dict[str, np.ndarray], chance: random.Random, trace: Path) -> bytes:
    """A sound npz with an array of code, of 8 GB of zeros, of another type, or without one."""
    arrays, one = dict(arrays), chance.choice(list(arrays))
    kind, buffer = chance.randrange(4), io.BytesIO()
    if kind == 0:
        arrays[one] = np.array([Code(trace)], dtype=object)
    elif kind == 1:
        arrays[one] = arrays[one].astype(chance.choice((np.float64, np.int16, np.bool_)))
    elif kind == 2:
        del arrays[one]
    np.savez(buffer, **arrays)
    if kind < 3:
        return buffer.getvalue()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (8 * 10**9,)}
    )
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{one}.npy", header.getvalue())
    return buffer.getvalue()
