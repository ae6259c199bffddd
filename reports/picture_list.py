"""Which pictures a run used, as a table."""

import csv
import io
from pathlib import Path

from sources.picture_folder import Picture
from sources.picture_layout import SPLITS
from storage.files import write_atomically


def write(path: Path, pictures: dict[str, list[Picture]]) -> None:
    """Writes a row for each picture: path below the folder, class, split, hash.

    Args:
        path: of the CSV.
        pictures: of each split; the hash is the first 16 hex digits of the file's SHA-256.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "class", "split", "hash"])
    for split in reversed(SPLITS):
        for picture in pictures.get(split, []):
            rows.writerow([as_text(picture.path), as_text(picture.class_name), split, picture.hash])
    write_atomically(path, text.getvalue())


def as_text(cell: str) -> str:
    """Text that a spreadsheet would run as a formula, behind an apostrophe."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
