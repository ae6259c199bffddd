"""People's own pictures, of any size, mode or format Pillow opens, as small RGB squares."""

import contextlib
import functools
import importlib
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data import Arrays, stratified_split
from errors import UnusableInput, printable

MAX_PIXELS = 100_000_000  # a photograph of that many takes 300 MB once decoded
# For EPS Pillow would run Ghostscript, a whole language; the others it knows but cannot draw.
_NOT_DRAWN = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_HIDDEN = (".", "__MACOSX")  # how names begin that no one means
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # of EXIF; from 2 on its values call for these:
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {value: Image.Transpose[turn] for value, turn in enumerate(_TURNS.split(), 2)}
_BROKEN = (  # what Pillow's decoders raise for damaged files
    *(OSError, SyntaxError, EOFError, LookupError, TypeError, ValueError, ArithmeticError),
    *(AttributeError, AssertionError, RuntimeError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


@functools.cache
def _formats() -> tuple[list[str], set[str]]:
    """The formats that are read, and the endings that make a file in a folder a picture."""
    with contextlib.suppress(ImportError):  # photographs of telephones
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    formats = Image.OPEN.keys() - _NOT_DRAWN
    endings = {end for end, kind in Image.registered_extensions().items() if kind in formats}
    return sorted(formats), endings | {".heic", ".heif", ".avif", ".jxl"}  # if not read, named


def find(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields each named file, and the pictures in each named folder and its subfolders, sorted.

    In a folder the ending makes the picture. Hidden files and what is no regular file are passed
    over; links to nothing and folders that may not be listed come out, for `load` to name them.
    """
    for path in map(Path, paths):
        yield from _inside(path, set()) if path.is_dir() else [path]


def _inside(folder: Path, seen: set[Path]) -> Iterator[Path]:
    try:
        inside = sorted(folder.iterdir()) if folder.resolve() not in seen else []
    except OSError:
        inside = []
        yield folder
    seen.add(folder.resolve())  # a link may lead back
    for path in inside:
        if path.is_dir() and not path.name.startswith(_HIDDEN):
            yield from _inside(path, seen)
        elif _is_picture(path):
            yield path


def _is_picture(path: Path) -> bool:
    known = path.suffix.lower() in _formats()[1] and not path.name.startswith(_HIDDEN)
    return known and (path.is_file() or not path.exists())


def load(path: Path, side: int = 32, notes: list[str] | None = None) -> np.ndarray:
    """Reads a picture upright, on white where it is transparent, cut to its central square.

    Values of more than 8 bits come to 0..255 by the range the file states. If it states none, black
    is 0, and white the first of 1, 255, 4095, 65535 and the format's largest that holds the highest
    and is less than 16 times that. Failing this, or with negative values, the lowest value is black
    and the highest white. NaN is black, infinity white.

    Args:
        path: the file.
        side: side of the result, pixels.
        notes: gets a line where the range had to be assumed.

    Returns:
        (side, side, 3) uint8.

    Raises:
        UnusableInput: it is no picture, a damaged one, or one of more than `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a fifo would wait for its writer
            raise ValueError("not a regular file, nor a folder that may be listed")
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            try:
                image, assumed = _upright(file, side)
            except _BROKEN:
                file.seek(0)
                if file.read(len(_PNG)) != _PNG:
                    raise
                # It may lie at what surrounds the pixels: too much text, a broken profile.
                image, assumed = _upright(io.BytesIO(_essential(file)), side)
    except _BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture in a format Pillow knows here; save it as JPEG or PNG"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"more than {MAX_PIXELS:,} pixels; make it smaller"
        raise UnusableInput(f"{printable(path)}: cannot be read ({printable(reason)})") from error
    if assumed and notes is not None:
        notes.append(f"{printable(path)}: {assumed}")
    return np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def _upright(file: BinaryIO, side: int) -> tuple[Image.Image, str]:
    """The picture in RGB, and what was assumed of its range of values."""
    with Image.open(file, formats=_formats()[0]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.draft("RGB", (4 * side, 4 * side))  # JPEG decodes at a fraction of the size
        kind, turn, assumed = image.format, None, ""
        if kind == "TIFF":  # loading turns it, and stumbles over other tags that are odd
            image.info.pop("xmp", None)
            for tag in set(exif := image.getexif()) - {_ORIENTATION}:
                del exif[tag]
        image.load()
        # ImageOps.exif_transpose would write the EXIF anew, and fail where one of its tags is odd.
        with contextlib.suppress(*_BROKEN):
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
        chunks, clear = dict(_chunks(file)) if kind == "PNG" else {}, image.info.get("transparency")
        if image.mode == "F" or image.mode.startswith("I"):
            image, assumed = _grey(image, chunks.get(b"sBIT", bytes(9))[8])
        elif chunks and clear is not None and image.mode in ("L", "RGB"):
            # Pillow brings the samples to 8 bits, but not the colour that stands for transparent.
            top = 2 ** chunks[b"IHDR"][16] - 1
            clear = [c * 255 // top if top < 256 else c >> 8 for c in np.atleast_1d(clear).tolist()]
            image.info["transparency"] = clear[0] if image.mode == "L" else tuple(clear)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            # Old programs write an alpha channel of zeros into these where they have none.
            if kind not in ("BMP", "DIB", "TGA", "ICO", "CUR") or image.getextrema()[3] != (0, 0):
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn), assumed


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Of each chunk of a PNG but the last its type, and all its bytes."""
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        yield head[4:], head + file.read(int.from_bytes(head[:4], "big") + 4)


def _essential(file: BinaryIO) -> bytes:
    """A PNG without its text, profile and animation, none of which is unpacked for that."""
    parts, least = [_PNG], 1
    for kind, chunk in _chunks(file):
        if kind == b"IHDR":
            least = {0: 2, 2: 6}.get(chunk[17], 1)  # bytes of the transparent colour
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        used = kind in (b"eXIf", b"sBIT") or (kind == b"tRNS" and len(chunk) >= 12 + least)
        if not kind[0] & 0x20 or (used and whole):  # a small first letter means optional
            parts.append(chunk)
    return b"".join(parts)


def _grey(image: Image.Image, significant: int) -> tuple[Image.Image, str]:
    """Brings values of more than 8 bits to 0..255, transparent ones to white."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, sign = tags.get(258, (16,))[0], tags.get(339, (1,))[0]  # BitsPerSample, SampleFormat
    if image.mode == "I" and (bits, sign) == (32, 1):
        values = values.view(np.uint32)  # Pillow takes them for signed ones
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    if not finite.size:
        raise ValueError("none of its values is a finite number")
    low, high = float(finite.min()), float(finite.max())
    largest = -1 if image.mode == "F" else 2 ** (bits - (sign == 2)) - 1  # that the format holds
    stated = (tags.get(341) or tags.get(281) or (0,))[0]  # SMaxSampleValue, MaxSampleValue
    if image.format in ("PPM", "JPEG2000") or bits < 16:
        stated = largest
    elif 0 < significant <= 16:
        # sBIT's bits should be the upper ones, which fills the range; some use the lower ones.
        lower = high < 2**significant and (values % 2 ** (16 - significant)).any()
        stated = 2**significant - 1 if lower else 65535
    usual = [top for top in (1, 255, 4095, 65535, largest) if top / 16 < high <= top]
    black, white, assumed = 0, min(usual, default=0), ""
    if isinstance(stated, (int, float)) and 0 <= low <= high <= stated:
        white = stated
    elif low < 0 or (high and white != largest):
        black, white = (0, white) if usual and low >= 0 else (low, high)
        rule = f"does not say which of its values, {low:g} to {high:g}, are black and white"
        assumed = f"{rule}; took {black:g} and {white:g} for them"
    hidden = values == image.info.get("transparency")
    values = np.nan_to_num(values.astype(np.float64).clip(black, white), copy=False, nan=black)
    values = np.rint((values - black) * 255 / (white - black or 1))
    values[hidden] = 255
    values = 255 - values if tags.get(262) == 0 else values  # PhotometricInterpretation
    return Image.fromarray(values.astype(np.uint8)), assumed


def folder(
    path: Path, side: int, *, val_fraction: float, seed: int, test_fraction=0.15
) -> tuple[Arrays, dict[str, Any]]:
    """Reads a folder per class; `train/`, `val/` and `test/` above them are honoured.

    Images lie in the order of their names within the classes, so that numbered ones of all classes
    mix as they were numbered. What cannot be read is named on stderr and left out.

    Args:
        path: holds the folders of the classes, or of the splits.
        side: of the squares, pixels.
        val_fraction: above 0, every class must have a training image to spare for validation.
        test_fraction: without `test/`, the share of every class that becomes test images.
        seed: chooses them.

    Returns:
        The arrays, with validation images from `val/` only, and what a run should record of them.

    Raises:
        UnusableInput: the folders are not like this, or the pictures would not fit into memory.
    """
    from runtime.memory import available_memory

    name = printable(path)
    classes, listed = _listed(Path(path))
    needed = 1 + ("test" not in listed) + ("val" not in listed and val_fraction > 0)
    _check(name, classes, "train", [label for _, label, _ in listed["train"]], needed)
    total = sum(map(len, listed.values()))
    taken, free = total * side * side * 3 / 1e9, available_memory() / 1e9
    if taken > free / 2:  # it is copied once
        rule = f"{total:,} pictures of {side} px take {taken:.2g} of the {free:.2g} GB free"
        raise UnusableInput(f"{name}: {rule}; use a smaller --image-size or fewer pictures")
    data = {split: _read(those, side) for split, those in listed.items()}
    for split, (_, labels) in data.items():
        _check(name, classes, split, labels, needed if split == "train" else 1)
    if "test" not in data:
        images, labels = data["train"]
        kept, held = stratified_split(labels, test_fraction, seed, at_least=1, leave=needed - 1)
        data |= {"train": (images[kept], labels[kept]), "test": (images[held], labels[held])}
    made = f"made (seed {seed}, {100 * test_fraction:g} % test)"
    counts = np.bincount(np.concatenate([labels for _, labels in data.values()])).tolist()
    return Arrays(classes, *data["train"], *data["test"], *data.get("val", (None, None))), {
        **{"source": "pictures", "folder": name},
        **{"read": sum(counts), "unreadable": total - sum(counts)},
        "per_class": dict(zip(classes, counts, strict=True)),
        "splits": "as given" if "test" in listed else made,
    }


def _listed(path: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int, Path]]]]:
    """The classes; of each split the pictures, as name within the class, label and file."""

    def folders(path: Path) -> dict[str, Path]:
        inside = sorted(p for p in path.iterdir() if p.is_dir())
        return {p.name: p for p in inside if not p.name.startswith(_HIDDEN)}

    name = printable(path)
    if not path.is_dir():
        raise UnusableInput(f"{name}: no such folder; name one that holds a folder per class")
    top = folders(path)
    inside = {split: folders(top[split]) for split in ("train", "val", "test") if split in top}
    if "train" not in top and any(inside.values()):
        raise UnusableInput(f"{name}: holds val/ or test/, but no train/; add it")
    if not inside.get("train") or any(map(_is_picture, top["train"].iterdir())):
        inside = {"train": top}  # a folder train/ is a class
    classes = list(inside["train"])
    if not 2 <= len(classes) <= 1000:
        raise UnusableInput(f"{name}: {len(classes):,} folders of classes; make it two to 1,000")
    listed = {}
    for split, those in inside.items():
        if more := sorted(those.keys() - set(classes)):
            raise UnusableInput(f"{name}: {split}/{printable(more[0])} is not in train/; add it")
        files = ((file, c) for c in those for file in find([those[c]]))
        listed[split] = sorted((f.relative_to(those[c]), classes.index(c), f) for f, c in files)
    if (outside := len(list(find([path]))) - sum(map(len, listed.values()))) > 0:
        _say([f"{name}: {outside:,} pictures outside the folders of classes are left out"])
    return tuple(c if c.isprintable() else printable(c) for c in classes), listed


def _check(name: str, classes: Iterable[str], split: str, labels: Any, needed: int) -> None:
    """Refuses classes too small to be split; names those that a given split lacks."""
    counts = np.bincount(np.array(labels, np.int64), minlength=len(classes)).tolist()
    few = [f"{n} pictures of class {c}" for c, n in zip(classes, counts, strict=True) if n < needed]
    if few and (split == "train" or len(few) == len(classes)):
        rule = f"has {few[0]} that can be read for {split}, {needed} are needed (one per split)"
        raise UnusableInput(f"{name}: {rule}; add some, or take the folder away")
    _say([f"{name}: {split}/ has {line}" for line in few])


def _read(listed: list[Any], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares (N, side, side, 3) uint8 and labels (N,) int64 of those that can be read."""
    lines: list[str] = []

    def read(file: Path) -> np.ndarray | None:
        try:
            return load(file, side, lines)
        except UnusableInput as error:
            if isinstance(error.__cause__, MemoryError):
                raise  # not the picture's fault
            lines.append(f"{error}; left out")

    pool = ThreadPoolExecutor()  # Pillow works without Python's lock
    try:
        with warnings.catch_warnings():  # threads share the filters: this puts them back
            warnings.simplefilter("ignore")
            done = pool.map(read, [file for _, _, file in listed])
            squares = list(tqdm(done, total=len(listed), unit=" pictures", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # a signal does not wait for the rest
    _say(sorted(lines))
    good = [square is not None for square in squares]
    labels = np.array([label for _, label, _ in listed], np.int64)
    return np.array([s for s in squares if s is not None], np.uint8), labels[good]


def _say(lines: list[str]) -> None:
    more = [f"and {len(lines) - 10:,} more like these"] * (len(lines) > 10)
    print(*lines[:10], *more, sep="\n", end="\n" * bool(lines), file=sys.stderr)
