"""Fetching from hosts and package clients: timeouts, progress, fallbacks, no debris."""

import glob
import http.client
import os
import shutil
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import EROFS
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from errors import UnusableInput, printable
from storage.files import FULL, holder, locked, sync_folder, tell

T = TypeVar("T")

TIMEOUT = 10  # seconds a host may be silent
CLIENT_TIMEOUT = 900  # seconds for a package client in all
MARKER = "fetched-by-cifar10-pytorch"  # in our temporary folders; none without it is touched


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
    reasons, failed = [], False
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
    with _workspace(path) as folder:
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


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` to one process at a time; removes what kills left."""
    folder, prefix, lock = path.parent, f".{path.stem}-fetch-", path.with_suffix(".lock")
    with ExitStack() as stack:
        try:
            if not stack.enter_context(locked(lock, wait=False)):
                tell(f"waiting for process {holder(lock)} that is fetching {path}")
                stack.enter_context(locked(lock, wait=True))
            for left in folder.glob(f"{glob.escape(prefix)}*/{MARKER}"):
                shutil.rmtree(left.parent, ignore_errors=True)
            made = tempfile.TemporaryDirectory("", prefix, folder, ignore_cleanup_errors=True)
            temporary = Path(stack.enter_context(made))
            (temporary / MARKER).touch()
        except OSError as error:
            kinds = PermissionError, NotADirectoryError, FileExistsError
            if not isinstance(error, kinds) and error.errno != EROFS:
                raise
            raise Unwritable(
                f"{printable(folder)} is no folder that can be written ({error.strerror}): choose "
                "another, with --data-dir for data, with TORCH_HOME for weights"
            ) from error
        yield temporary


def download(subject: str, url: str, path: Path) -> None:
    """Downloads a file under a progress bar; the caller verifies what came."""
    tell(f"downloading {subject} from the official host ...")
    opener = urllib.request.build_opener()
    opener.addheaders = [("User-Agent", "cifar10-pytorch")]
    try:
        response = opener.open(url, timeout=TIMEOUT)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise
        plain = url.replace("https:", "http:", 1)  # certificates lapse, or are missing
        response = opener.open(plain, timeout=TIMEOUT)
    bar = tqdm.wrapattr(response, "read", total=response.length, disable=None)  # on a terminal
    with response, open(path, "wb") as file, bar as body:
        shutil.copyfileobj(body, file)


def run_client(command: Sequence[str], folder: Path, subject: str) -> None:
    """Runs a package client in a temporary folder.

    Raises:
        OSError: the client failed, or took longer than `CLIENT_TIMEOUT`.
    """
    tell(f"downloading {subject} ...")
    environment = os.environ | dict.fromkeys(["TMPDIR", "TEMP", "TMP"], str(folder.absolute()))
    with open(folder / "client.log", "w+b") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        client = subprocess.Popen(command, cwd=folder, env=environment, **streams)
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
