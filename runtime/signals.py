"""Ctrl-C, SIGTERM, a closed terminal, a scheduler's warning: all ask a run to stop."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from errors import Stopped

Handler = Callable[[int, FrameType | None], None]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOPPING = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]  # Windows has two


def install(handler: Handler) -> dict[int, Handler]:
    """Lets a handler take the signals that stop a run; returns the handlers before, by number.

    A signal that is ignored stays so (`nohup`, a shell's background job). Outside the main thread
    Python allows no handler: a run in a thread of a notebook goes on without.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {}
    for number in STOPPING:
        old = signal.getsignal(number)
        if old not in (signal.SIG_IGN, None):
            before[number] = old
            signal.signal(number, handler)
    return before


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Handles the signals that stop a run while the block runs; see `install`."""
    before = install(handler)
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
