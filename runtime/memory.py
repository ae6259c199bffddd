"""How much memory may still be taken."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can be allocated without swapping; where the system does not say, a guess.

    Args:
        root: where the system's `proc` and `sys` are.
    """
    limits = [_group_memory(group) for group in _control_groups(root)]
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    if not limits and hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit is not None), default=4e9)


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
