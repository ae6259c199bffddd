"""One picture of any size, mode or format Pillow opens, as a small square in sRGB."""

import contextlib
import functools
import hashlib
import io
import math
import statistics
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from errors import UnusableInput, printable

try:
    import pillow_heif  # photographs of telephones
except ImportError:
    pillow_heif = None

MEASURED = 200  # pictures whose sizes stand for those of a folder
MAX_PIXELS = 100_000_000  # a photograph of that many takes 300 MB once decoded
# For EPS Pillow would run Ghostscript, a whole language; the others it knows but cannot draw.
_NOT_DRAWN = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
# What fills a padded square: ImageNet's mean colour, which is 0 to a network once normalised.
PADDING = (124, 116, 104)
HIDDEN = (".", "__MACOSX")  # how names begin that no one means
_ORIENTATION = 0x0112  # the tag of EXIF that says how to turn a picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
# Old programs write an alpha channel of zeros into these where they have none.
_ALPHA_OF_ZEROS = ("BMP", "DIB", "TGA", "ICO", "CUR")
_PNG_DEPTH = 24  # byte of a PNG that says how many bits a sample has
_WHITE_IS_ZERO = 0  # a value of TIFF's tag 262, PhotometricInterpretation
_BROKEN = (  # what Pillow's decoders raise for damaged files
    OSError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Loaded(NamedTuple):
    """A picture that was read."""

    square: np.ndarray  # (side, side, 3) uint8
    hash: str  # hex SHA-256 of the file's bytes
    size: tuple[int, int]  # width and height of the upright picture, pixels


@functools.cache
def _formats() -> tuple[list[str], set[str]]:
    """The formats that are read, and the endings that make a file in a folder a picture."""
    if pillow_heif:
        pillow_heif.register_heif_opener()
    Image.init()
    formats = Image.OPEN.keys() - _NOT_DRAWN
    endings = {end for end, kind in Image.registered_extensions().items() if kind in formats}
    return sorted(formats), endings | {".heic", ".heif", ".avif", ".jxl"}  # if not read, named


def find(paths: Iterable[Path]) -> list[Path]:
    """Each named file, and the pictures in each named folder, see `search`."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += search(path)[0]
        else:
            found.append(path)
    return found


def search(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures in a folder and its subfolders, and the other files there, each sorted.

    The ending makes the picture. Hidden files and what is no regular file are passed over; links to
    nothing and folders that may not be listed are among the pictures, for `load` to name them.
    """
    pictures: list[Path] = []
    others: list[Path] = []
    seen: set[Path] = set()

    def look_into(folder: Path) -> None:
        if folder.resolve() in seen:  # a link leads back
            return
        seen.add(folder.resolve())
        try:
            inside = sorted(folder.iterdir())
        except OSError:
            pictures.append(folder)
            return
        for path in inside:
            if path.name.startswith(HIDDEN):
                continue
            if path.is_dir():
                look_into(path)
            elif path.is_file() or not path.exists():
                kind = pictures if has_picture_ending(path) else others
                kind.append(path)

    look_into(folder)
    return pictures, others


def median_side(folder: Path) -> int:
    """The median of the shorter sides, pixels, of pictures spread over a folder.

    0 where there are none that can be opened: reading them will say why.
    """
    found = search(folder)[0] if folder.is_dir() else []
    sides = []
    for path in found[:: math.ceil(max(len(found), 1) / MEASURED)]:
        if path.is_file():  # opening a fifo would wait for its writer
            with contextlib.suppress(*_BROKEN), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(path, formats=_formats()[0]) as image:
                    sides.append(min(image.size))
    return int(statistics.median(sides)) if sides else 0


def has_picture_ending(path: Path) -> bool:
    """Whether a file's name ends as those of pictures do."""
    return path.suffix.lower() in _formats()[1]


def load(path: Path, side: int = 32, fit: str = "crop") -> np.ndarray:
    """Reads a picture upright, in sRGB, on white where transparent, as a square.

    Grey values of more than 8 bits, floats among them, are stretched from the lowest to the highest
    finite one: scans and X-rays seldom fill their range, and seldom say which part they use. A
    colour profile that is broken or belongs to another kind of picture is ignored.

    Args:
        path: the file.
        side: side of the result, pixels.
        fit: how it becomes a square: "crop" keeps the central square, "pad" all of it, with
            `PADDING` beside it, "squash" all of it, with its proportions lost.

    Returns:
        (side, side, 3) uint8.

    Raises:
        UnusableInput: it is no picture, a damaged one, or one of more than `MAX_PIXELS`.
    """
    return load_hashed(path, side, fit).square


def whole(path: Path, longer_side: int) -> np.ndarray:
    """Reads a picture as `load` does, but all of it, with its proportions.

    Args:
        path: the file.
        longer_side: of the result, pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnusableInput: see `load`.
    """
    read = load_hashed(path, longer_side, "pad")
    width, height = _inside(read.size, longer_side)
    left = (longer_side - width) // 2
    top = (longer_side - height) // 2
    return read.square[top : top + height, left : left + width]


def load_hashed(path: Path, side: int, fit: str) -> Loaded:
    """As `load`, with the hash of the file's bytes, which are read once, and the picture's size."""
    try:
        if path.exists() and not path.is_file():  # opening a fifo would wait for its writer
            raise ValueError("not a regular file, nor a folder that may be listed")
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            square, size = _decode(content, side, fit)
    except _BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture in a format Pillow knows here; save it as JPEG or PNG"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"more than {MAX_PIXELS:,} pixels; make it smaller"
        raise UnusableInput(f"{printable(path)}: cannot be read ({printable(reason)})") from error
    return Loaded(square, hashlib.sha256(content).hexdigest(), size)


def _decode(content: bytes, side: int, fit: str) -> tuple[np.ndarray, tuple[int, int]]:
    """The square, and width and height of the upright picture."""
    with Image.open(io.BytesIO(content), formats=_formats()[0]) as image:
        size = image.size
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.draft("RGB", (4 * side, 4 * side))  # JPEG decodes at a fraction of the size
        image.load()
        profile = image.info.get("icc_profile")
        turn = _turn(image)
        if image.format == "PNG":
            _scale_transparency(image, num_bits=content[_PNG_DEPTH])
        if image.mode == "F" or image.mode.startswith("I"):
            image = _stretched(image)
        elif image.has_transparency_data:
            image = _on_white(image)
        elif image.mode == "1":
            image = image.convert("L")
        elif image.mode not in ("L", "RGB", "CMYK"):
            image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    if turn in _ON_ITS_SIDE:
        size = size[::-1]
    if fit == "crop":
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    elif fit == "pad":
        image = image.resize(_inside(size, side), Image.Resampling.LANCZOS)
    else:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    image = _in_srgb(image, profile)
    if image.size != (side, side):
        padded = Image.new("RGB", (side, side), PADDING)
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = padded
    return np.array(image), size


def _inside(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side becomes the side of a square."""
    longer = max(size)
    width = max(1, round(size[0] * side / longer))
    height = max(1, round(size[1] * side / longer))
    return width, height


def _turn(image: Image.Image) -> Image.Transpose | None:
    # ImageOps.exif_transpose writes the EXIF anew and fails where another of its tags is odd.
    with contextlib.suppress(*_BROKEN):
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    return None


def _scale_transparency(image: Image.Image, num_bits: int) -> None:
    """Brings the transparent colour of a PNG to 8 bits, as Pillow has brought its samples.

    Args:
        image: its `info` is changed in place.
        num_bits: of a sample in the file.
    """
    clear = image.info.get("transparency")
    if image.mode == "RGB" and num_bits == 16 and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif image.mode == "L" and num_bits < 8 and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // (2**num_bits - 1)


def _stretched(image: Image.Image) -> Image.Image:
    """Brings values of more than 8 bits to 0..255; NaN is black, infinity and clear are white."""
    values = np.asarray(image).astype(np.float64)
    is_clear = values == image.info.get("transparency", np.nan)
    finite = values[np.isfinite(values) & ~is_clear]
    if not finite.size:
        raise ValueError("none of its values is a finite number that shows")
    low = finite.min()
    span = finite.max() - low
    values = np.nan_to_num(values.clip(low, finite.max()), nan=low) - low
    if span > 0:
        values *= 255 / span
    if getattr(image, "tag_v2", {}).get(262) == _WHITE_IS_ZERO:
        values = 255 - values
    values[is_clear] = 255
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("1", "L", "LA")
    may_lack_alpha = image.format in _ALPHA_OF_ZEROS
    image = image.convert("RGBA")
    if not may_lack_alpha or image.getchannel("A").getextrema() != (0, 0):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        with contextlib.suppress(*_BROKEN, ImageCms.PyCMSError):
            return ImageCms.applyTransform(image, _to_srgb(profile, image.mode))
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)  # it takes 4 ms to make, and a folder holds few profiles
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
