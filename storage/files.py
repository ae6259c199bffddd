"""Files that are whole or absent: atomic writes, hashes, a lock that dies with its process."""

import errno
import hashlib
import io
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from errors import printable

try:
    import fcntl
except ImportError:  # Windows has no flock; msvcrt offers the same promise on a byte range.
    fcntl = None
    import msvcrt

FULL = (errno.ENOSPC, errno.EDQUOT)
# How network file systems say that they offer no locks, or cannot sync a folder.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_unlocked: list[Path] = []  # what could not be locked; said of the first alone


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk names no file, other errors the temporary one
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk, where the system and the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # as on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


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
    digest = hashlib.sha256()
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def previous(path: Path) -> Path:
    """Where the state of a run before the newest, at `path`, is kept."""
    return path.with_name(path.name + ".previous")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock on a file while the block runs; yields whether it was obtained.

    The system drops the lock with the process, so that a kill leaves none behind. The file holds
    the process's id and goes with the lock (on Windows it stays). Where the file system offers no
    locks, that is said once and the block runs without. `wait` waits for the holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "ab", buffering=0) as file:
            obtained = _lock(file, path)
            if obtained and _is_at(path, file):  # else its last holder has removed it meanwhile
                with suppress(OSError):  # a full disk does not matter here
                    file.truncate(0)
                    file.write(str(os.getpid()).encode())
                try:
                    yield True
                finally:
                    if fcntl and _is_at(path, file):
                        with suppress(OSError):
                            path.unlink()
                return
        if not obtained:
            if not wait:
                yield False
                return
            time.sleep(0.1)


def holder(path: Path) -> str:
    """The id of the process that holds a lock file, as text; empty where that is unknown."""
    with suppress(OSError, ValueError):
        return str(int(path.read_text()))
    return ""


def _lock(file: BinaryIO, path: Path) -> bool:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)  # the id before that stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if not _unlocked:
            advice = "do not start a run of the same name twice"
            tell(f"warning: cannot lock {path} ({error.strerror}); {advice}")
        _unlocked.append(path)
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
