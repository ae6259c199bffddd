"""Sound pictures with odd surroundings: EXIF, text, profiles, transparency, depths.

Each is written byte by byte, 32 x 32 pixels, so that what `pictures.load` must return is known.
"""

import argparse
import collections
import io
import random
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))

from errors import UnusableInput
from sources import pictures

SIDE = 32
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a viewer does to show a picture stored with each orientation (EXIF 2.32, 4.6.4).
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}

_BIG = zlib.compress(bytes(3 << 20), 9)  # Pillow unpacks at most 1 MiB
_HUGE = zlib.compress(bytes(20 << 20), 9)
# Chunks that Pillow knows; not tRNS, which junk makes transparency.
_KNOWN = (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"fcTL", b"eXIf", b"sBIT", b"prVt", b"tIME")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, depth: int, colour: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG of samples (H, W) or (H, W, channels), with chunks before and after its pixels."""
    rows = np.asarray(values).reshape(len(values), -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(len(rows), -1), axis=-1)
    data = zlib.compress(np.insert(packed, 0, 0, axis=1).tobytes())
    size = (np.shape(values)[1], len(rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"".join(
        (SIGNATURE, head, *before, chunk(b"IDAT", data[:40]), chunk(b"IDAT", data[40:]), after)
    ) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, kind: int = 1, order: str = "<", **tags: tuple[int, float]) -> bytes:
    """An uncompressed grey TIFF of a SampleFormat; more tags come as `t281=(type, value)`."""
    values = np.asarray(values)
    height, width = values.shape
    entries: dict[int, tuple[int, float]] = {
        **{256: (4, width), 257: (4, height), 258: (3, values.itemsize * 8), 259: (3, 1)},
        **{262: (3, 1), 277: (3, 1), 278: (4, height), 279: (4, values.nbytes), 339: (3, kind)},
    }
    entries |= {int(name[1:]): entry for name, entry in tags.items()}
    entries[273] = (4, 14 + 12 * (len(entries) + 1))
    words = [
        struct.pack(order + "HHI", tag, form, 1)
        + struct.pack(order + {3: "H", 4: "I", 11: "f"}[form], value).ljust(4, b"\0")
        for tag, (form, value) in sorted(entries.items())
    ]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(words))
    return (
        head
        + b"".join(words)
        + bytes(4)
        + values.astype(values.dtype.newbyteorder(order)).tobytes()
    )


def exif(
    orientation: int, *odd: tuple[int, int, int, bytes], order: str = "<", form: int = 3
) -> bytes:
    """EXIF with an orientation and other raw entries: tag, type, count, and four bytes."""
    value = struct.pack(order + {3: "H", 4: "I"}[form], orientation).ljust(4, b"\0")
    entries = sorted([(0x0112, form, 1, value), *odd])
    words = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    return b"Exif\0\0" + head + words + bytes(4)


def negative_altitude(orientation: int, order: str = "<") -> bytes:
    """EXIF of a telephone whose GPSAltitude is an SRATIONAL of (-1, 0)."""
    gps = 8 + 2 + 2 * 12 + 4
    data = exif(orientation, (0x8825, 4, 1, struct.pack(order + "I", gps)), order=order)
    entry = struct.pack(order + "HHHII", 1, 6, 10, 1, gps + 18)
    return data + entry + bytes(4) + struct.pack(order + "ii", -1, 0)


def jpeg(image: np.ndarray, exif_data: bytes = b"") -> tuple[bytes, np.ndarray]:
    """A JPEG with the EXIF as it is, and the pixels it decodes to."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    plain = buffer.getvalue()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif_data) + 2) + exif_data
    with Image.open(io.BytesIO(plain)) as decoded:
        return plain[:2] + segment * bool(exif_data) + plain[2:], np.asarray(decoded.convert("RGB"))


