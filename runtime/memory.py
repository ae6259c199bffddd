"""How much memory may still be taken, and freed memory that is kept."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


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
