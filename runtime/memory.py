"""How much memory may still be taken, what is put on the disk instead, what is kept when freed."""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from runtime import launch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Of sys/mman.h, on Linux and macOS.
_POSIX_MADV_RANDOM = 1
_POSIX_MADV_WILLNEED = 3

_in_files: list[range] = []  # the addresses of tensors that lie in a file


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, where the C library is glibc (Linux).

    Left alone, glibc gives the maps of a batch, some 10 MB each, back to the system, which hands
    them out again page by page, zeroed: up to a sixth of a step's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)  # nothing is mapped by itself,
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # and the heap never shrinks


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can be allocated without swapping; where the system does not say, a guess.

    Args:
        root: where the system's `proc` and `sys` are.
    """
    limits = []
    for group in _control_groups(root):
        limit = _group_memory(group)
        if limit is not None:
            limits.append(limit)
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    if not limits and hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=4e9)


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, scratch: Path, what: str, remedy: str
) -> Tensor:
    """A tensor whose values are not set, in memory or in a file that no name leads to.

    It is a file where the tensor would take more than half of what is free, for the training needs
    some, too. The file goes with the process, however that ends.

    Args:
        shape: of the tensor.
        dtype: of its values.
        scratch: beside which path, and named after it, the file goes. Named after a checkpoint, it
            is swept away with the run's other temporary files where a system keeps mapped ones.
        what: is to be put there, in the plural, for messages.
        remedy: for the message that there is no room.

    Raises:
        OSError: it fits neither in memory nor on the disk.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    on_disk = size > available_memory() * launch.NUM_MACHINES / (2 * launch.WORLD_SIZE)
    if not on_disk:
        return torch.empty(shape, dtype=dtype)
    print(f"{what}: {size / 1e6:,.0f} MB in a file in {scratch.parent}/, not in memory", flush=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)  # a second machine may lack it
    handle, name = tempfile.mkstemp(prefix=f".{scratch.name}.", suffix=".tmp", dir=scratch.parent)
    try:
        try:
            tensor = torch.from_file(name, True, count, dtype=dtype).view(shape)
        finally:
            with suppress(PermissionError):  # Windows keeps what is mapped
                os.unlink(name)  # the mapping keeps the bytes alive
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk shows now, not as a crash later
        _in_files.append(range(tensor.data_ptr(), tensor.data_ptr() + size))
        return tensor
    except OSError as error:
        raise OSError(
            f"{what}: {size / 1e9:.1f} GB fit neither in memory nor in {scratch.parent}/ "
            f"({error}): {remedy}"
        ) from error
    finally:
        os.close(handle)


def random_reads(tensor: Tensor) -> Callable[[Tensor], None] | None:
    """Prepares a tensor that lies in a file for reading its rows in any order.

    Left alone, the system reads what surrounds a row as well, which drives other rows out of
    memory, and a row's pages one after the other (`benchmarks/random_reads.py`). To read the tensor
    in order is slower from then on.

    Args:
        tensor: any.

    Returns:
        A function that lets the system begin to read some rows, whose indices (B,) int64 it takes.
        None where there is nothing to do: the tensor is in memory, or the system takes no advice.
    """
    begin = tensor.data_ptr()
    if not any(begin in addresses for addresses in _in_files):
        return None
    try:
        posix_madvise = ctypes.CDLL(None).posix_madvise
    except (AttributeError, TypeError):  # another system
        return None

    def advise(begin: int, size: int, advice: int) -> None:
        into_page = begin % mmap.PAGESIZE
        address = ctypes.c_void_p(begin - into_page)
        posix_madvise(address, ctypes.c_size_t(size + into_page), advice)

    advise(begin, tensor.nbytes, _POSIX_MADV_RANDOM)
    row_size = tensor[0].nbytes

    def begin_reading(rows: Tensor) -> None:
        for row in rows.tolist():
            advise(begin + row * row_size, row_size, _POSIX_MADV_WILLNEED)

    return begin_reading


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's memory groups (Linux), of version 1 and 2, outermost last."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, inside = line.split(":", 2)
            if controllers in ("", "memory"):
                top = root / "sys/fs/cgroup" / controllers
                group = top / inside.strip("/")
                yield from (p for p in (group, *group.parents) if p == top or top in p.parents)


def _group_memory(group: Path) -> int | None:
    """What a group may still take: its limit less what no file holds too."""
    for limit, key in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
        with suppress(OSError, ValueError, KeyError):  # "max" where there is no limit
            used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return int((group / limit).read_text()) - int(used[key])
    return None