def generate(rng: random.Random, count: int) -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    """Yields pictures of a random kind.

    Args:
        rng: chooses everything.
        count: how many.

    Yields:
        What is odd about it, the file, and the pixels (32, 32, 3) uint8 that it shows; None where
        Pillow is to be asked.
    """
    kinds = (_odd_exif, _odd_chunks, _transparent, _deep_tiff, _deep_png, _empty_alpha, _cut)
    for _ in range(count):
        yield rng.choice(kinds)(rng, np.random.default_rng(rng.getrandbits(64)))


def _odd_exif(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, np.ndarray]:
    orientation, order = rng.randrange(10), rng.choice("<>")
    number = struct.pack(order + "I", rng.choice((0, 7, 40, 4000, 2**31, 2**32 - 5)))
    odd = rng.choice(
        (
            [(0x8825, 4, 1, number)],  # pointers to nowhere
            [(0x8769, 9, 1, number), (0x8825, 11, 1, number)],
            [(0x8825, 3, 9, number)],
            [(0x011A, 5, 1, number), (0x011B, 5, 2, number)],  # resolution
            [(0x010F, 2, 2**31, number)],  # the maker's name, two billion letters
            [(0x9C9C, 1, 12, number), (0x927C, 7, 4000, number)],  # XPComment, MakerNote
            [(0x0213, rng.randrange(256), 1, number)],  # of a type that does not exist
        )
    )
    if (made := rng.randrange(4)) == 0:
        data = negative_altitude(orientation, order)
    elif made == 1:
        data = exif(orientation, *odd, order=order, form=4)
    else:
        data = exif(orientation, *odd, order=order)
        data = data[: rng.randrange(28, len(data))] if made == 2 and odd[0][0] > 0x0112 else data
    if rng.random() < 0.2:  # no EXIF at all
        data, orientation = b"Exif\0\0" + values.bytes(rng.randrange(60)), 1
    image = values.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    turn = TURNS.get(orientation, TURNS[1])
    if rng.random() < 0.5:
        file, shown = jpeg(image, data)
        return f"around JPEG: EXIF, orientation {orientation}", file, turn(shown)
    file = png(image, 8, 2, chunk(b"eXIf", data[6:]))
    return f"around PNG: EXIF, orientation {orientation}", file, turn(image)


def _odd_chunks(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, np.ndarray]:
    junk = values.bytes(rng.randrange(64))
    packed = rng.choice((_BIG, _HUGE, junk, _BIG[: rng.randrange(len(_BIG))]))
    kind, data = rng.choice(
        (
            (b"zTXt", b"Comment\0\0" + packed),
            (b"zTXt", b"Comment\0\7" + packed),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
            (b"iTXt", b"Comment\0\1\0en\0\xff\0" + packed),
            (b"iCCP", b"ICC\0\0" + packed),
            (b"iCCP", b"ICC\0\3" + packed),
            (b"tEXt", b"\xff\0" + bytes(1 << 20)),
            *((known, junk[: rng.randrange(8)]) for known in _KNOWN),
            *((known, junk) for known in _KNOWN),
        )
    )
    odd = chunk(kind, data)
    if rng.random() < 0.2:
        odd = odd[:-1] + bytes([odd[-1] ^ 1])
    odd *= rng.choice((1, 1, 2, 3))
    colour, channels = rng.choice(((0, 1), (2, 3), (3, 1), (4, 2), (6, 4)))
    image = values.integers(0, 256, (SIDE, SIDE, channels), np.uint8)
    palette = values.integers(0, 256, (256, 3), np.uint8)
    shown = np.broadcast_to(image[..., :1] if channels < 3 else image[..., :3], (SIDE, SIDE, 3))
    if colour == 3:
        shown = palette[image[..., 0]]
    elif colour > 3:
        image[..., -1] = 255
    before = [chunk(b"PLTE", palette.tobytes())] * (colour == 3)
    name = f"around PNG: {kind.decode()} of {len(data)} bytes, colour {colour}"
    if rng.random() < 0.3:
        whole = png(image, 8, colour, *before, after=odd)
        end = len(whole) - rng.randrange(len(odd) + 12) if rng.random() < 0.5 else None
        return name + ", behind", whole[:end], shown
    return name, png(image, 8, colour, *before, odd), shown


