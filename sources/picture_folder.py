"""A folder of pictures, one folder a class: what is in it, and which picture is in which split."""

import hashlib
import itertools
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import Arrays
from errors import UnusableInput, printable
from runtime.memory import allocate
from sources import found
from sources.picture_layout import SPLITS, File, by_folders, by_labels, relative
from sources.pictures import load_hashed

HASH_DIGITS = 16  # of the 64 of a SHA-256: enough to tell pictures apart, and a checkpoint is small


class Picture(NamedTuple):
    """A picture of a run."""

    path: str  # below the folder
    class_name: str
    hash: str  # its first digits
    copies: tuple[str, ...] = ()  # hashes of other bytes that make the very same square


class Read(NamedTuple):
    """Pictures that were read, a row each."""

    squares: np.ndarray  # (N, side, side, 3) uint8
    hashes: list[str]  # hex SHA-256 of the files' bytes, "" of an unreadable one
    contents: list[str]  # likewise of the squares: equal ones are the same to a network
    sizes: list[tuple[int, int]]  # width and height of the upright pictures, pixels


def folder(
    path: Path,
    side: int,
    *,
    val_fraction: float,
    seed: int,
    scratch: Path,
    must_draw_val: bool = False,
    test_fraction: float = 0.15,
    fit: str = "crop",
    labels: Path | None = None,
) -> tuple[Arrays, dict[str, list[Picture]], dict[str, Any]]:
    """Reads a folder per class, or one with a list of labels; says what was found.

    `train/`, `val/` and `test/` above the folders of the classes are honoured.

    The bytes of a picture decide its split, not its name: within a class the pictures are ordered
    by a hash of the seed and their bytes, and the shares for test and validation are cut from that
    order. So a renamed picture stays where it is, and added ones move others only across a cut.
    Of copies (equal squares, as of one picture saved as PNG and as BMP) one counts. A picture that
    lies in two classes is left out of both.

    The images of a split come from its classes in turn: the first N hold as many of each.

    Args:
        path: holds the folders of the classes, or of the splits, or the pictures of a list.
        side: of the squares, pixels.
        val_fraction: without `val/`, the share of every class's training images that validates.
        seed: chooses them.
        scratch: see `runtime.memory.allocate`.
        must_draw_val: whether someone chose `val_fraction`, which has no effect beside `val/`.
        test_fraction: without `test/`, the share of every class that becomes test images.
        fit: how a picture becomes a square, see `pictures.load`.
        labels: see `picture_layout.by_labels`.

    Returns:
        The arrays; the pictures of each split, in the order of the arrays; and what config.json
        says of them.

    Raises:
        UnusableInput: the folders or the list are not like this, a class has too few pictures for
            one in every split, or the chosen `val_fraction` has no effect.
        OSError: the squares fit neither in memory nor on the disk.
    """
    path = Path(path)
    name = printable(path)
    listing = by_labels(path, labels) if labels else by_folders(path)
    classes = listing.classes
    given = listing.given
    files = listing.files
    if must_draw_val and "val" in given:
        raise UnusableInput(
            f"--val-fraction {val_fraction:g}: {name} has a val/ of its own, which validates; "
            "leave the flag out, or take that folder away"
        )
    counts = Counter(file.label for file in files)
    print_paragraph(found.classes_text(name, {each: counts[i] for i, each in enumerate(classes)}))
    for note in listing.notes:
        print_paragraph(note, indent="  ")
    shares = {}  # of the splits that are drawn
    if "test" not in given:
        shares["test"] = test_fraction
    if "val" not in given and val_fraction:
        shares["val"] = val_fraction
    listed = Counter(file.label for file in files if file.split == "train")
    try:
        _check_train(name, classes, list(shares), listed)  # before reading takes minutes
    except UnusableInput:
        text = found.left_out_text(
            {"other_files": [relative(file, path) for file in listing.without_ending]}
        )
        if text:  # it may be why they are too few
            print_paragraph(text, indent="  ")
        raise

    read = read_all([file.path for file in files], side, fit, scratch)
    images = read.squares
    digests = read.hashes
    sizes = read.sizes
    left_out = {
        "unreadable": [file.path for file, hash in zip(files, digests, strict=True) if not hash],
        "other_files": listing.without_ending,
        "outside": listing.outside,
        "unlisted": listing.unlisted,
    }
    chosen, copies, in_two = _unique(files, read)
    left_out["copies"] = copies
    left_out["in_two_classes"] = in_two
    text = found.left_out_text(
        {reason: [relative(file, path) for file in those] for reason, those in left_out.items()}
    )
    if text:
        print_paragraph(text, indent="  ")

    rows = {split: [[] for _ in classes] for split in given}  # of the images, by split and class
    for row in sorted(chosen, key=lambda row: _rank(digests[row], seed)):
        rows[files[row].split][files[row].label].append(row)
    usable = Counter(files[row].label for row in chosen if files[row].split == "train")
    _check_train(name, classes, list(shares), usable)
    for split in given:
        _check_given(name, classes, split, rows[split])
    for number, (split, share) in enumerate(shares.items()):
        rows[split] = _cut(rows["train"], share, leave=len(shares) - number)

    same: dict[str, set[str]] = {}  # hashes by the squares that they make
    for digest, content in zip(digests, read.contents, strict=True):
        same.setdefault(content, set()).add(digest[:HASH_DIGITS])
    others = {row: same[read.contents[row]] - {digests[row][:HASH_DIGITS]} for row in chosen}
    order = {split: _in_turn(rows[split]) for split in SPLITS if split in rows}
    pictures = {}
    for split, those in order.items():
        pictures[split] = [
            Picture(
                relative(files[row].path, path),
                classes[files[row].label],
                digests[row][:HASH_DIGITS],
                tuple(sorted(others[row])),
            )
            for row in those
        ]
    used_sizes = [sizes[row] for row in chosen]
    print_paragraph(found.sizes_text(used_sizes), indent="  ")
    loss = found.median_loss(used_sizes)
    if fit == "crop" and loss > found.MUCH_LOST:
        print_paragraph(found.loss_text(loss), indent="  ")
    in_split = {split: len(those) for split, those in order.items()}
    print_paragraph(found.splits_text(in_split, list(shares), seed), indent="  ")

    counts = Counter(files[row].label for row in chosen)
    described = {
        "source": "pictures",
        "folder": name,
        "read": len(files) - len(left_out["unreadable"]),
        "median_size": list(found.median_size(used_sizes)),
        "per_class": {each: counts[label] for label, each in enumerate(classes)},
        "splits": "as given",
    }
    described |= {reason: len(those) for reason, those in left_out.items()}
    if "test" in shares:
        described["splits"] = f"made (seed {seed}, {100 * test_fraction:g} % test)"
    arrays = _arrays(classes, images, [file.label for file in files], order)
    return arrays, pictures, described


