"""Files that are written where a user says; only what was written here before is replaced."""

import os
import zipfile
from pathlib import Path

from errors import UnusableInput, printable
from storage.files import read_json

# How the first line of a list of predictions begins: which picture, perhaps its true class, ...
LIST_COLUMNS = ("predicted", "views", "calibrated")
FIRST_COLUMNS = (("file",), ("file", "true"), ("index", "true"))
FIGURE_MARK = "cifar10-pytorch, evaluate.py --figure"  # the PNG's text "Software"
EXPORT_METADATA = "metadata.json"  # of the extra files in a .pt2
# A key of an ONNX file's metadata as the file holds it: a field of protobuf, its length, its text.
_ONNX_KEY = b"\x0a\x0bcalibration\x12"
# Files of a run's folder that a person could have, too; pictures are drawn beside them.
_OF_A_RUN = (
    "config.json",
    "history.csv",
    "test.json",
    "pictures.csv",
    "index.html",
    "curves.png",
    "confusion_matrix.png",
    "mistakes.png",
    "calibration.png",
    "first_layer.png",
)
_HEAD = 4096  # bytes of a PNG that hold its texts


def check(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """Refuses a path that has another ending, or where something else lies than such an output.

    Args:
        option: that names the path, as a user types it.
        path: to be written.
        endings: that it may have, in small letters.

    Raises:
        UnusableInput: it must not be written.
    """
    name = printable(path)
    if path.suffix.lower() not in endings:
        raise UnusableInput(f"{option} {name}: the ending must be {' or '.join(endings)}")
    if path.is_dir():
        raise UnusableInput(f"{option} {name}: is a folder; give a file's name")
    if path.exists() and not _is_own(path):
        raise UnusableInput(
            f"{option} {name}: exists, and {option} has not written it, or an older version has; "
            "give another name, or move it away"
        )


def make_folder(option: str, folder: Path) -> None:
    """Makes a folder for outputs, if it is not there.

    Args:
        option: that names the folder, as a user types it.
        folder: with those above it.

    Raises:
        UnusableInput: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableInput(
            f"{option} {printable(folder)}: cannot be made ({error.strerror}); name another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UnusableInput(f"{option} {printable(folder)}: cannot be written; name another")


def check_run_dir(run_dir: Path) -> None:
    """Refuses a run's folder that holds a person's own files of the names that a run writes.

    What a run leaves there names its settings in config.json, which comes before the others.

    Raises:
        UnusableInput: they would be replaced.
    """
    if "config" in read_json(run_dir / "config.json"):
        return
    for name in _OF_A_RUN:
        if (run_dir / name).exists():
            raise UnusableInput(
                f"{printable(run_dir / name)}: is of no run, and a run would replace it; give "
                "another --results-dir, or move it away"
            )


def _is_own(path: Path) -> bool:
    """Whether evaluate.py wrote a file, by what is in it."""
    try:
        if path.suffix.lower() == ".pt2":
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/{EXPORT_METADATA}") for name in archive.namelist())
        content = path.read_bytes()
    except (OSError, zipfile.BadZipFile):
        return False
    if path.suffix.lower() == ".onnx":
        return _ONNX_KEY in content
    if path.suffix.lower() == ".png":
        return f"Software\0{FIGURE_MARK}".encode() in content[:_HEAD]
    heads = [",".join([*first, *LIST_COLUMNS]) for first in FIRST_COLUMNS]
    return content.startswith(tuple(f"{head},".encode() for head in heads))
