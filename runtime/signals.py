"""Ctrl-C, SIGTERM, a closed terminal, a scheduler's warning: all ask a run to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from errors import Stopped

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOPPING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has two


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles the signals that stop a run while the block runs.

    One that is ignored stays so (`nohup`, a shell's background job), and outside the main thread
    Python allows no handler: a run in a thread of a notebook goes on without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collects the first signal instead of breaking off; the second one breaks off."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        # torchrun passes on what the terminal has sent to every process already.
        if received and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise Stopped(number, "stopped at once; a state saved before is untouched")
        received.append(number)

    with handled(note):
        yield received