def read_all(files: list[Path], side: int, fit: str, scratch: Path) -> Read:
    """Reads pictures, many at a time; what cannot be read is named on stderr.

    Args:
        files: the pictures.
        side: of the squares, pixels.
        fit: how a picture becomes a square, see `pictures.load`.
        scratch: see `runtime.memory.allocate`.

    Raises:
        OSError: the squares fit neither in memory nor on the disk.
    """
    squares = allocate(
        (len(files), side, side, 3),
        torch.uint8,
        scratch,
        f"{len(files):,} pictures of {side} px",
        "use a smaller --image-size, fewer pictures or another --checkpoint-dir",
    ).numpy()
    contents = [""] * len(files)
    sizes = [(0, 0)] * len(files)
    lines: list[str] = []

    def read(row: int) -> str:
        try:
            picture = load_hashed(files[row], side, fit)
        except UnusableInput as error:
            if isinstance(error.__cause__, MemoryError):
                raise  # not the picture's fault
            lines.append(f"{error}; left out")
            return ""
        squares[row] = picture.square
        contents[row] = hashlib.sha256(picture.square).hexdigest()
        sizes[row] = picture.size
        return picture.hash

    pool = ThreadPoolExecutor()  # Pillow works without Python's lock
    try:
        with warnings.catch_warnings():  # threads share the filters: this puts them back
            warnings.simplefilter("ignore")
            done = pool.map(read, range(len(files)))
            hashes = list(tqdm(done, total=len(files), unit=" pictures", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # a signal does not wait for the rest
    say(sorted(lines))
    return Read(squares, hashes, contents, sizes)


def print_paragraph(text: str, indent: str = "") -> None:
    """Prints a paragraph on stdout, within 80 columns."""
    print(
        textwrap.fill(
            text,
            79,
            initial_indent=indent,
            subsequent_indent="    ",
            break_on_hyphens=False,
            break_long_words=False,
        ),
        flush=True,
    )


def say(lines: list[str]) -> None:
    """Prints lines on stderr, of many the first ten."""
    for line in lines[:10]:
        print(line, file=sys.stderr)
    if len(lines) > 10:
        print(f"and {len(lines) - 10:,} more like these", file=sys.stderr)


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


def _unique(files: list[File], read: Read) -> tuple[list[int], list[Path], list[Path]]:
    """The rows that count, the files that are copies, and those whose picture is in two classes.

    Of copies one in the first of `SPLITS` counts, there the one with the smallest hash: names have
    no say.
    """
    alike: dict[str, list[int]] = {}
    for row, content in enumerate(read.contents):
        if content != "":
            alike.setdefault(content, []).append(row)
    chosen = []
    copies = []
    in_two = []
    for rows in alike.values():
        if len({files[row].label for row in rows}) > 1:
            in_two += rows
            continue
        counted = min(rows, key=lambda row: (SPLITS.index(files[row].split), read.hashes[row], row))
        chosen.append(counted)
        copies += [row for row in rows if row != counted]
    copied_files = [files[row].path for row in sorted(copies)]
    return chosen, copied_files, [files[row].path for row in sorted(in_two)]


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
