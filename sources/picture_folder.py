"""A folder of pictures, one folder a class: what is in it, and which picture is in which split."""

import hashlib
import itertools
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data import Arrays
from errors import UnusableInput, printable
from runtime.memory import available_memory
from sources.pictures import HIDDEN, find, has_picture_ending, load_hashed, search

HASH_DIGITS = 16  # of the 64 of a SHA-256: enough to tell pictures apart, and a checkpoint is small
SPLITS = ("test", "val", "train")  # copies in several of them count in the first one alone


class Picture(NamedTuple):
    """A picture of a run: its path below the folder, its class, the first digits of its hash."""

    path: str
    class_name: str
    hash: str


class _File(NamedTuple):
    path: Path
    split: str  # in which it lies; "train" where the folders of the classes lie in no split
    label: int


class _Listing(NamedTuple):
    classes: tuple[str, ...]
    given: tuple[str, ...]  # splits that have a folder; without any, "train"
    files: list[_File]
    others: list[Path]  # in the folders of the classes, but without an ending of a picture


def folder(
    path: Path, side: int, *, val_fraction: float, seed: int, test_fraction: float = 0.15
) -> tuple[Arrays, dict[str, list[Picture]], dict[str, Any]]:
    """Reads a folder per class; `train/`, `val/` and `test/` above them are honoured.

    The bytes of a picture decide its split, not its name: within a class the pictures are ordered
    by a hash of the seed and their bytes, and the shares for test and validation are cut from that
    order. So a renamed picture stays where it is, and added ones move others only across a cut.
    Of copies (equal bytes) one counts. A picture that lies in two classes is left out of both.

    The images of a split come from its classes in turn: the first N hold as many of each.
    What is left out is named on stderr.

    Args:
        path: holds the folders of the classes, or of the splits.
        side: of the squares, pixels.
        val_fraction: without `val/`, the share of every class's training images that validates.
        test_fraction: without `test/`, the share of every class that becomes test images.
        seed: chooses them.

    Returns:
        The arrays; the pictures of each split, in the order of the arrays; and what config.json
        says of them.

    Raises:
        UnusableInput: the folders are not like this, a class has too few pictures for one in every
            split, or they would not fit into memory.
    """
    path = Path(path)
    name = printable(path)
    classes, given, files, others = _listed(path)
    if others:
        examples = ", ".join(_relative(file, path) for file in others[:3])
        line = f"{len(others):,} files have no ending of a picture: left out"
        say([f"{name}: {line} (like {examples})"])
    shares = {}  # of the splits that are drawn
    if "test" not in given:
        shares["test"] = test_fraction
    if "val" not in given and val_fraction:
        shares["val"] = val_fraction
    listed = Counter(file.label for file in files if file.split == "train")
    _check_train(name, classes, list(shares), listed)  # before reading takes minutes

    images, digests = read_all(name, [file.path for file in files], side)
    chosen, copies, in_two = _unique(files, digests)
    if copies or in_two:
        line = f"{copies:,} as copies of others, {len(in_two):,} as they lie in two classes"
        example = f" (like {_relative(in_two[0], path)})" if in_two else ""
        say([f"{name}: left out: {line}{example}"])
    rows = {split: [[] for _ in classes] for split in given}  # of the images, by split and class
    for row in sorted(chosen, key=lambda row: _rank(digests[row], seed)):
        rows[files[row].split][files[row].label].append(row)
    usable = Counter(files[row].label for row in chosen if files[row].split == "train")
    _check_train(name, classes, list(shares), usable)
    for split in given:
        _check_given(name, classes, split, rows[split])
    for number, (split, share) in enumerate(shares.items()):
        rows[split] = _cut(rows["train"], share, leave=len(shares) - number)

    order = {split: _in_turn(rows[split]) for split in SPLITS if split in rows}
    pictures = {split: [] for split in order}
    for split, those in order.items():
        for row in those:
            file = files[row]
            digest = digests[row][:HASH_DIGITS]
            pictures[split].append(Picture(_relative(file.path, path), classes[file.label], digest))
    counts = Counter(files[row].label for row in chosen)
    num_unreadable = digests.count("")
    described = {
        "source": "pictures",
        "folder": name,
        "read": len(files) - num_unreadable,
        "unreadable": num_unreadable,
        "other_files": len(others),
        "copies": copies,
        "in_two_classes": len(in_two),
        "per_class": {each: counts[label] for label, each in enumerate(classes)},
        "splits": "as given",
    }
    if "test" in shares:
        described["splits"] = f"made (seed {seed}, {100 * test_fraction:g} % test)"
    arrays = _arrays(classes, images, [file.label for file in files], order)
    return arrays, pictures, described


