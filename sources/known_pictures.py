"""Which pictures a run used, known by their bytes: what is still there, and what changed."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from errors import UnusableInput, printable
from sources.picture_folder import HASH_DIGITS, Picture, read_all, say
from sources.picture_layout import class_name, split_of
from sources.pictures import has_picture_ending, search
from storage.files import sha256

# Beside "train", "val" and "test": what else is known to the network, through the training that it
# began from, or as other bytes that make the square of a training picture.
BEFORE = "before"
COPIES = "copies"  # other bytes that make the square of a validation or test picture
Known = dict[str, dict[str, str]]  # of "train", "val", "test" the hashes, each with its class


def known(pictures: Mapping[str, list[Picture]]) -> Known:
    """What a checkpoint keeps of the pictures of its training, in their order."""
    kept = {
        split: {picture.hash: picture.class_name for picture in those}
        for split, those in pictures.items()
    }
    for split, key in (("train", BEFORE), ("val", COPIES), ("test", COPIES)):
        copies = {
            digest: picture.class_name
            for picture in pictures.get(split, [])
            for digest in picture.copies
        }
        if copies:
            kept[key] = kept.get(key, {}) | copies
    return kept


def changes(before: Known, now: Known) -> str:
    """Says what differs between the splits of a run as it began and now; empty where nothing."""
    aside = (BEFORE, COPIES)
    old = _by_hash({split: those for split, those in before.items() if split not in aside})
    new = _by_hash({split: those for split, those in now.items() if split not in aside})
    old_classes = {name for _, name in old.values()}
    new_classes = {name for _, name in new.values()}
    said = [f"class {name} is gone" for name in sorted(old_classes - new_classes)[:3]]
    said += [f"class {name} is new" for name in sorted(new_classes - old_classes)[:3]]
    stayed = old.keys() & new.keys()
    for number, what in (
        (len(old) - len(stayed), "removed or changed"),
        (len(new) - len(stayed), "added"),
        (sum(old[digest] != new[digest] for digest in stayed), "in another class or split"),
    ):
        if number:
            said.append(f"pictures {what}: {number:,}")
    return ", ".join(said)


def find_test(
    folder: Path, pictures: Known, side: int, *, fit: str, scratch: Path
) -> tuple[np.ndarray, list[str]]:
    """Finds the test pictures of a training by their bytes, wherever they lie, however called.

    They come in the order of the training, each with the class it had then. What is missing, what
    lies in the folder of another class now, and what in `test/` is none of them, is said on stderr.

    Args:
        folder: is searched with all folders in it.
        pictures: of the training.
        side: of the squares, pixels.
        fit: how a picture becomes a square, see `pictures.load`.
        scratch: see `runtime.memory.allocate`.

    Returns:
        Squares (N, side, side, 3) uint8 and the N names of their classes.

    Raises:
        UnusableInput: there is no such folder, or it holds none of them.
    """
    name = printable(folder)
    if not folder.is_dir():
        raise UnusableInput(f"{name}: no such folder; say with --pictures where the pictures are")
    hashes = hash_files(folder)
    places = first_by_hash(hashes)
    test = pictures["test"]
    present = [digest for digest in test if digest in places]
    read = read_all([places[digest] for digest in present], side, fit, scratch)
    images = read.squares
    readable = [row for row, digest in enumerate(read.hashes) if digest != ""]
    for place, row in enumerate(readable):
        if place < row:  # in place: a copy might not fit
            images[place] = images[row]
    images = images[: len(readable)]
    present = [present[row] for row in readable]
    if not present:
        raise UnusableInput(
            f"{name}: holds none of the {len(test):,} test pictures of the training; say with "
            "--pictures where they are"
        )
    lines = []
    if len(present) < len(test):
        lines.append(f"missing: {len(test) - len(present):,} of {len(test):,} test pictures")
    moved = _num_moved({places[digest].relative_to(folder): test[digest] for digest in present})
    if moved:
        lines.append(
            f"in another class now: {moved:,} of the test pictures; the class they had at the "
            "training counts"
        )
    more = {
        digest
        for file, digest in hashes.items()
        if _in_test(file.relative_to(folder)) and has_picture_ending(file) and digest not in test
    }
    trained = pictures["train"].keys() | pictures.get(BEFORE, {}).keys()
    if more:
        lines.append(
            f"in test/, but no test pictures of the training: {len(more):,}, of which "
            f"{len(more & trained):,} trained the network; they do not count"
        )
    say([f"{name}: {line}" for line in lines])
    return images, [test[digest] for digest in present]


def labelled_others(folder: Path, places: Mapping[str, Path], pictures: Known) -> int:
    """How many pictures in folders of the classes a training did not use; those in `test/` aside.

    Args:
        folder: that was searched.
        places: in it, by hash.
        pictures: of the training.
    """
    by_hash = _by_hash(pictures)
    classes = {name for _, name in by_hash.values()}
    number = 0
    for digest, file in places.items():
        below = file.relative_to(folder)
        inside = {class_name(part) for part in below.parent.parts}
        if digest in by_hash or not has_picture_ending(file) or _in_test(below):
            continue
        if not classes.isdisjoint(inside):
            number += 1
    return number


def _by_hash(pictures: Known) -> dict[str, tuple[str, str]]:
    """Split and class of each picture."""
    return {
        digest: (split, name) for split, those in pictures.items() for digest, name in those.items()
    }


def hash_files(folder: Path) -> dict[Path, str]:
    """The files in a folder and all folders in it, pictures first, with their hashes.

    The hashes are as `Picture` has them; "" of a file that cannot be read.
    """
    found, others = search(folder)
    files = found + others
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(_hash, files), strict=True))


def first_by_hash(hashes: Mapping[Path, str]) -> dict[str, Path]:
    """Of each hash the first file that has it."""
    places: dict[str, Path] = {}
    for file, digest in hashes.items():
        places.setdefault(digest, file)
    return places


def _hash(file: Path) -> str:
    try:
        return sha256(file)[:HASH_DIGITS]
    except OSError:  # a link to nothing, or not ours to read
        return ""


def _in_test(file: Path) -> bool:
    return len(file.parts) > 1 and split_of(file.parts[0]) == "test"


def _num_moved(classes: dict[Path, str]) -> int:
    """How many files lie in the folder of a class, but not of the one they had."""
    names = set(classes.values())
    moved = 0
    for file, had in classes.items():
        inside = {class_name(part) for part in file.parent.parts}
        if inside & names and had not in inside:
            moved += 1
    return moved
