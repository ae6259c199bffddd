"""What was found in a folder of pictures, in a few lines: a wrong folder is seen at once."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from errors import printable

MANY_CLASSES = 10  # of more, the largest and the smallest are named
# Why files are left out, by the key of config.json.
_REASONS = {
    "unreadable": "unreadable",
    "other_files": "without an ending of a picture",
    "outside": "outside the folders of classes",
    "unlisted": "not in the list of labels",
    "copies": "as copies of others",
    "in_two_classes": "in two classes",
}
UNBALANCED = 5  # a class with so many times another's images is worth a line
MUCH_LOST = 0.25  # a share of a picture; what is cut away of a photograph of 4:3
Size = tuple[int, int]  # width and height, pixels


def classes_text(name: str, counts: Mapping[str, int]) -> str:
    """Says how many pictures of which classes a folder holds.

    Args:
        name: of the folder.
        counts: of each class.
    """
    text = f"{name}: {sum(counts.values()):,} pictures of {len(counts):,} classes"
    if len(counts) <= MANY_CLASSES:
        return f"{text}: " + ", ".join(f"{each} {count:,}" for each, count in counts.items())
    smallest = min(counts, key=counts.get)
    largest = max(counts, key=counts.get)
    return f"{text}, from {counts[smallest]:,} ({smallest}) to {counts[largest]:,} ({largest})"


def left_out_text(left_out: Mapping[str, Sequence[str]]) -> str:
    """Says how many files were left out and why, with an example each; empty where none was.

    Args:
        left_out: the files of each reason; these are the keys of config.json.
    """
    parts = [
        f"{len(files):,} {_REASONS[reason]} (like {printable(files[0])})"
        for reason, files in left_out.items()
        if files
    ]
    return f"left out: {', '.join(parts)}" if parts else ""


def sizes_text(sizes: Sequence[Size]) -> str:
    """Says how large pictures are."""
    smallest = min(sizes, key=_area)
    largest = max(sizes, key=_area)
    if min(sizes) == max(sizes):
        return f"{_by(smallest)} pixels each"
    return f"{_by(smallest)} to {_by(largest)} pixels, median {_by(median_size(sizes))}"


def median_size(sizes: Sequence[Size]) -> Size:
    """The median width and the median height."""
    width, height = np.median(sizes, axis=0)
    return int(width), int(height)


def median_loss(sizes: Sequence[Size]) -> float:
    """The share of the median picture that lies outside its central square."""
    sides = np.array(sizes)
    return float(np.median(1 - sides.min(1) / sides.max(1)))


def loss_text(share: float) -> str:
    """Says that cropping cuts much away.

    Args:
        share: of the median picture.
    """
    return (
        f"their central squares are used: {100 * share:.0f} % of the median picture is cut away; "
        "--fit pad shows all of it"
    )


def unbalanced_text(counts: Mapping[str, int], is_weighed: bool) -> str:
    """Says how far the numbers of training images differ; empty where it is not far.

    Args:
        counts: of each class.
        is_weighed: whether the loss weighs them alike.
    """
    rarest = min(counts, key=counts.get)
    largest = max(counts, key=counts.get)
    if counts[largest] <= UNBALANCED * counts[rarest]:
        return ""
    text = f"unbalanced: {counts[largest]:,} {largest} to train on, {counts[rarest]:,} {rarest}"
    if is_weighed:
        return f"{text}; all classes weigh alike (--balance)"
    return f"{text}; macro F1 tells more than accuracy, --balance weighs the rare more"


def splits_text(counts: Mapping[str, int], drawn: Collection[str], seed: int) -> str:
    """Says how many pictures are in which split.

    Args:
        counts: of each split.
        drawn: the splits that have no folder.
        seed: drew them.
    """
    names = {"train": "to train on", "val": "to validate", "test": "to test"}
    text = ", ".join(f"{counts[split]:,} {names[split]}" for split in names if split in counts)
    if not drawn:
        return f"{text}, as the folders say"
    return f"{text}; --seed {seed} drew {' and '.join(drawn)}"


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _area(size: Size) -> int:
    return size[0] * size[1]
