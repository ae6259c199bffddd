"""A person's own pictures, of any size, mode or format Pillow opens, as CIFAR-10 images."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A photograph of 100 million pixels already takes 300 MB once decoded.
MAX_PIXELS = 100_000_000


def find(paths: list[Path]) -> Iterator[Path]:
    """Yields each named file, and every file with a picture's ending in each named folder."""
    endings = {e for e, kind in Image.registered_extensions().items() if kind in readable()}
    for path in paths:
        if path.is_dir() and os.access(path, os.R_OK):
            yield from sorted(p for p in path.iterdir() if p.suffix.lower() in endings)
        else:
            yield path


def readable() -> list[str]:
    """The formats Pillow opens by itself; for EPS it would run Ghostscript, a whole language."""
    Image.init()
    return sorted(Image.OPEN.keys() - {"EPS"})


def load(path: Path, size: int = 32) -> np.ndarray:
    """Reads a picture upright, on white where it is transparent, cut to its central square.

    Args:
        path: the file.
        size: side of the result, pixels.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ValueError: it is no picture, a damaged one, or one of more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            with Image.open(path, formats=readable()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                image.draft("RGB", (8 * size, 8 * size))  # JPEG decodes at a fraction of the size
                image = ImageOps.exif_transpose(image)
                return np.asarray(_square(_rgb(image), size))
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture in a format Pillow knows") from None
    except (
        *(OSError, SyntaxError, EOFError, LookupError, TypeError, ValueError, ArithmeticError),
        *(AttributeError, RuntimeError, MemoryError, struct.error, zlib.error),
    ) as error:  # Pillow's decoders raise any of these for damaged files
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: bring to 0..255
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(values.max(), 1e-9)
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
