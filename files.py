"""Files that are whole or absent: atomic writes, hashes, a lock that dies with its process."""

import errno
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no flock; msvcrt offers the same promise on a byte range.
    fcntl = None
    import msvcrt


def write_atomically(path: Path, content: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a crash leaves either the old content or the new, never a mixture.

    The bytes go to a temporary name in the same folder, are flushed to the disk (fsync), and take
    the real name in one step (`os.replace`); then the folder itself is synced, or a power cut could
    undo the renaming.

    Args:
        path: the file to write; its folder is created.
        content: bytes, text (UTF-8) or a function that writes to an open binary file.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk (a no-op on Windows, which cannot open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically; NaN and infinity are refused, no JSON reader takes them."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256(source: Path | bytes | BinaryIO) -> str:
    """Hex SHA-256 of a file's content or of bytes, read in pieces of 1 MiB."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return sha256(file)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    digest = hashlib.sha256()
    while piece := source.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock on a file while the block runs; yields whether it was obtained.

    The operating system drops the lock with the process, so that a kill leaves none behind. The
    empty lock file stays: deleting it would let two processes lock two files of one name.

    Args:
        path: the lock file, made where absent.
        wait: wait for the holder instead of yielding False at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            else:
                file.seek(0)
                while not _locked_on_windows(file):
                    if not wait:
                        raise BlockingIOError
                    time.sleep(0.2)
            obtained = True
        except BlockingIOError:
            obtained = False
        yield obtained


def _locked_on_windows(file: BinaryIO) -> bool:
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