def _transparent(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, np.ndarray]:
    depth, colour = rng.choice(((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)))
    some = values.integers(0, 2**depth, 4)  # few colours, so that one may be chosen
    some[0] = 2**depth - 1
    image = some[values.integers(0, 4, (SIDE, SIDE, 3 if colour else 1))]
    clear = image[rng.randrange(SIDE), rng.randrange(SIDE)]
    level = image >> 8 if colour and depth == 16 else np.rint(image * (255 / (2**depth - 1)))
    shown = np.broadcast_to(level, (SIDE, SIDE, 3)).astype(np.uint8)
    hidden = (image == clear).all(-1)
    if depth == 16 and colour:  # Pillow keeps 8 bits, so all that are then alike
        hidden = (shown == shown[hidden][0]).all(-1)
    data = struct.pack(f">{clear.size}H", *clear.tolist())
    if rng.random() < 0.2:
        data, hidden = data[:-1], np.zeros_like(hidden)
    file = png(image, depth, colour, chunk(b"tRNS", data))
    shown = np.where(hidden[..., None], 255, shown).astype(np.uint8)
    return f"PNG, {depth} bits, tRNS of {len(data)} bytes", file, shown


def _grey(values: np.ndarray, black: float, white: float) -> np.ndarray:
    above = np.clip(values.astype(np.float64), black, white) - black
    return np.repeat(np.rint(above * 255 / (white - black))[..., None], 3, -1).astype(np.uint8)


