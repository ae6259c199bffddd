"""Fetching from hosts and package clients: timeouts, progress, fallbacks, no debris."""

import errno
import http.client
import os
import shutil
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from errors import UnusableInput, printable
from storage.files import FULL, locked, sync_folder, tell

T = TypeVar("T")

TIMEOUT = 10  # seconds a host may be silent
CLIENT_TIMEOUT = 900  # seconds for a package client in all


class Absent(OSError):
    """A copy the user never placed: no failure to report, only a line of the final message."""


class Unwritable(UnusableInput):
    """A place where nothing can be kept."""


def first_that_works(subject: str, attempts: Mapping[str, Callable[[], T]], remedy: str) -> T:
    """Returns the result of the first attempt that succeeds, naming on stderr each that fails.

    Args:
        subject: what is being fetched, to begin messages with.
        attempts: functions by the names of the sources, in order.
        remedy: the end of the message where all fail.

    Raises:
        UnusableInput: none succeeded; the message gives every reason.
        OSError: the disk is full, which no other source would mend.
    """
    reasons = []
    failed = False
    for name, attempt in attempts.items():
        try:
            result = attempt()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reasons.append(f"{name}: {printable(str(error) or type(error).__name__)}")
            if not isinstance(error, Absent):
                failed = True
                tell(f"{subject} not taken from {reasons[-1]}")
        else:
            if failed:
                tell(f"{subject} taken from {name}")
            return result
    raise UnusableInput(f"{subject} could not be had ({'; '.join(reasons)}); {remedy}")


def cached(
    subject: str,
    path: Path,
    read: Callable[[Path], T],
    sources: Mapping[str, Callable[[Path], None]],
    remedy: str,
) -> T:
    """Reads a file, which is fetched where it is absent or damaged, by one process at a time.

    A damaged file stays until a verified one takes its place.

    Args:
        subject: as in `first_that_works`.
        path: the file.
        read: opens and verifies such a file; ValueError means that it is damaged.
        sources: by name, functions that write such a file to a path in a temporary folder.
        remedy: as in `first_that_works`.

    Raises:
        Unwritable: the folder of `path` is none, or must not be written.
        UnusableInput, OSError: as `first_that_works`.
    """
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # damage is told once, below
        return read(path)
    _check_writable(path.parent)
    with _alone(path), _temporary_folder(path) as folder:
        try:
            return read(path)  # another process may have fetched it meanwhile
        except FileNotFoundError:
            pass
        except ValueError as error:
            tell(f"{error}; it stays until a verified one can take its place")
        fetched = folder / path.name

        def attempt(write: Callable[[Path], None]) -> T:
            write(fetched)
            return read(fetched)

        attempts = {name: partial(attempt, write) for name, write in sources.items()}
        result = first_that_works(subject, attempts, remedy)
        os.replace(fetched, path)
        sync_folder(path.parent)
    return result


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        kinds = (PermissionError, NotADirectoryError, FileExistsError)
        if not isinstance(error, kinds) and error.errno != errno.EROFS:
            raise
        raise Unwritable(
            f"{printable(folder)} is no folder that can be written ({error.strerror}): choose "
            "another, with --data-dir for data, with TORCH_HOME for weights"
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process at a time fetch a file."""
    lock_path = path.with_suffix(".lock")
    with locked(lock_path, wait=False) as obtained:
        if obtained:
            yield
            return
    tell(f"waiting for another process that is fetching {path}")
    with locked(lock_path, wait=True):
        yield


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`; removes those that killed processes have left."""
    prefix = f".{path.stem}-fetch-"
    for left in path.parent.iterdir():
        if left.name.startswith(prefix):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def download(subject: str, url: str, path: Path) -> None:
    """Downloads a file under a progress bar; the caller verifies what came.

    Raises:
        OSError: the host cannot be reached, or cannot prove by its certificate who it is.
    """
    tell(f"downloading {subject} from the official host ...")
    request = urllib.request.Request(url, headers={"User-Agent": "cifar10-pytorch"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            reason = error.reason.verify_message
            raise OSError(f"the host's certificate cannot be verified ({reason})") from error
        raise
    bar = tqdm.wrapattr(response, "read", total=response.length, disable=None)  # on a terminal
    with response, open(path, "wb") as file, bar as body:
        shutil.copyfileobj(body, file)


def run_client(command: Sequence[str], folder: Path, subject: str) -> None:
    """Runs a package client in a temporary folder.

    Raises:
        OSError: the client failed, or took longer than `CLIENT_TIMEOUT`.
    """
    tell(f"downloading {subject} ...")
    temporary = str(folder.absolute())
    environment = os.environ | {"TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
    with open(folder / "client.log", "w+b") as log:
        client = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            client.wait(CLIENT_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"it was not there after {CLIENT_TIMEOUT} s") from error
        finally:
            client.kill()
            client.wait()
        log.seek(0)
        if client.returncode:
            said = log.read(400).decode(errors="replace")
            raise OSError(f"the client left with exit code {client.returncode}: {said}")
