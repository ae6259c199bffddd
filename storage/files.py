"""Files that are whole or absent: atomic writes, hashes, a lock that dies with its process."""

import errno
import functools
import hashlib
import json
import os
import secrets
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from errors import printable

TEMPORARY = ".{}.{}.tmp"  # the file's name, eight random characters
FULL = (errno.ENOSPC, errno.EDQUOT)
# How network file systems say that they cannot lock, or cannot flush a file or a folder.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Unreadable(ValueError):
    """A file is damaged, or something else than it should be; the message says what was found."""


def tell(message: object) -> None:
    """Prints one line on stderr; a closed terminal or a full disk behind it ends nothing."""
    with suppress(OSError, ValueError):
        print(printable(message), file=sys.stderr, flush=True)


def write_atomically(path: Path, content: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a crash leaves either the old content or the new, never a mixture.

    The bytes go to a temporary name, are flushed to the disk, and take the real name in one step;
    then the folder itself is flushed, or a power cut could undo the renaming.

    Args:
        path: the file to write; its folder is created.
        content: bytes, text (UTF-8) or a function that writes to an open binary file.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY.format(path.name, secrets.token_hex(4)))
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            elif isinstance(content, str):
                file.write(content.encode())
            else:
                file.write(content)
            file.flush()
            _sync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk names no file, other errors the temporary one
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    sync_folder(path.parent)


def unfinished_writes(folder: Path, name: str = "*") -> list[Path]:
    """What kills in the middle of writes have left of a file in a folder, or of all of them."""
    return list(folder.glob(TEMPORARY.format(name, "?" * 8)))


def same_place(path: Path, other: Path) -> bool:
    """Whether both paths lead to one file."""
    return path.resolve() == other.resolve()


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk, where the system and the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # as on Windows
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically; NaN and infinity are refused, no JSON reader takes them."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def sha256(source: Path | bytes) -> str:
    """Hex SHA-256 of a file's content, read in pieces of 1 MiB, or of bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_zip(file: BinaryIO) -> None:
    """Verifies the checksums of all members of a zip, which torch.load does not.

    Raises:
        Unreadable: one is wrong, or it is no whole zip.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise Unreadable(f"it is damaged ({error})") from error
    if damaged:
        raise Unreadable(f"it is damaged, the checksum of its {damaged} is wrong")


def previous(path: Path) -> Path:
    """Where the state of a run before the newest, at `path`, is kept."""
    return path.with_name(path.name + ".previous")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock on a file while the block runs; yields whether it was obtained.

    The system drops the lock with the process, so that a kill leaves none behind. The file holds
    the process's id and goes with the lock (on Windows it stays). Where the file system offers no
    locks, that is said once and the block runs without.

    Args:
        path: of the lock file; its folder is created.
        wait: wait for another holder, for ever.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(blocking=wait)
        obtained = True
    except Timeout:
        obtained = False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_of_no_locks()
        obtained = True
    if lock.is_locked:
        with suppress(OSError):  # neither a full disk nor Windows, which locks the bytes, matters
            path.write_text(str(os.getpid()))
    try:
        yield obtained
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()  # who waits for it tries anew: filelock takes no removed file
            lock.release()


@functools.cache  # once is enough
def _warn_of_no_locks() -> None:
    tell("warning: the file system offers no locks; do not start a run of the same name twice")


def holder(path: Path) -> str:
    """The id of the process that holds a lock file, as text; empty where that is unknown."""
    with suppress(OSError, ValueError):
        return str(int(path.read_text()))
    return ""
