"""Fetching from hosts and package clients: timeouts, progress, fallbacks, no debris."""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from files import locked

T = TypeVar("T")

TIMEOUT = 10  # seconds a host may be silent
CLIENT_TIMEOUT = 30  # seconds a package client may write nothing; it also starts up in that time

# What a source that is down, or whose content is not what it should be, fails with. RuntimeError is
# what the downloaders of torch and torchvision say to a wrong hash.
FETCH_ERRORS = (OSError, ValueError, RuntimeError, http.client.HTTPException)

UNWRITABLE = (PermissionError, NotADirectoryError, FileExistsError)


class Absent(OSError):
    """A copy the user never placed: no failure to report, only a line of the final message."""


def tell(message: object) -> None:
    """Prints one line on stderr."""
    print(" ".join(str(message).split()), file=sys.stderr, flush=True)


def first_that_works(subject: str, attempts: Sequence[tuple[str, Callable[[], T]]], hint: str) -> T:
    """Returns the result of the first attempt that succeeds, naming on stderr each that fails.

    Args:
        subject: what is being fetched, to begin messages with.
        attempts: name and function of each source, in order.
        hint: the remedy that ends the message where all fail.

    Raises:
        FileNotFoundError: none succeeded; the one-line message gives every reason.
    """
    reasons = []
    for name, attempt in attempts:
        try:
            return attempt()
        except FETCH_ERRORS as error:
            reasons.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
            if not isinstance(error, Absent):
                tell(f"{subject} not taken from {reasons[-1]}")
    raise FileNotFoundError(f"{subject} could not be had ({'; '.join(reasons)}); {hint}")


@contextmanager
def workspace(folder: Path, name: str) -> Iterator[Path]:
    """Gives a fresh temporary folder inside `folder` to one process at a time.

    It is removed at the end, however the block ends; what killed processes left behind under the
    same name (half-written files of `write_atomically` too) is removed at the beginning.

    Raises:
        ValueError: `folder` is no folder, or must not be written.
        OSError: it cannot be written for another reason, a full disk for instance.
    """
    with ExitStack() as stack:
        try:
            lock = folder / f"{name}.lock"
            if not stack.enter_context(locked(lock, wait=False)):
                tell(f"waiting for another process that is fetching {name} into {folder}")
                stack.enter_context(locked(lock, wait=True))
            for stale in folder.glob(f".{name}.*"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            made = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder)
            temporary = Path(stack.enter_context(made))
        except OSError as error:
            kind = ValueError if isinstance(error, UNWRITABLE) else OSError
            raise kind(
                f"{folder} must be a folder that can be written, {name} is kept there ({error}); "
                "change its permissions or choose another folder"
            ) from error
        yield temporary


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Makes sockets give up on a silent host; the downloaders used here take no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def run_client(command: Sequence[str], folder: Path, num_bytes: int, description: str) -> None:
    """Runs a package client in a folder under a byte progress bar.

    Clients draw no bar where their output is captured, so the growth of the folder is shown.

    Args:
        command: program and arguments.
        folder: working directory of the client, which puts its temporary files there too.
        num_bytes: size of the download.
        description: label of the bar.

    Raises:
        OSError: the client failed, or wrote nothing for `CLIENT_TIMEOUT` seconds.
    """
    log = folder / "client.log"
    with ExitStack() as stack:
        output = stack.enter_context(open(log, "wb"))
        bar = stack.enter_context(
            tqdm(total=num_bytes, unit="B", unit_scale=True, desc=description, disable=None)
        )
        process = stack.enter_context(
            subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | dict.fromkeys(["TMPDIR", "TEMP", "TMP"], str(folder)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        )
        stack.callback(process.wait)  # Popen itself does not wait after Ctrl-C
        stack.callback(process.kill)
        seen, seen_at = 0, time.monotonic()
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            size = min(_folder_size(folder), num_bytes)
            if size > seen:
                bar.update(size - seen)
                seen, seen_at = size, time.monotonic()
            elif time.monotonic() - seen_at > CLIENT_TIMEOUT:
                raise TimeoutError(f"{description}: no byte came in {CLIENT_TIMEOUT} s")
    if process.returncode != 0:
        said = " ".join(log.read_text(errors="replace").split())
        raise OSError(f"the client left with exit code {process.returncode}: {said[:400]}")


def _folder_size(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # the client renames and removes files meanwhile
                size += os.path.getsize(os.path.join(parent, name))
    return size