def _deep_tiff(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, np.ndarray]:
    order = rng.choice("<>")
    form, kind, low, high, black, white = rng.choice(
        (
            ("f4", 3, 0, 1, 0, 1),
            ("f4", 3, 0, 255, 0, 255),
            ("f4", 3, 0, 4000, 0, 4095),
            ("f4", 3, -3, 5, None, None),
            ("f4", 3, -1e30, -1e3, None, None),
            ("f4", 3, 1e6, 2e6, None, None),
            ("f4", 3, 0, 1e-3, None, None),
            ("i4", 2, 0, 256, 0, 255),
            ("i4", 2, 0, 4096, 0, 4095),
            ("i4", 2, 0, 65536, 0, 65535),
            ("i4", 2, 0, 2**31, 0, 2**31 - 1),
            ("i4", 2, -500, 500, None, None),
            ("i4", 2, 10**6, 10**6 + 300, None, None),
            ("i2", 2, 0, 2**15, 0, 2**15 - 1),
            ("i2", 2, -(2**15), 2**15, None, None),
            ("u2", 1, 0, 65536, 0, 65535),
            ("u2", 1, 0, 4096, 0, 4095),
            ("u2", 1, 0, 256, 0, 255),
            ("u2", 1, 0, 2, 0, 1),
        )
    )
    if kind == 3:
        image = values.uniform(low, high, (SIDE, SIDE)).astype(form)
        image[0, 0] = high
    else:
        image = values.integers(low, high, (SIDE, SIDE)).astype(form)
        image[0, 0] = high - 1
    if black is None:
        black, white = float(image.min()), float(image.max())
    shown, name = _grey(image, black, white), f"TIFF, {form} of {low} to {high}"
    if kind == 3 and rng.random() < 0.5:
        odd = values.choice([np.nan, np.inf, -np.inf], (SIDE, SIDE))
        where = values.random((SIDE, SIDE)) < rng.choice((0.001, 0.3))
        where[0, 0] = where[image.argmin() // SIDE, image.argmin() % SIDE] = False
        where[image == image.max()] = False
        image[where] = odd[where]
        shown[where] = np.where(odd == np.inf, 255, 0)[where][:, None]
        name += ", not all finite"
    tags = {}
    if form == "u2" and rng.random() < 0.5:
        top = rng.choice((high - 1, 65535))
        tags["t281"], shown = (3, top), _grey(image, 0, top)
    if rng.random() < 0.3 and (form == "f4" or (form == "u2" and order == "<")):
        tags["t262"], shown = (3, 0), 255 - shown  # zero is white; Pillow opens no others
    return name, tiff(image, kind, order, **tags), shown


def _deep_png(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, np.ndarray]:
    bits, low = rng.randrange(8, 17), rng.random() < 0.5
    image = values.integers(0, 2**bits, (SIDE, SIDE))
    image[0, :2] = 2**bits - 1, 1
    if not low:
        image <<= 16 - bits
        if rng.random() < 0.3:  # a dark one
            image = image >> 3 & -1 << 16 - bits
    file = png(image, 16, 0, chunk(b"sBIT", bytes([bits])))
    shown = _grey(image, 0, 2**bits - 1 if low else 65535)
    return f"PNG, {'lower' if low else 'upper'} {bits} bits", file, shown


def _empty_alpha(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, np.ndarray]:
    image = values.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    image[..., 3] = 255 * values.integers(0, 2, (SIDE, SIDE)) * rng.randrange(2)
    hidden = (image[..., 3:] == 0) if image[..., 3].any() else np.zeros((SIDE, SIDE, 1), bool)
    shown = np.where(hidden, 255, image[..., :3]).astype(np.uint8)
    buffer, kind = io.BytesIO(), rng.choice(("TGA", "BMP"))
    if kind == "TGA":
        Image.fromarray(image).save(buffer, kind, compression=rng.choice((None, "tga_rle")))
        return f"{kind}, alpha up to {image[..., 3].max()}", buffer.getvalue(), shown
    pixels = image[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    info = info.ljust(108, b"\0")
    file = b"BM" + struct.pack("<IHHI", 14 + 108 + len(pixels), 0, 0, 14 + 108) + info + pixels
    return f"{kind}, alpha up to {image[..., 3].max()}", file, shown


def _cut(rng: random.Random, values: np.random.Generator) -> tuple[str, bytes, None]:
    image = values.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    whole = png(image, 8, 2) if rng.random() < 0.5 else jpeg(image)[0]
    return "cut", whole[: rng.randrange(len(whole))], None


def pillows(content: bytes) -> np.ndarray | None:
    """The pixels that Pillow gives, None where it refuses."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:  # of any kind, which is the reason for this file
        return None


def compare(count: int, seed: int = 0, report: bool = False) -> dict[str, int]:
    """Loads `count` odd pictures.

    Returns:
        How many are `equal` to what they show, and where only their surroundings are odd also to
        what Pillow shows if it opens them; how many cut ones both refuse (`refused`); and how many
        are `different`, sound ones that were refused included.
    """
    counts = collections.Counter(equal=0, refused=0, different=0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "picture")
        for name, content, shown in generate(random.Random(seed), count):
            path.write_bytes(content)
            views = [shown] if shown is not None else []
            if shown is None or name.startswith("around"):
                views += [view for view in [pillows(content)] if view is not None]
            try:
                result, problem = pictures.load(path, SIDE), ""
            except UnusableInput as error:
                result, problem = None, str(error)
            if result is None:
                outcome = "different" if views else "refused"
            else:
                same = views and all(np.array_equal(result, view) for view in views)
                outcome = "equal" if same else "different"
            counts[outcome] += 1
            if report and outcome == "different":
                print(f"{name}: {problem}", file=sys.stderr)
    return dict(counts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = compare(args.count, args.seed, report=True)
    print(", ".join(f"{name} {n}" for name, n in counts.items()))
    sys.exit(counts["different"] > 0)


if __name__ == "__main__":
    main()
