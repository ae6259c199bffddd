"""Which files of a folder are pictures, and of which class and split: by folders, or by a list."""

import csv
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from errors import UnusableInput, printable
from sources.pictures import HIDDEN, find, has_picture_ending, search
from storage.files import same_place

SPLITS = ("test", "val", "train")  # copies in several of them count in the first one alone
MAX_CLASSES = 1000
# What folders of splits are called, in capitals or not, with "_set" or "-set" behind it or not.
_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_Folders = dict[str, list[Path]]  # by the class that they stand for


class File(NamedTuple):
    """A file that may be a picture."""

    path: Path
    split: str  # in which it lies; "train" where there are no folders of splits
    label: int


class Listing(NamedTuple):
    """What lies in a folder."""

    classes: tuple[str, ...]
    given: tuple[str, ...]  # splits that have a folder; without any, "train"
    files: list[File]
    without_ending: list[Path]  # in the folders of the classes, but not called like pictures
    outside: list[Path]  # pictures in no folder of a class
    unlisted: list[Path]  # pictures that the list of labels does not name
    notes: list[str]  # what a user should know besides


def by_folders(path: Path) -> Listing:
    """Lists a folder that holds a folder for each class, or folders of splits that hold those.

    `train/`, `val/` and `test/` may have other usual names. One of the last two that holds no
    folders of classes is left aside.

    Raises:
        UnusableInput: the folders are not like this.
    """
    name = _name(path)
    inside, notes = _by_split(path, _folders(path))
    classes = tuple(sorted(inside["train"]))
    _check_classes(path, classes, inside["train"])
    files = []
    without_ending = []
    for split, of_class in inside.items():
        unknown = sorted(of_class.keys() - set(classes))
        if unknown:
            place = relative(of_class[unknown[0]][0], path)
            raise UnusableInput(f"{name}: {place} is not among the classes of train/; add it there")
        for label, wanted in enumerate(classes):
            for place in of_class.get(wanted, []):
                found, others = search(place)
                files += [File(file, split, label) for file in found]
                without_ending += others
    listed = {file.path for file in files}
    outside = [file for file in find([path]) if file not in listed]
    return Listing(classes, tuple(inside), files, without_ending, outside, [], notes)


def by_labels(path: Path, list_path: Path) -> Listing:
    """Lists a folder whose classes stand in a CSV: a row for each picture, its name and its label.

    A name may be a path below the folder or a file's name alone, with its ending or without. The
    first row may be a heading, which does not end as the names of pictures do. Pictures that it
    does not name are left out. Of those that it names, what lies in `test/` or `val/` is of that
    split, unless that would leave none to train on.

    Raises:
        UnusableInput: the list cannot be read, names a picture that is not there or could be
            several, or gives one picture two labels.
    """
    name = _name(path)
    list_name = printable(list_path)
    found, others = search(path)
    find_named = _Finder(path, [file for file in found + others if not same_place(file, list_path)])
    rows = _rows(list_path)
    notes = []
    if rows and _is_heading(rows, find_named):
        heading = ", ".join(printable(cell) for cell in rows.pop(0))
        notes.append(f"the first row of the list is taken as its heading: {heading}")

    labels: dict[Path, str] = {}
    absent = []
    several = []
    contradicted = []
    num_repeated = 0
    for given, label in rows:
        fitting = find_named(given)
        if not fitting:
            absent.append(given)
        elif len(fitting) > 1:
            several.append(given)
        elif fitting[0] not in labels:
            labels[fitting[0]] = label
        elif labels[fitting[0]] == label:
            num_repeated += 1
        else:
            contradicted.append(given)
    for names, fault in (
        (absent, f"named, but not in {name}"),
        (several, "names of several pictures; give their paths below the folder"),
        (contradicted, "pictures with two labels"),
    ):
        if names:
            raise UnusableInput(
                f"--labels {list_name}: {len(names):,} {fault} ({_examples(names)}); correct it"
            )
    if num_repeated:
        notes.append(f"rows of the list that repeat others: {num_repeated:,}")
    classes = tuple(sorted(set(labels.values())))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise UnusableInput(
            f"--labels {list_name}: {len(classes):,} different labels; make it two to "
            f"{MAX_CLASSES:,}"
        )
    number = {each: label for label, each in enumerate(classes)}
    lies_in = {file: _split_above(file.relative_to(path)) for file in labels}
    if "train" not in lies_in.values():
        lies_in = dict.fromkeys(labels, "train")
    files = [File(file, lies_in[file], number[label]) for file, label in labels.items()]
    given = tuple(split for split in SPLITS if split in lies_in.values())
    unlisted = [file for file in found if file not in labels]
    return Listing(classes, given, files, [], [], unlisted, notes)


