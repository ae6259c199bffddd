"""Which images a checkpoint is evaluated on: those of its own test, or a labelled folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data import ChannelStats, Split, Splits
from errors import UnusableInput, printable
from reports.export import stored_side
from reports.test_images import test_split
from sources.known_pictures import BEFORE, COPIES, first_by_hash, hash_files, labelled_others
from sources.picture_folder import HASH_DIGITS, Read, read_all, say
from sources.picture_layout import class_name
from sources.pictures import HIDDEN, has_picture_ending, search

MOST_NAMED = 10  # classes in a message


class ToEvaluate(NamedTuple):
    """Images to evaluate on.

    Attributes:
        splits: they are its test split.
        files: their N names below their folder; None where they have none.
        note: what they are, where that is not the whole test split of the training; else empty.
    """

    splits: Splits
    files: list[str] | None
    note: str


def images_to_evaluate(
    saved: dict[str, Any],
    data_dir: Path,
    place: Path | None,
    device: torch.device,
    scratch: Path,
) -> ToEvaluate:
    """The test images of the training; or a labelled folder that holds none of them.

    Args:
        saved: what the checkpoint says of itself.
        data_dir: where CIFAR-10 is kept.
        place: where the pictures lie; None for where those of the training lay.
        device: where the tensors are put.
        scratch: see `runtime.memory.allocate`.

    Raises:
        UnusableInput: `test_split` refuses, or the folder has not the classes of the training.
    """
    known = saved.get("pictures") or {}
    folder = saved["config"].get("pictures")
    if place is None and not known.get("test"):
        return ToEvaluate(test_split(saved, data_dir, None, device, scratch), None, "")
    if folder and not known.get("test"):  # of an older version, which did not note its pictures
        return ToEvaluate(test_split(saved, data_dir, place, device, scratch), None, "")
    where = place or Path(folder)
    if not where.is_dir():
        raise UnusableInput(f"{printable(where)}: no such folder; give --pictures one that is")
    files = first_by_hash(hash_files(where))
    test = known.get("test", {})
    found = [files[digest] for digest in test if digest in files]
    if place and not found:
        return _labelled(saved, place, device, scratch)
    num_others = labelled_others(place, files, known) if place else 0
    if num_others:
        line = (
            f"{printable(place)}: not counted: {num_others:,} labelled pictures that the training "
            f"did not use, for {len(found):,} of its test pictures lie there too; to evaluate on "
            "them, give a folder that holds none of its test pictures"
        )
        say([line])
    splits = test_split(saved, data_dir, place, device, scratch)
    num_images = len(splits.test.labels)
    names = None
    if len(found) == num_images:  # else one could not be read, and nothing says which
        names = [file.relative_to(where).as_posix() for file in found]
    note = ""
    if num_images < len(test):
        note = f"on {num_images:,} of the {len(test):,} test images: the others are missing"
    return ToEvaluate(splits, names, note)


def _labelled(
    saved: dict[str, Any], place: Path, device: torch.device, scratch: Path
) -> ToEvaluate:
    """A folder that holds a folder per class; what trained the network is left out."""
    name = printable(place)
    files = []
    labels = []
    for file, label in _files_by_class(saved, place):
        files.append(file)
        labels.append(label)
    fit = saved["config"].get("fit", "crop")
    read = read_all(files, stored_side(saved), fit, scratch)
    rows = _usable(name, read, labels, saved.get("pictures") or {})
    if not rows:
        raise UnusableInput(f"--pictures {name}: no picture is left to evaluate on; give others")
    split = Split(
        torch.from_numpy(read.squares[rows]).to(device),
        torch.tensor([labels[row] for row in rows], device=device),
    )
    stats = ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    splits = Splits(tuple(saved["classes"]), stats, None, None, split)
    names = [files[row].relative_to(place).as_posix() for row in rows]
    note = f"on {len(rows):,} labelled pictures in {name}, none of them of its training"
    if not saved.get("pictures"):
        note = f"on {len(rows):,} labelled pictures in {name}, not on its own test images"
    return ToEvaluate(splits, names, note)


def _files_by_class(saved: dict[str, Any], place: Path) -> list[tuple[Path, int]]:
    """The pictures in the folders of the classes, each with its label."""
    name = printable(place)
    classes = saved["classes"]
    known = ", ".join(printable(each) for each in classes[:MOST_NAMED])
    if len(classes) > MOST_NAMED:
        known += f" and {len(classes) - MOST_NAMED:,} more"
    found = []
    unknown = []
    num_others = 0
    num_outside = 0
    for inside in sorted(place.iterdir()):
        if inside.name.startswith(HIDDEN):
            continue
        if not inside.is_dir():
            if has_picture_ending(inside):
                num_outside += 1
        elif class_name(inside.name) in classes:
            label = classes.index(class_name(inside.name))
            pictures, others = search(inside)
            found += [(file, label) for file in pictures]
            num_others += len(others)
        else:
            unknown.append(inside.name)
    if unknown:
        raise UnusableInput(
            f"--pictures {name}: the network does not know the class {printable(unknown[0])}; it "
            f"knows {known}; give a folder that holds folders of these alone"
        )
    if not found:
        raise UnusableInput(
            f"--pictures {name}: holds neither test pictures of the training nor folders of its "
            f"classes with pictures; put them into folders called {known}"
        )
    lines = []
    if num_others > 0:
        lines.append(f"{name}: left out: {num_others:,} files without an ending of a picture")
    if num_outside > 0:
        lines.append(f"{name}: left out: {num_outside:,} pictures outside the folders of classes")
    say(lines)
    return found


def _usable(
    name: str,
    read: Read,
    labels: list[int],
    known: Mapping[str, Mapping[str, str]],
) -> list[int]:
    """The rows to evaluate on: of equal squares the first, and what the training did not use."""
    labels_of: dict[str, set[int]] = {}
    hashes_of: dict[str, set[str]] = {}
    for digest, content, label in zip(read.hashes, read.contents, labels, strict=True):
        labels_of.setdefault(content, set()).add(label)
        hashes_of.setdefault(content, set()).add(digest[:HASH_DIGITS])
    trained = known.get("train", {}).keys() | known.get(BEFORE, {}).keys()
    seen_copies = "copies of its validation or test pictures"
    reasons = ("trained the network", "validated it", seen_copies, "copies", "in two classes")
    left_out = dict.fromkeys(reasons, 0)
    rows: dict[str, int] = {}
    for row, content in enumerate(read.contents):
        if content == "":  # unreadable, and named
            continue
        if trained & hashes_of[content]:
            left_out["trained the network"] += 1
        elif known.get("val", {}).keys() & hashes_of[content]:
            left_out["validated it"] += 1
        elif known.get(COPIES, {}).keys() & hashes_of[content]:
            left_out[seen_copies] += 1
        elif len(labels_of[content]) > 1:
            left_out["in two classes"] += 1
        elif content in rows:
            left_out["copies"] += 1
        else:
            rows[content] = row
    counts = [f"{count:,} {why}" for why, count in left_out.items() if count]
    if counts:
        say([f"{name}: left out: {', '.join(counts)}"])
    return list(rows.values())
