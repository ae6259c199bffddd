"""How soon a batch of pictures in a file is there, where the system is told what is read or not.

Each row is a process of its own: squares of 128 pixels are allocated as a training does it, filled,
and batches of them taken in shuffled order. A control group of Linux limits the memory that holds
parts of the file; without one they are in memory. How far the disk reads ahead is the system's
(`/sys/block/DISK/queue/read_ahead_kb`) and stands in the result.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import common
from benchmarks.own_pictures import limit_of
from data import gather
from runtime import memory

SIDE = 128
BATCH = 128


def read(
    count: int, num_batches: int, group: Path | None, told: bool, scratch: Path
) -> dict[str, Any]:
    """Takes batches out of so many squares in a process of its own.

    Args:
        count: squares.
        num_batches: that are taken and timed, after as many that are not.
        group: control group that the process enters; None for no limit and no file.
        told: whether the system is told what is read, as a training tells it.
        scratch: beside which path the file goes.

    Returns:
        `memory_limit` and `bytes`; `told`; and the mean and the largest time of a batch, in ms.
    """
    torch.set_num_threads(1)
    if group:
        (group / "cgroup.procs").write_text(str(multiprocessing.current_process().pid))
        memory.available_memory = lambda: 0.0
    shape = (count, SIDE, SIDE, 3)
    squares = memory.allocate(shape, torch.uint8, scratch, "squares", "take fewer")
    noise = torch.randint(0, 256, (1000, SIDE, SIDE, 3), dtype=torch.uint8)
    for part in squares.split(1000):
        part.copy_(noise[: len(part)])
    begin_reading = memory.random_reads(squares) if told else None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    plain = torch.zeros(BATCH, dtype=torch.bool)
    unmoved = torch.zeros(BATCH, 2, dtype=torch.int64)
    seconds = []
    for rows in order.split(BATCH)[: 2 * num_batches]:
        begin = time.perf_counter()
        if begin_reading:
            begin_reading(rows)
        gather(squares, rows, plain, unmoved)
        seconds.append(time.perf_counter() - begin)
    timed = [1000 * one for one in seconds[num_batches:]]
    return {
        "memory_limit": limit_of(group),
        "bytes": squares.numel(),
        "told": told,
        "ms": round(sum(timed) / len(timed), 1),
        "largest_ms": round(max(timed), 1),
    }


def read_ahead(folder: Path) -> int | None:
    """KB that Linux reads beyond what is asked for, on the disk of a folder."""
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (block, block.parent):  # a partition's are those of its disk
        if (place / "queue/read_ahead_kb").exists():
            return int((place / "queue/read_ahead_kb").read_text())
    return None


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--squares", type=int, default=200_000)
    parser.add_argument("--batches", type=int, default=60, help="that are timed")
    parser.add_argument("--memory-group", type=Path, nargs="*", default=[], help="control groups")
    args = parser.parse_args()
    jobs = [(None, False)]
    for group in args.memory_group:
        jobs += [(group, False), (group, True)]
    rows = []
    for group, told in jobs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            arguments = (args.squares, args.batches, group, told, args.output)
            rows.append(pool.apply(read, arguments))
        print(rows[-1], flush=True)
        figures = {"batch_size": BATCH, "read_ahead_kb": read_ahead(args.output.parent)}
        common.write(args, figures | {"rows": rows})


if __name__ == "__main__":
    main()