def read_all(name: str, files: list[Path], side: int) -> tuple[np.ndarray, list[str]]:
    """Reads pictures, many at a time; what cannot be read is named on stderr.

    Args:
        name: of their folder, for messages.
        files: the pictures.
        side: of the squares, pixels.

    Returns:
        Squares (N, side, side, 3) uint8, and the hex SHA-256 of each file, "" of an unreadable one.

    Raises:
        UnusableInput: they would not fit into memory.
    """
    taken = len(files) * side * side * 3 / 1e9
    free = available_memory() / 1e9
    if taken > free / 2:  # the training needs some, too
        rule = f"{len(files):,} pictures of {side} px take {taken:.2g} of the {free:.2g} GB free"
        raise UnusableInput(f"{name}: {rule}; use a smaller --image-size or fewer pictures")
    images = np.empty((len(files), side, side, 3), np.uint8)
    lines: list[str] = []

    def read(row: int) -> str:
        try:
            images[row], digest = load_hashed(files[row], side)
        except UnusableInput as error:
            if isinstance(error.__cause__, MemoryError):
                raise  # not the picture's fault
            lines.append(f"{error}; left out")
            return ""
        return digest

    pool = ThreadPoolExecutor()  # Pillow works without Python's lock
    try:
        with warnings.catch_warnings():  # threads share the filters: this puts them back
            warnings.simplefilter("ignore")
            done = pool.map(read, range(len(files)))
            digests = list(tqdm(done, total=len(files), unit=" pictures", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # a signal does not wait for the rest
    say(sorted(lines))
    return images, digests


def class_name(folder: str) -> str:
    """The class that a folder's name stands for.

    A Mac writes Ä as A and two dots, others as one letter: both are one class.
    """
    name = unicodedata.normalize("NFC", folder)
    return name if name.isprintable() else printable(name)


def say(lines: list[str]) -> None:
    """Prints lines on stderr, of many the first ten."""
    for line in lines[:10]:
        print(line, file=sys.stderr)
    if len(lines) > 10:
        print(f"and {len(lines) - 10:,} more like these", file=sys.stderr)


def _listed(path: Path) -> _Listing:
    name = printable(path)
    if not path.is_dir():
        raise UnusableInput(f"{name}: no such folder; name one that holds a folder per class")
    top = _folders(path)
    inside: dict[str, dict[str, list[Path]]] = {}
    for split in SPLITS:
        if split in top:
            inside[split] = {}
            for place in top[split]:
                inside[split] |= _folders(place)
    if "train" not in top and any(inside.values()):
        raise UnusableInput(f"{name}: holds val/ or test/, but no train/; add it")
    if not inside.get("train") or any(map(has_picture_ending, top["train"][0].iterdir())):
        inside = {"train": top}  # a folder train/ is a class
    classes = tuple(sorted(inside["train"]))
    if not 2 <= len(classes) <= 1000:
        raise UnusableInput(f"{name}: {len(classes):,} folders of classes; make it two to 1,000")
    files = []
    others = []
    for split, of_class in inside.items():
        unknown = sorted(of_class.keys() - set(classes))
        if unknown:
            raise UnusableInput(f"{name}: {split}/{unknown[0]} is not in train/; add it")
        for label, wanted in enumerate(classes):
            for place in of_class.get(wanted, []):
                found, more = search(place)
                files += [_File(file, split, label) for file in found]
                others += more
    num_outside = len(find([path])) - len(files)
    if num_outside > 0:
        say([f"{name}: left out: {num_outside:,} outside the folders of classes"])
    return _Listing(classes, tuple(inside), files, others)


def _folders(path: Path) -> dict[str, list[Path]]:
    """The folders in one by the class they stand for."""
    found: dict[str, list[Path]] = {}
    for place in sorted(path.iterdir()):
        if place.is_dir() and not place.name.startswith(HIDDEN):
            found.setdefault(class_name(place.name), []).append(place)
    return found


def _relative(file: Path, path: Path) -> str:
    return printable(file.relative_to(path).as_posix())


def _check_train(name: str, classes: Sequence[str], drawn: list[str], counts: Counter[int]) -> None:
    """Refuses classes with too few pictures for one in each split that is drawn from them."""
    needed = len(drawn) + 1
    lacking = [
        f"{each} lacks {needed - counts[label]}"
        for label, each in enumerate(classes)
        if counts[label] < needed
    ]
    if lacking:
        splits = ", ".join([*drawn, "train"])
        raise UnusableInput(
            f"{name}: every class needs {needed} different pictures that can be read, one for each "
            f"of {splits}: {_first_ten(lacking)}; add some, or take the folder away"
        )


def _check_given(name: str, classes: Sequence[str], split: str, rows: list[list[int]]) -> None:
    """Names the classes that a given split lacks, and refuses one that lacks all."""
    missing = [classes[label] for label, those in enumerate(rows) if not those]
    if len(missing) == len(classes):
        raise UnusableInput(
            f"{name}: {split}/ holds no picture of a class that can be read; add some, or take the "
            "folder away"
        )
    if missing:
        say([f"{name}: {split}/ has no picture of {_first_ten(missing)}"])


def _first_ten(words: list[str]) -> str:
    more = f" and {len(words) - 10:,} more" if len(words) > 10 else ""
    return ", ".join(words[:10]) + more


def _unique(files: list[_File], digests: list[str]) -> tuple[list[int], int, list[Path]]:
    """The rows that count, the number of copies, and the files whose picture is in two classes."""
    labels: dict[str, set[int]] = {}
    for file, digest in zip(files, digests, strict=True):
        labels.setdefault(digest, set()).add(file.label)
    first: dict[str, int] = {}
    copies = 0
    in_two = []
    for row, digest in enumerate(digests):  # the files of `test/` come first, see SPLITS
        if digest == "":
            continue
        if len(labels[digest]) > 1:
            in_two.append(files[row].path)
        elif digest in first:
            copies += 1
        else:
            first[digest] = row
    return list(first.values()), copies, in_two


def _rank(digest: str, seed: int) -> bytes:
    """What orders the pictures of a class: random, but the same on every machine."""
    return hashlib.sha256(f"{seed} {digest}".encode()).digest()


def _cut(rows: list[list[int]], fraction: float, leave: int) -> list[list[int]]:
    """Takes the first rows of every class away: a share, at least one, and so that some stay."""
    taken = []
    for those in rows:
        count = min(max(round(fraction * len(those)), 1), len(those) - leave)
        taken.append(those[:count])
        del those[:count]
    return taken


def _in_turn(rows: list[list[int]]) -> list[int]:
    """The first row of every class, then the second of every class, and so on."""
    turns = itertools.zip_longest(*rows)
    return [row for turn in turns for row in turn if row is not None]


def _arrays(
    classes: tuple[str, ...], images: np.ndarray, labels: list[int], order: dict[str, list[int]]
) -> Arrays:
    """Puts the rows of the splits one behind the other, in place: a copy might not fit."""
    rows = [row for split in order for row in order[split]]
    for place, row in enumerate(rows):
        while row < place:  # it has made room for another
            row = rows[row]
        images[[place, row]] = images[[row, place]]
    parts = {}
    begin = 0
    for split, those in order.items():
        parts[f"{split}_images"] = images[begin : begin + len(those)]
        parts[f"{split}_labels"] = np.array([labels[row] for row in those], np.int64)
        begin += len(those)
    return Arrays(classes, **parts)