def _split_above(file: Path) -> str:
    """The split of the uppermost folder that a file lies in; "train" where it names none."""
    if len(file.parts) == 1:
        return "train"
    return split_of(file.parts[0]) or "train"


def class_name(folder: str) -> str:
    """The class that a folder's name or a label stands for.

    A Mac writes Ä as A and two dots, others as one letter: both are one class.
    """
    name = unicodedata.normalize("NFC", folder)
    return name if name.isprintable() else printable(name)


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for; None if it names none."""
    name = folder.casefold()
    for ending in ("_set", "-set"):
        name = name.removesuffix(ending)
    return _SPLIT_OF.get(name)


def relative(file: Path, path: Path) -> str:
    """A file's path below a folder, as it is shown."""
    return printable(file.relative_to(path).as_posix())


def _name(path: Path) -> str:
    """The folder for messages.

    Raises:
        UnusableInput: there is none.
    """
    name = printable(path)
    if not path.is_dir():
        raise UnusableInput(f"{name}: no such folder; name one that holds a folder per class")
    return name


def _folders(path: Path) -> _Folders:
    """The folders in a folder by the class they stand for, which two ways of writing Ä share.

    Raises:
        UnusableInput: two names differ in white space or other characters that do not show.
    """
    found: _Folders = {}
    for place in sorted(path.iterdir()):
        if place.is_dir() and not place.name.startswith(HIDDEN):
            found.setdefault(class_name(place.name), []).append(place)
    for wanted, places in found.items():
        if len({unicodedata.normalize("NFC", place.name) for place in places}) > 1:
            raise UnusableInput(
                f"{printable(path)}: {len(places)} folders are shown as {wanted}, for their names "
                "differ in characters that do not show; rename them, or make them one"
            )
    return found


def _by_split(path: Path, top: _Folders) -> tuple[dict[str, _Folders], list[str]]:
    """The folders of the classes in each split, and notes; without splits they are of "train"."""
    name = printable(path)
    named: dict[str, list[Path]] = {}
    inside: dict[str, _Folders] = {}
    others = [folder for folder in top if split_of(folder) is None]
    for split in SPLITS:
        places = [place for folder in top if split_of(folder) == split for place in top[folder]]
        if not places:
            continue
        named[split] = places
        inside[split] = {}
        for place in places:
            for wanted, those in _folders(place).items():
                inside[split].setdefault(wanted, []).extend(those)
    if "train" not in named and any(inside.values()):
        raise UnusableInput(f"{name}: holds val/ or test/, but no train/; add it")
    is_flat = not inside.get("train")
    if named and is_flat and not others:
        found = " and ".join(
            f"{relative(place, path)}/" for those in top.values() for place in those
        )
        raise UnusableInput(
            f"{name}: {found} hold no folders of classes; make it train/CLASS/... and "
            "test/CLASS/..., or CLASS/... alone, or give --labels FILE.csv"
        )
    # A folder train/ among those of other classes may be a class, too.
    if is_flat or (others and _holds_pictures(named["train"])):
        return {"train": top}, []
    notes = []
    for split in ("val", "test"):
        if split in inside and not inside[split]:
            del inside[split]
            found = " and ".join(f"{relative(place, path)}/" for place in named[split])
            notes.append(f"{found} holds no folders of classes: left aside")
    return inside, notes


def _holds_pictures(places: list[Path]) -> bool:
    """Whether pictures lie in one of the folders itself."""
    return any(has_picture_ending(file) for place in places for file in place.iterdir())


def _check_classes(path: Path, classes: tuple[str, ...], folders: _Folders) -> None:
    """Refuses too few or too many classes, splits inside of them, and a folder inside itself."""
    name = printable(path)
    for each in classes:
        others = set(classes) - {each}
        inner = {wanted for place in folders[each] for wanted in _folders(place)}
        place = relative(folders[each][0], path)
        if len(others) > 1 and others <= inner:
            raise UnusableInput(
                f"{name}: {place}/ holds all the other classes again; name it alone, or take it "
                "away"
            )
        if not others and len(inner) > 1:
            raise UnusableInput(
                f"{name}: its only folder is {place}/, which holds {len(inner):,}; name that one"
            )
        splits = sorted(
            inside.name
            for folder in folders[each]
            for inside in folder.iterdir()
            if inside.is_dir() and split_of(inside.name) in ("val", "test") and find([inside])
        )
        if others and splits:
            raise UnusableInput(
                f"{name}: {place}/{splits[0]}/ is called like a split, inside a class; make it "
                f"{splits[0]}/{each}/, or give it another name"
            )
    if not classes and find([path]):
        raise UnusableInput(
            f"{name}: holds pictures, but no folders of classes; put them into CLASS/..., or give "
            "--labels FILE.csv"
        )
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise UnusableInput(
            f"{name}: folders of classes: {len(classes):,}; make it two to {MAX_CLASSES:,}"
        )


class _Finder:
    """Finds files by their path below a folder or their name, with the ending or without.

    Args:
        path: the folder.
        files: in it.
    """

    def __init__(self, path: Path, files: list[Path]):
        ways: list[dict[str, list[Path]]] = [{}, {}, {}, {}]  # the first that fits counts
        for file in files:
            below = Path(unicodedata.normalize("NFC", file.relative_to(path).as_posix()))
            names = (below.as_posix(), below.with_suffix("").as_posix(), below.name, below.stem)
            for way, known_as in zip(ways, names, strict=True):
                way.setdefault(known_as, []).append(file)
        self.ways = ways

    def __call__(self, given: str) -> list[Path]:
        """The files that a name in a list may mean."""
        wanted = Path(unicodedata.normalize("NFC", given).replace("\\", "/")).as_posix()
        for way in self.ways:
            if wanted in way:
                return way[wanted]
        return []


def _rows(path: Path) -> list[tuple[str, str]]:
    """Name and label in each row of a CSV, which commas, semicolons or tabs may divide."""
    name = printable(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # as Excel writes it, too
    except OSError as error:
        raise UnusableInput(f"--labels {name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UnusableInput(f"--labels {name}: is no text in UTF-8; save it as CSV") from None
    first_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first_line.count)
    try:
        table = list(csv.reader(text.splitlines(), delimiter=delimiter))
    except csv.Error as error:
        raise UnusableInput(f"--labels {name}: is no CSV ({error})") from None
    rows = []
    for number, row in enumerate(table, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 2 or not all(cells):
            raise UnusableInput(
                f"--labels {name}: row {number:,} holds {sum(map(bool, cells))} values in "
                f"{len(cells)} columns; make it two columns, file name and label"
            )
        rows.append((cells[0], class_name(cells[1])))
    return rows


def _is_heading(rows: list[tuple[str, str]], find_named: _Finder) -> bool:
    """Whether the first row names no picture, not even an absent one, and no label of others."""
    given, label = rows[0]
    if find_named(given) or has_picture_ending(Path(given)):
        return False
    return all(label != other for _, other in rows[1:])


def _examples(names: Iterable[str]) -> str:
    return "like " + ", ".join(printable(name) for name in list(names)[:3])
