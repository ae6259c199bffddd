"""What people's own pictures look like to the network, and which of them is in which split."""

import csv
import errno
import io
import json
import os
import re
import shutil
import struct
import threading
import time
import types
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import outcome
from PIL import Image, ImageCms, ImageFile

import train_custom
from errors import UnusableInput
from reports import picture_list
from runs import training
from runtime import memory
from sources import known_pictures, picture_folder, pictures
from sources.known_pictures import changes
from sources.picture_folder import Picture
from storage import checkpoint
from storage.files import sha256

RAMP = np.tile(np.arange(0, 256, 8), (32, 1))  # 0, 8, ... 248 from left to right
UNIT = RAMP / 248
STRETCHED = np.rint(UNIT * 255)
COLOURS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
HALVES = np.zeros((40, 60, 3), np.uint8)
HALVES[:, :30] = 255  # white on the left


def loaded(tmp_path, content):
    path = tmp_path / "picture"
    path.write_bytes(content)
    return pictures.load(path, 32)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_small_picture_keeps_its_very_bits(tmp_path):
    for kind in ("PNG", "BMP", "TIFF", "PPM", "TGA"):
        assert np.array_equal(loaded(tmp_path, saved(COLOURS, kind)), COLOURS), kind


def test_a_large_picture_is_reduced_by_lanczos_from_its_central_square(tmp_path):
    image = Image.fromarray(COLOURS).resize((100, 60))
    expected = image.resize((32, 32), Image.Resampling.LANCZOS, box=(20, 0, 80, 60))
    assert np.array_equal(loaded(tmp_path, saved(image, "PNG")), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_every_mode_shows_its_central_square_in_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(HALVES[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(HALVES).convert(mode)
    result = loaded(tmp_path, saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert result.shape == (32, 32, 3)
    assert result[:, :12].min() > 245
    assert result[:, 20:].max() < 10


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TGA"])
def test_what_is_transparent_is_white(tmp_path, kind):
    alpha = np.full((32, 32, 1), 255, np.uint8)
    alpha[16:] = 0
    options = {"lossless": True} if kind == "WEBP" else {}
    result = loaded(tmp_path, saved(np.dstack([COLOURS, alpha]), kind, **options))
    assert np.array_equal(result[:16], COLOURS[:16])
    assert result[16:].min() == 255


@pytest.mark.parametrize("kind", ["TGA", "ICO", "BMP"])
def test_alpha_of_zeros_everywhere_is_no_transparency(tmp_path, kind):
    options = {"sizes": [(32, 32)]} if kind == "ICO" else {}
    image = np.dstack([COLOURS, np.zeros((32, 32), np.uint8)])
    assert np.array_equal(loaded(tmp_path, saved(image, kind, **options)), COLOURS)


def with_odd(values, *odd):
    values = np.array(values, np.float32)
    values[5, 10 : 10 + len(odd)] = odd
    return values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (UNIT.astype("f4"), STRETCHED),
        ((UNIT * 2 - 7).astype("f4"), STRETCHED),
        ((RAMP * 257).astype("u2"), STRETCHED),
        ((RAMP * 16 + 99).astype("u2"), STRETCHED),  # twelve bits, of an X-ray
        ((RAMP * 16 + 99).astype(">u2"), STRETCHED),
        ((RAMP - 50).astype("i4"), STRETCHED),
        (np.full((32, 32), 700, "u2"), RAMP * 0),
    ],
)
def test_deep_greys_are_stretched_from_their_lowest_to_their_highest_value(
    tmp_path, values, expected
):
    result = loaded(tmp_path, saved(values, "TIFF"))
    assert np.array_equal(result, np.dstack([expected] * 3))


def test_a_deep_tiff_whose_zero_is_white_is_not_seen_as_its_negative(tmp_path):
    content = saved((RAMP * 257).astype("u2"), "TIFF")
    entry = struct.pack("<HHIH", 262, 3, 1, 1)
    assert entry in content
    result = loaded(tmp_path, content.replace(entry, struct.pack("<HHIH", 262, 3, 1, 0)))
    assert np.array_equal(result[..., 0], 255 - STRETCHED)


def test_one_value_that_is_no_number_changes_no_other(tmp_path):
    whole = loaded(tmp_path, saved(with_odd(UNIT), "TIFF"))
    odd = loaded(tmp_path, saved(with_odd(UNIT, np.nan, np.inf, -np.inf), "TIFF"))
    assert odd[5, 10:13, 0].tolist() == [0, 255, 0]
    odd[5, 10:13] = whole[5, 10:13]
    assert np.array_equal(odd, whole)
    with pytest.raises(UnusableInput, match="finite"):
        loaded(tmp_path, saved(with_odd(UNIT * np.nan), "TIFF"))


# --- orientation -------------------------------------------------------------------------------

TURNS = {  # of EXIF's Orientation, what makes a picture upright
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_comes_out_upright(tmp_path, kind):
    options = {"quality": 100, "lossless": True} if kind != "TIFF" else {}
    plain = loaded(tmp_path, saved(COLOURS, kind, **options))
    for value in range(10):
        data = Image.Exif()
        data[0x0112] = value
        result = loaded(tmp_path, saved(COLOURS, kind, exif=data, **options))
        assert np.array_equal(result, TURNS.get(value, np.array)(plain)), value


def exif(*entries):
    """EXIF whose tags are given as (tag, type, count, value), each of four bytes."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


UPRIGHT_BY_6 = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize(
    ("data", "turn"),
    [
        (exif(UPRIGHT_BY_6, (0x8825, 4, 1, b"\xff\xff\xff\x7f")), TURNS[6]),  # GPS is nowhere
        (exif(UPRIGHT_BY_6, (0x011A, 5, 2, b"\x08\0\0\0")), TURNS[6]),
        (exif(UPRIGHT_BY_6, (0x0213, 99, 1, b"abcd")), TURNS[6]),
        (exif((0x0112, 2, 4, b"abcd")), np.array),
        (b"Exif\0\0II*\0" + b"\xff" * 40, np.array),
        (b"Exif\0\0nonsense", np.array),
    ],
)
def test_odd_exif_costs_no_picture_and_the_orientation_in_it_is_heeded(tmp_path, data, turn):
    plain = loaded(tmp_path, saved(COLOURS, "JPEG"))
    assert np.array_equal(loaded(tmp_path, saved(COLOURS, "JPEG", exif=data)), turn(plain))


# --- colour profiles ---------------------------------------------------------------------------


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space, connection, **tags):
    """A minimal ICC profile (ICC.1:2001-04), of the tags its kind needs."""
    tags |= {"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    tags |= {"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"a" + bytes(79)}
    table, content = b"", b""
    for name, body in tags.items():
        start = 132 + 12 * len(tags) + len(content)
        table += struct.pack(">4sII", name.encode(), start, len(body))
        content += body + bytes(-len(body) % 4)
    size = 132 + len(table) + len(content)
    head = struct.pack(">IIIIII", size, 0, 0x02400000, 0, 0, 0)[:12]
    head += (b"prtr" if space == b"CMYK" else b"mntr") + space + connection
    head += struct.pack(">6H", 2001, 4, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def adobe_rgb():
    """Adobe RGB (1998): its primaries, adapted to D50, and its gamma."""
    primaries = {
        "rXYZ": (0.60974, 0.31111, 0.01947),
        "gXYZ": (0.20528, 0.62567, 0.06087),
        "bXYZ": (0.14919, 0.06322, 0.74457),
    }
    tags = {name: b"XYZ " + bytes(4) + fixed(*xyz) for name, xyz in primaries.items()}
    tags |= {name: gamma(2.19921875) for name in ("rTRC", "gTRC", "bTRC")}
    return profile(b"RGB ", b"XYZ ", **tags)


def cmyk_that_inverts():
    """A profile of inks in which much ink is light: L* is the share of black, no colour."""
    straight = bytes(range(256))
    corners = b"".join(bytes([255 * (c & 1), 128, 128]) for c in range(16))  # black is the last
    head = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(b"CMYK", b"Lab ", A2B0=head + straight * 4 + corners + straight * 3)


ADOBE = adobe_rgb()
GREEN = Image.new("RGB", (40, 40), (60, 160, 60))
GREY = Image.new("L", (40, 40), 128)
BLACK_INK = Image.new("CMYK", (40, 40), (0, 0, 0, 255))


@pytest.mark.parametrize(
    ("image", "kind", "embedded", "expected"),
    [
        (GREEN, "PNG", ADOBE, (0, 161, 47)),
        (GREEN, "JPEG", ADOBE, (0, 161, 47)),
        (GREEN, "TIFF", ADOBE, (0, 161, 47)),
        (GREEN.convert("RGBA"), "PNG", ADOBE, (0, 161, 47)),
        (GREEN.quantize(4), "PNG", ADOBE, (0, 161, 47)),
        (GREY, "PNG", profile(b"GRAY", b"XYZ ", kTRC=gamma(1.8)), (146, 146, 146)),
        (GREY.convert("LA"), "PNG", profile(b"GRAY", b"XYZ ", kTRC=gamma(1.8)), (146, 146, 146)),
        (BLACK_INK, "JPEG", cmyk_that_inverts(), (255, 255, 255)),
        (GREEN, "PNG", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), None),
        (GREEN, "PNG", None, None),
        (GREEN, "PNG", b"no profile" * 20, None),
        (GREEN, "JPEG", ADOBE[:300], None),
        (GREEN, "PNG", profile(b"GRAY", b"XYZ ", kTRC=gamma(1.8)), None),
        (BLACK_INK, "JPEG", None, (0, 0, 0)),
        (BLACK_INK, "JPEG", ADOBE, (0, 0, 0)),
    ],
)
def test_colours_are_those_of_srgb_and_a_broken_profile_is_ignored(
    tmp_path, image, kind, embedded, expected
):
    options = {"quality": 100} if kind == "JPEG" else {}
    if embedded:
        options["icc_profile"] = embedded
    result = loaded(tmp_path, saved(image, kind, **options))[16, 16].astype(int)
    assert abs(result - (expected or (60, 160, 60))).max() <= 1


# --- what is damaged, huge or moves ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture_counts(tmp_path, kind):
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **options)
    assert loaded(tmp_path, content)[16, 16].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_picture_is_refused_wherever_it_is_cut(tmp_path, kind):
    whole = saved(COLOURS[:9, :9], kind)
    # What comes last are the marks of the end, and PNG's checksums.
    for length in range(0, len(whole) - 24, 9):
        with pytest.raises(UnusableInput, match="picture: cannot be read"):
            loaded(tmp_path, whole[:length])


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 5_001, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    with pytest.raises(UnusableInput, match="more than 100,000,000 pixels; make it smaller"):
        loaded(tmp_path, b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 99, b"IDAT"))


def test_reading_leaves_pillow_and_warnings_as_they_were(tmp_path):
    def state():
        return ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, warnings.filters[:]

    before = state()
    read(classes(tmp_path))
    assert state() == before


# --- how a picture becomes a square --------------------------------------------------------------

WIDE = np.zeros((10, 30, 3), np.uint8)
WIDE[:, :10] = (255, 0, 0)
WIDE[:, 20:] = (0, 0, 255)


@pytest.mark.parametrize(
    ("fit", "upper", "middle"),
    [
        ("crop", [(0, 0, 0)] * 3, [(0, 0, 0)] * 3),
        ("pad", [pictures.PADDING] * 3, [(255, 0, 0), (0, 0, 0), (0, 0, 255)]),
        ("squash", [(255, 0, 0), (0, 0, 0), (0, 0, 255)], [(255, 0, 0), (0, 0, 0), (0, 0, 255)]),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_wide_picture_becomes_a_square_as_asked(tmp_path, fit, upper, middle, turned):
    path = tmp_path / "picture"
    data = Image.Exif()
    if turned:
        data[0x0112] = 6
        path.write_bytes(saved(np.rot90(WIDE), "PNG", exif=data))
    else:
        path.write_bytes(saved(WIDE, "PNG"))
    square, _, size = pictures.load_hashed(path, 30, fit)
    assert size == (30, 10)
    for row, expected in ((2, upper), (15, middle)):
        found = [tuple(square[row, column].tolist()) for column in (4, 15, 25)]
        assert found == expected
    given = pictures.whole(path, 60)
    assert given.shape == (20, 60, 3)
    assert [tuple(given[10, column].tolist()) for column in (8, 30, 50)] == [
        (255, 0, 0),
        (0, 0, 0),
        (0, 0, 255),
    ]


def test_the_narrowest_picture_can_be_padded(tmp_path):
    path = tmp_path / "line.png"
    Image.new("RGB", (1, 400), "white").save(path)
    square = pictures.load(path, 16, "pad")
    assert (square == 255).all(2).sum() == 16


# --- which files -------------------------------------------------------------------------------


def test_a_folder_yields_the_pictures_in_it_and_below_sorted(tmp_path):
    for name in ("b.png", "a.JPG", "sub/deep/c.tif", "x.png/d.bmp", "photo.heic", "s.mpg", "t.ps"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("._b.png", ".hidden.png", "notes.txt", "__MACOSX/b.png", ".thumbnails/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "itself.png").symlink_to("itself.png")
    found = [path.relative_to(tmp_path).as_posix() for path in pictures.find([tmp_path])]
    assert found == [
        "a.JPG",
        "b.png",
        "gone.png",
        "itself.png",
        "photo.heic",
        "sub/deep/c.tif",
        "x.png/d.bmp",
    ]
    explicit = [tmp_path / ".hidden.png", tmp_path / "notes.txt"]
    assert pictures.find(explicit) == explicit


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fifo.png", "not a regular file"),
        ("none.png", "No such file"),
        ("photo.heic", "not a picture in a format Pillow knows here; save it as JPEG"),
        ("script.png", "not a picture in a format Pillow knows"),  # PostScript, which would be run
        ("itself.png", "cannot be read"),
        ("empty.png", "cannot be read"),
        ("", "not a regular file"),
        ("new\nline\x1b[31m.png", r"new line\\x1b\[31m.png: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line_and_at_once(tmp_path, name, words):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    problems = []

    def attempt():
        with pytest.raises(UnusableInput, match=words) as caught:
            pictures.load(tmp_path / name)
        problems.append(str(caught.value))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert len(problems) == 1
    assert problems[0].isprintable()


def test_telephone_photographs_are_read_where_their_plugin_is_installed(monkeypatch):
    called = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda: called.append(1))
    monkeypatch.setattr(pictures, "pillow_heif", plugin)
    pictures._formats.cache_clear()
    pictures._formats()
    pictures._formats.cache_clear()
    assert called


# --- a folder per class ------------------------------------------------------------------------


def classes(path, counts=(("cat", 10), ("dog", 20), ("owl", 3)), first=0):
    """Writes pictures of one colour each: red is the class, green and blue the number."""
    for label, (name, count) in enumerate(counts):
        (path / name).mkdir(parents=True)
        for number in range(first, first + count):
            colour = (label, *divmod(number, 256))
            Image.new("RGB", (8, 8), colour).save(path / name / f"{number:05}.png")
    return path


def read(path, side=8, val_fraction=0.1, test_fraction=0.2, seed=0, scratch=Path("none"), **more):
    """The arrays, the pictures by split, what config.json says."""
    return picture_folder.folder(
        Path(path),
        side,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        scratch=scratch,
        **more,
    )


def paragraphs(text):
    """The paragraphs of the terminal, each on one line."""
    assert all(len(line) < 80 for line in text.splitlines())
    joined = []
    for line in text.splitlines():
        if line.startswith("    "):
            joined[-1] += " " + line.strip()
        else:
            joined.append(line.strip())
    return joined


def said_lines(capsys):
    return paragraphs(capsys.readouterr().out)


def colours(images):
    return [tuple(image[0, 0].tolist()) for image in images]


def hashes(split):
    return {picture.hash for picture in split}


def test_a_folder_per_class_is_split_stratified_and_by_seed(tmp_path):
    classes(tmp_path)
    arrays, split, said = read(tmp_path)
    assert arrays.classes == ("cat", "dog", "owl")
    assert np.bincount(arrays.test_labels).tolist() == [2, 4, 1]
    assert np.bincount(arrays.val_labels).tolist() == [1, 2, 1]
    assert np.bincount(arrays.train_labels).tolist() == [7, 14, 1]
    seen = []
    for name in ("train", "val", "test"):
        images, labels = getattr(arrays, f"{name}_images"), getattr(arrays, f"{name}_labels")
        for colour, label, picture in zip(colours(images), labels, split[name], strict=True):
            assert picture.path == f"{arrays.classes[label]}/{colour[2]:05}.png"
            assert picture.class_name == arrays.classes[colour[0]]
            assert picture.hash == sha256(tmp_path / picture.path)[:16]
        seen += colours(images)
    assert len(set(seen)) == len(seen) == 33
    assert said == {
        "source": "pictures",
        "folder": str(tmp_path),
        "read": 33,
        "unreadable": 0,
        "other_files": 0,
        "outside": 0,
        "unlisted": 0,
        "copies": 0,
        "in_two_classes": 0,
        "median_size": [8, 8],
        "per_class": {"cat": 10, "dog": 20, "owl": 3},
        "splits": "made (seed 0, 20 % test)",
    }
    again, _, _ = read(tmp_path)
    other, _, _ = read(tmp_path, seed=1)
    assert np.array_equal(again.test_images, arrays.test_images)
    assert not np.array_equal(other.test_images, arrays.test_images)
    assert read(tmp_path, val_fraction=0)[0].val_images is None


def test_names_and_folders_within_a_class_decide_nothing(tmp_path):
    classes(tmp_path)
    before, _, _ = read(tmp_path)
    for number, path in enumerate(sorted(tmp_path.glob("*/*.png"))):
        place = path.parent / str(number % 3)
        place.mkdir(exist_ok=True)
        path.rename(place / f"{(number * 7) % 33}.PNG")
    after, _, _ = read(tmp_path)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)


def test_added_pictures_move_few_others_and_none_from_training_to_test(tmp_path):
    classes(tmp_path, (("cat", 200), ("dog", 200)))
    _, before, _ = read(tmp_path)
    classes(tmp_path / "more", (("cat", 10), ("dog", 10)), first=500)
    for path in (tmp_path / "more").glob("*/*.png"):
        path.rename(tmp_path / path.parent.name / path.name)
    shutil.rmtree(tmp_path / "more")
    _, after, _ = read(tmp_path)
    old = hashes(before["train"]) | hashes(before["val"]) | hashes(before["test"])
    moved = sum(
        len(hashes(before[split]) - hashes(after[split])) for split in ("train", "val", "test")
    )
    assert len(old) == 400
    assert 0 < moved < 20
    assert not hashes(before["train"]) & hashes(after["test"])


@pytest.mark.parametrize(("fraction", "sizes"), [(0.001, [1, 1, 1]), (0.99, [8, 18, 1])])
def test_every_class_keeps_a_picture_for_each_split(tmp_path, fraction, sizes):
    classes(tmp_path)
    arrays, _, _ = read(tmp_path, test_fraction=fraction, val_fraction=fraction)
    assert np.bincount(arrays.test_labels).tolist() == sizes
    assert np.bincount(arrays.val_labels).tolist() == [1, 1, 1]
    assert np.bincount(arrays.train_labels).min() >= 1


def test_the_rare_class_of_two_is_validated_too(tmp_path):
    arrays, _, _ = read(classes(tmp_path, (("a", 100), ("b", 8))), val_fraction=0.04)
    assert np.bincount(arrays.val_labels).tolist() == [3, 1]


def test_the_first_images_of_each_split_come_from_all_classes_in_turn(tmp_path):
    arrays, _, _ = read(classes(tmp_path))
    assert arrays.test_labels.tolist() == [0, 1, 2, 0, 1, 1, 1]
    assert arrays.val_labels.tolist() == [0, 1, 2, 1]
    assert arrays.train_labels[:9].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1]


def test_copies_share_a_split_and_count_once_and_a_picture_in_two_classes_does_not_count(
    tmp_path, capsys
):
    classes(tmp_path, (("cat", 10), ("dog", 20)))
    before, _, _ = read(tmp_path)
    for path in list(tmp_path.glob("*/*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    again, _, said = read(tmp_path)
    assert (said["read"], said["copies"], said["in_two_classes"]) == (60, 30, 0)
    assert said["per_class"] == {"cat": 10, "dog": 20}
    assert np.array_equal(again.test_images, before.test_images)
    assert np.array_equal(again.train_images, before.train_images)
    shutil.copy(tmp_path / "dog" / "00003.png", tmp_path / "cat" / "odd.png")
    arrays, _, said = read(tmp_path)
    assert (said["read"], said["copies"], said["in_two_classes"]) == (61, 29, 3)
    assert said["per_class"] == {"cat": 10, "dog": 19}
    all_colours = colours(np.concatenate([arrays.train_images, *arrays[3:6:2]]))
    assert (1, 0, 3) not in all_colours
    lines = said_lines(capsys)
    assert "left out: 30 as copies of others (like cat/copy of 00000.png)" in lines
    assert (
        "left out: 29 as copies of others (like cat/copy of 00000.png), 3 in two classes "
        "(like cat/odd.png)"
    ) in lines


def as_bmp(path, place=None):
    """Saves a picture once more: other bytes, the same pixels."""
    copy = (place or path).with_suffix(".bmp")
    Image.open(path).save(copy)
    return copy


def test_a_picture_saved_in_two_formats_counts_once_whichever_name_comes_first(tmp_path):
    classes(tmp_path, (("cat", 10), ("dog", 20)))
    _, alone, _ = read(tmp_path)
    bitmaps = [as_bmp(path) for path in sorted(tmp_path.glob("*/*.png"))]
    arrays, split, said = read(tmp_path)
    assert (said["read"], said["copies"], said["per_class"]) == (60, 30, {"cat": 10, "dog": 20})
    parts = (arrays.train_images, arrays.val_images, arrays.test_images)
    seen = [colour for images in parts for colour in colours(images)]
    assert len(seen) == len(set(seen)) == 30
    known = {digest for those in alone.values() for digest in hashes(those)}
    for picture in (picture for those in split.values() for picture in those):
        both = {picture.hash, *picture.copies}
        assert picture.hash == min(both)
        assert len(both) == 2
        assert len(both & known) == 1
    assert len(set().union(*known_pictures.known(split).values())) == 60  # no copy is forgotten
    for number, path in enumerate(bitmaps):
        path.rename(path.with_name(f"{'A' if number % 2 else 'z'}{path.name}"))
    again, _, _ = read(tmp_path)
    for one, other in zip(arrays, again, strict=True):
        assert np.array_equal(one, other)
    as_bmp(tmp_path / "dog" / "00003.png", tmp_path / "cat" / "odd.png")
    _, _, said = read(tmp_path)
    assert (said["copies"], said["in_two_classes"]) == (29, 3)
    assert said["per_class"] == {"cat": 10, "dog": 19}


def test_folders_whose_names_look_alike_are_refused_not_merged(tmp_path):
    classes(tmp_path, (("a b", 3), ("a\tb", 3), ("dog", 3)))
    with pytest.raises(UnusableInput, match="2 folders are shown as a b"):
        read(tmp_path)


def test_given_splits_are_honoured_and_a_copy_in_test_does_not_train(tmp_path, capsys):
    for number, split in enumerate(("train", "val", "test")):
        classes(tmp_path / split, (("cat", 2), ("dog", 2)), first=100 * number)
    for path in (tmp_path / "val" / "dog").iterdir():
        path.unlink()
    shutil.copy(tmp_path / "test" / "cat" / "00200.png", tmp_path / "train" / "cat")
    as_bmp(tmp_path / "test" / "dog" / "00200.png", tmp_path / "train" / "dog" / "again.png")
    (tmp_path / "extra.png").touch()
    arrays, _, said = read(tmp_path)
    assert sorted(colours(arrays.train_images)) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert sorted(colours(arrays.val_images)) == [(0, 0, 100), (0, 0, 101)]
    assert sorted(colours(arrays.test_images)) == [
        (0, 0, 200),
        (0, 0, 201),
        (1, 0, 200),
        (1, 0, 201),
    ]
    assert (said["splits"], said["copies"]) == ("as given", 2)
    captured = capsys.readouterr()
    assert captured.err == f"{tmp_path}: val/ has no picture of dog\n"
    assert paragraphs(captured.out)[1:] == [
        "left out: 1 outside the folders of classes (like extra.png), 2 as copies of others "
        "(like train/cat/00200.png)",
        "8x8 pixels each",
        "4 to train on, 2 to validate, 4 to test, as the folders say",
    ]


def test_train_and_test_may_be_names_of_classes(tmp_path):
    classes(tmp_path, (("bus", 4), ("test", 5), ("train", 6)))
    (tmp_path / "train" / "steam").mkdir()
    arrays, _, said = read(tmp_path)
    assert arrays.classes == ("bus", "test", "train")
    assert said["per_class"] == {"bus": 4, "test": 5, "train": 6}


def test_a_class_is_the_same_however_its_name_is_composed(tmp_path):
    composed = unicodedata.normalize("NFC", "Äpfel")
    apart = unicodedata.normalize("NFD", "Äpfel")
    classes(tmp_path / "train", ((apart, 3), ("Birnen", 3)))
    classes(tmp_path / "test", ((composed, 2), ("Birnen", 2)), first=100)
    arrays, split, _ = read(tmp_path)
    assert arrays.classes == ("Birnen", composed)
    assert len(arrays.test_labels) == 4
    assert {picture.class_name for picture in split["train"]} == {"Birnen", composed}


def test_files_without_an_ending_of_a_picture_are_counted_and_named(tmp_path, capsys):
    classes(tmp_path)
    for number in range(6):
        path = tmp_path / "dog" / f"{number:05}.png"
        path.rename(path.with_name(f"{number}.png?w=800") if number % 2 else path.with_suffix(""))
    _, _, said = read(tmp_path)
    assert (said["read"], said["unreadable"], said["other_files"]) == (27, 0, 6)
    line = "left out: 6 without an ending of a picture (like dog/00000)"
    assert line in said_lines(capsys)


def test_unreadable_pictures_are_named_counted_and_left_out(tmp_path, capsys):
    classes(tmp_path)
    for number in range(14):
        (tmp_path / "dog" / f"x{number:02}.png").write_text("no picture")
    (tmp_path / "dog" / "._00000.png").write_text("of macOS")
    arrays, _, said = read(tmp_path)
    assert len(arrays.train_images) + len(arrays.val_images) + len(arrays.test_images) == 33
    assert (said["read"], said["unreadable"]) == (33, 14)
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.endswith("; left out") for line in lines) == 10
    assert lines[-1] == "and 4 more like these"


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "folders of classes: 0; make it two to 1,000"),
        ({"cat": 5}, "folders of classes: 1"),
        ({"deep/cat": 5, "deep/dog": 5}, "its only folder is deep/, which holds 2; name that"),
        ({"train": 5, "test": 5}, "test/ and train/ hold no folders of classes; make it train/C"),
        ({"Dev": 5, "testing": 5}, "Dev/ and testing/ hold no folders of classes"),
        (
            {"cat": 3, "dog": 3, "set/cat": 3, "set/dog": 3},
            "set/ holds all the other classes again; name it alone, or take it away",
        ),
        (dict.fromkeys(map(str, range(1001)), 0), "folders of classes: 1,001"),
        (
            {"cat/train": 5, "cat/test": 5, "dog": 5},
            "cat/test/ is called like a split, inside a class; make it test/cat/, or give it",
        ),
        ({"train/cat": 5, "train/dog/Val": 5}, "train/dog/Val/ is called like a split, inside"),
        ({"deep/train": 5, "deep/test": 5}, "its only folder is deep/, which holds 2; name that"),
        (
            {"cat": 5, "dog": 0, "owl": 2},
            r"every class needs 3 .* each of test, val, train: dog lacks 3, owl lacks 1; add",
        ),
        (
            {"train/cat": 5, "train/dog": 1, "test/cat": 1},
            r"needs 2 .* of val, train: dog lacks 1;",
        ),
        ({"val/cat": 3, "val/dog": 3}, "no train/"),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/cow": 1},
            "test/cow is not among the classes of train/; add it there",
        ),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 0}, "test/ holds no picture of a class"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path, layout, words):
    for number, (name, count) in enumerate(layout.items()):
        classes(tmp_path, ((name, count),), first=100 * number)
    with pytest.raises(UnusableInput, match=words) as caught:
        read(tmp_path)
    assert str(caught.value).isprintable()
    assert str(tmp_path) in str(caught.value)


def test_a_class_of_unreadable_pictures_or_copies_is_too_small(tmp_path):
    classes(tmp_path, (("cat", 5), ("dog", 3)))
    (tmp_path / "dog" / "00001.png").write_text("no picture")
    shutil.copy(tmp_path / "dog" / "00002.png", tmp_path / "dog" / "copy.png")
    with pytest.raises(UnusableInput, match=r"needs 3 different pictures .* dog lacks 1;"):
        read(tmp_path)
    with pytest.raises(UnusableInput, match="no such folder"):
        read(tmp_path / "none")


def test_pictures_that_memory_does_not_hold_go_to_a_file_that_vanishes(
    tmp_path, monkeypatch, capsys
):
    classes(tmp_path / "photos")
    place = tmp_path / "checkpoints" / "r.pt"
    in_memory, _, _ = read(tmp_path / "photos", side=64, scratch=place)
    assert not place.parent.exists()
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 33 * 64 * 64 * 3 - 1.0)
    mapped, _, _ = read(tmp_path / "photos", side=64, scratch=place)
    assert f"33 pictures of 64 px: 0 MB in a file in {place.parent}/" in capsys.readouterr().out
    for one, other in zip(in_memory, mapped, strict=True):
        assert np.array_equal(one, other)
    assert os.name == "nt" or not list(place.parent.iterdir())

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.raises(OSError, match=r"33 pictures of 64 px: .* smaller --image-size"):
        read(tmp_path / "photos", side=64, scratch=place)
    assert not list(place.parent.iterdir())


def test_too_little_memory_is_not_the_pictures_fault(tmp_path, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    classes(tmp_path)
    monkeypatch.setattr(pictures, "_decode", exhausted)
    with pytest.raises(UnusableInput, match="MemoryError"):
        read(tmp_path)


def test_a_signal_does_not_wait_for_the_pictures_that_are_left(tmp_path, monkeypatch):
    classes(tmp_path, (("cat", 500), ("dog", 500)))
    opened = []

    def load(path, side, fit):
        time.sleep(0.01)
        opened.append(path)
        return pictures.Loaded(np.zeros((side, side, 3), np.uint8), path.name, (8, 8))

    def bar(squares, **_):
        for number, square in enumerate(squares):
            if number == 20:
                raise KeyboardInterrupt
            yield square

    monkeypatch.setattr(picture_folder, "load_hashed", load)
    monkeypatch.setattr(picture_folder, "tqdm", bar)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path)
    assert len(opened) < 200


def test_links_and_odd_names_of_classes_do_no_harm(tmp_path):
    classes(tmp_path / "photos", (("cat", 5), ("new\nline", 5)))
    classes(tmp_path / "elsewhere", (("owl", 3), ("dog", 5)))
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "photos" / "cat" / "loop").symlink_to(tmp_path / "photos" / "cat")
    try:
        (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    for path in (tmp_path / "photos" / "dog").iterdir():  # else they are new line's, too
        Image.new("RGB", (8, 8), (9, 9, int(path.stem))).save(path)
    arrays, split, said = read(tmp_path / "photos")
    assert arrays.classes == ("caf\\udce9", "dog", "new line")
    assert all(picture.path.isprintable() for picture in split["train"])
    assert said["per_class"]["dog"] == 5


def test_the_list_of_pictures_runs_no_formula_in_a_spreadsheet(tmp_path):
    picture = Picture("=1+1/@a.png", "=1+1", "00ff")
    picture_list.write(tmp_path / "list.csv", {"train": [picture], "test": []})
    with open(tmp_path / "list.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["path", "class", "split", "hash"],
            ["'=1+1/@a.png", "'=1+1", "train", "00ff"],
        ]


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "DEV", "testing"),
        ("train", "Valid", "TEST"),
        ("training_set", "VAL-set", "Test_Set"),
    ],
)
def test_folders_of_splits_may_have_other_usual_names(tmp_path, names):
    for number, split in enumerate(names):
        classes(tmp_path / split, (("cat", 3), ("dog", 3)), first=100 * number)
    arrays, _, said = read(tmp_path)
    assert said["splits"] == "as given"
    assert [colour[2] // 100 for colour in colours(arrays.val_images)] == [1] * 6
    assert [colour[2] // 100 for colour in colours(arrays.test_images)] == [2] * 6


def test_a_test_folder_without_classes_is_left_aside_and_a_test_split_drawn(tmp_path, capsys):
    classes(tmp_path / "train", (("cat", 10), ("dog", 10)))
    classes(tmp_path, (("test", 4),), first=100)
    arrays, split, said = read(tmp_path)
    assert (len(arrays.test_images), said["outside"]) == (4, 4)
    assert said["splits"] == "made (seed 0, 20 % test)"
    assert all(picture.path.startswith("train/") for picture in split["test"])
    lines = said_lines(capsys)
    assert "test/ holds no folders of classes: left aside" in lines
    assert "left out: 4 outside the folders of classes (like test/00100.png)" in lines
    assert "14 to train on, 2 to validate, 4 to test; --seed 0 drew test and val" in lines


def test_the_first_lines_say_what_was_found(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classes(tmp_path / "photos", (("cat", 10), ("dog", 20), ("owl", 3)))
    for size in ((300, 100), (90, 30)):
        Image.new("RGB", size, (9, 9, size[0] % 256)).save(tmp_path / "photos/cat" / f"{size}.png")
    for number in range(2):
        (tmp_path / "photos" / "dog" / f"x{number}.png").write_text("no picture")
    (tmp_path / "photos" / "notes.txt").touch()
    read(Path("photos"))
    lines = said_lines(capsys)
    assert lines[0] == "photos: 37 pictures of 3 classes: cat 12, dog 22, owl 3"
    assert lines[1:] == [
        "left out: 2 unreadable (like dog/x0.png)",
        "8x8 to 300x100 pixels, median 8x8",
        "24 to train on, 4 to validate, 7 to test; --seed 0 drew test and val",
    ]
    classes(tmp_path / "many", [(f"c{number:02}", 3 + number) for number in range(11)])
    read(Path("many"))
    first = said_lines(capsys)[0]
    assert first == "many: 88 pictures of 11 classes, from 3 (c00) to 13 (c10)"


@pytest.mark.parametrize(
    ("size", "fit", "is_said"),
    [((300, 100), "crop", True), ((300, 100), "pad", False), ((400, 300), "crop", False)],
)
def test_much_cut_away_is_said(tmp_path, capsys, size, fit, is_said):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", size, (label, number, 0)).save(tmp_path / name / f"{number}.png")
    read(tmp_path, fit=fit)
    line = (
        "their central squares are used: 67 % of the median picture is cut away; --fit pad shows "
        "all of it"
    )
    assert (line in said_lines(capsys)) == is_said


# --- a list of labels ----------------------------------------------------------------------------


def flat(path, count=12):
    """Pictures in no folders of classes; the first is `deep/00000.png`."""
    classes(path, (("photos", count),))
    (path / "photos" / "deep").mkdir()
    (path / "photos" / "00000.png").rename(path / "photos" / "deep" / "00000.png")
    return path / "photos"


def test_a_list_of_labels_names_pictures_with_or_without_ending_and_folder(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = flat(Path())
    names = ["deep/00000.png", "00001", "00002.png", ".\\00003.png", "00004", "00005", "00006"]
    rows = [f"{name};{'cat' if number < 4 else 'dog'}" for number, name in enumerate(names)]
    for heading, said_of_it in (
        ([], []),
        (["id;label"], ["the first row of the list is taken as its heading: id, label"]),
    ):
        text = "\n".join([*heading, *rows, "", rows[1]])
        (folder / "labels.csv").write_text(text, encoding="utf-8-sig")
        arrays, split, said = read(folder, labels=folder / "labels.csv")
        assert arrays.classes == ("cat", "dog")
        assert said["per_class"] == {"cat": 4, "dog": 3}
        assert (said["unlisted"], said["other_files"]) == (5, 0)
        of_class = {
            picture.path: picture.class_name for those in split.values() for picture in those
        }
        assert of_class["deep/00000.png"] == of_class["00003.png"] == "cat"
        assert of_class["00004.png"] == "dog"
        assert said_lines(capsys)[: len(said_of_it) + 3] == [
            f"{folder}: 7 pictures of 2 classes: cat 4, dog 3",
            *said_of_it,
            "rows of the list that repeat others: 1",
            "left out: 5 not in the list of labels (like 00007.png)",
        ]


@pytest.mark.parametrize("folders", [("train", "Test_set"), ("", "test"), ("test", "testing")])
def test_what_a_list_names_in_a_folder_of_a_split_is_of_that_split(tmp_path, folders):
    rows = []
    for number in range(20):
        place = folders[number // 12]
        path = tmp_path / "photos" / place / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        rows.append(f"{number:02},{'cat' if number % 2 else 'dog'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    arrays, _, said = read(tmp_path / "photos", labels=tmp_path / "labels.csv")
    in_test = sorted(red for red, _, _ in colours(arrays.test_images))
    is_given = folders[0] != "test"  # else none would be left to train on
    assert (in_test == list(range(12, 20))) == is_given
    assert (said["splits"] == "as given") == is_given


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("00001,cat\n00002,dog\nnone,cat\n", "1 named, but not in .*photos .like none.; correct"),
        ("none,cat\n00002,dog\n00001,cat\n", "1 named, but not in"),  # is no heading
        ("gone.png,owl\n00002,dog\n00001,cat\n", "1 named, but not in .*gone.png"),
        ("00001,cat\n00002,dog\n00001.png,dog\n", "1 pictures with two labels .like 00001.png"),
        ("00000,cat\n00002,dog\n", "1 names of several pictures; give their paths below"),
        ("00001,cat\n00002,cat\n", "1 different labels; make it two to 1,000"),
        ("", "0 different labels"),
        ("00001,cat,7\n", "row 1 holds 3 values in 3 columns; make it two columns, file name and"),
        ("00001,cat\n00002,\n", "row 2 holds 1 values in 2 columns"),
        ("00001,caf\xe9\n", "is no text in UTF-8; save it as CSV"),
        (None, "cannot be read .No such file"),
        ("00001,cat\n00002,dog\n", "every class needs 3 different pictures"),
    ],
)
def test_a_list_of_labels_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, words):
    folder = flat(tmp_path)
    (folder / "other").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "other" / "00000.png")
    path = tmp_path / "labels.csv"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UnusableInput, match=words) as caught:
        read(folder, labels=path)
    assert str(caught.value).isprintable()


def test_flat_pictures_without_a_list_are_refused_with_what_is_needed(tmp_path):
    classes(tmp_path, (("photos", 3),))
    with pytest.raises(UnusableInput, match=r"holds pictures, but no folders of classes; .* --lab"):
        read(tmp_path / "photos")


# --- a training and what comes after it ---------------------------------------------------------

TINY = (
    *("train_custom", "--recipe", "classic", "--image-size", "16", "--pictures", "noise"),
    *("--batch-size", "16", "--precision", "fp32", "--device", "cpu", "--epochs", "2"),
)


def noise(path, counts, seed=0):
    """Writes pictures that show nothing: they can be learned by heart alone."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(path / name / f"{seed}-{number:03}.png")


def rename_all(folder):
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.rename(path.with_name(f"r{(number * 37) % 1009:04}.png"))


def report(name="custom_cnn"):
    found = json.loads(Path("results", name, "test.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("n", "top1", "loss", "per_class")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder `noise` of two classes of 40, and all that a training on it leaves, to be copied."""
    place = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(place)
    try:
        noise(Path("noise"), {"a": 40, "b": 40})
        assert train_custom.main([*TINY[1:]]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def after(trained, workplace):
    """The working folder after such a training."""
    shutil.copytree(trained, workplace, dirs_exist_ok=True)
    return workplace


def test_a_run_lists_its_pictures_and_its_checkpoint_knows_them(after):
    content = checkpoint.load(after / "checkpoints" / "custom_cnn.pt")
    _, split, said = read(after / "noise", val_fraction=0.04, test_fraction=0.15)
    assert {name: list(known) for name, known in content["pictures"].items()} == {
        name: [picture.hash for picture in those] for name, those in split.items()
    }
    with open("results/custom_cnn/pictures.csv", newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == 80
    for name, those in split.items():
        for picture in those:
            assert rows[picture.path]["split"] == name
            assert rows[picture.path]["hash"] == picture.hash
    config = Path("results/custom_cnn/config.json").read_text(encoding="utf-8")
    assert split["train"][0].hash not in config
    assert said.items() <= (json.loads(config)["data"] | {"folder": str(after / "noise")}).items()


def test_the_same_test_pictures_are_evaluated_wherever_they_lie_and_whatever_called(after, run):
    before = report()
    assert before["n"] == 12
    rename_all(after / "noise")
    assert run("evaluate", "checkpoints/custom_cnn.pt").code == 0
    assert report() == before
    noise(after / "noise", {"a": 30, "b": 20}, seed=1)  # more to train on another time
    for number, path in enumerate(list((after / "noise").glob("?/*"))):
        place = after / "elsewhere" / "deep" / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / f"{number} without an ending")
    done = run("evaluate", "checkpoints/custom_cnn.pt", "--pictures", "elsewhere")
    assert (done.code, done.err) == (0, "")
    assert report() == before


def test_what_is_missing_or_moved_is_said_and_what_trained_never_counts(after, run, refused):
    _, split, _ = read(after / "noise", val_fraction=0.04, test_fraction=0.15)
    test = [after / "noise" / picture.path for picture in split["test"]]
    train = [after / "noise" / picture.path for picture in split["train"]]
    for path in test[:2]:
        path.unlink()
    wrong = after / "noise" / ("b" if test[2].parent.name == "a" else "a")
    test[2].rename(wrong / "wrong.png")
    noise(after / "noise" / "test", {"a": 2}, seed=7)
    for path in train[:3]:
        shutil.copy(path, after / "noise" / "test" / "a" / f"t{path.name}")
    done = run("evaluate", "checkpoints/custom_cnn.pt")
    assert done.code == 0
    assert done.err.splitlines() == [
        "noise: missing: 2 of 12 test pictures",
        "noise: in another class now: 1 of the test pictures; the class they had at the training "
        "counts",
        "noise: in test/, but no test pictures of the training: 5, of which 3 trained the network; "
        "they do not count",
    ]
    assert report()["n"] == 12  # the run's own report stays; this one lies beside it
    beside = json.loads(Path("results/custom_cnn/test-noise.json").read_text(encoding="utf-8"))
    assert (beside["n"], beside["note"]) == (
        10,
        "on 10 of the 12 test images: the others are missing",
    )
    shutil.rmtree(after / "noise" / "test")
    for path in (*test[3:], wrong / "wrong.png"):
        path.unlink()
    line = refused("evaluate", "checkpoints/custom_cnn.pt")
    assert "noise: holds none of the 12 test pictures of the training; say with --pictures" in line


def test_an_older_checkpoint_is_evaluated_where_its_folder_has_a_test_of_its_own(
    after, run, refused
):
    path = Path("checkpoints/custom_cnn.pt")
    content = checkpoint.load(path)
    del content["pictures"]
    checkpoint.save(path, content)
    shutil.rmtree("results")
    line = refused("evaluate", path)
    assert "does not say which pictures were kept for its test: train it anew" in line
    content["data"]["splits"] = "as given"
    checkpoint.save(path, content)
    assert "has not the test/ and the classes" in refused("evaluate", path)
    (after / "noise").rename(after / "train")
    (after / "noise").mkdir()
    (after / "train").rename(after / "noise" / "train")
    noise(after / "noise" / "test", {"a": 3, "b": 4}, seed=3)
    assert run("evaluate", path).code == 0
    assert report()["n"] == 7


def test_no_run_begins_from_weights_that_its_test_pictures_trained(after, run, refused):
    more = ("--weights", "checkpoints/custom_cnn.pt", "--run-name", "more")
    line = refused(*TINY, *more, "--seed", "1")
    assert "test pictures trained it; take the --seed of that training" in line
    line = refused(*TINY, *more, "--val-fraction", "0.3")
    assert "validation pictures trained it; take the --seed and the --val-fraction of that" in line
    assert run(*TINY, *more).code == 0
    for path in list((after / "noise").rglob("*.png")):
        as_bmp(path)
    _, split, _ = read(after / "noise", seed=1, val_fraction=0.04, test_fraction=0.15)
    trained = checkpoint.load(Path("checkpoints/custom_cnn.pt"))["pictures"]["train"].keys()
    seen = [picture for picture in split["test"] if trained & {picture.hash, *picture.copies}]
    assert len(seen) > len(trained & hashes(split["test"]))
    line = refused(*TINY, *more, "--seed", "1")
    assert f"{len(seen)} of the 12 test pictures trained it" in line

    # Nor is the other file of a training picture a new one to evaluate on.
    assert run(*TINY, "--run-name", "both").code == 0
    known = checkpoint.load(Path("checkpoints/both.pt"))["pictures"]
    for path in list((after / "noise").rglob("*.*")):
        if sha256(path)[:16] in known["before"]:
            (after / "other" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, after / "other" / path.parent.name)
    done = run("evaluate", "checkpoints/both.pt", "--pictures", "other")
    assert (done.code, len(known["train"])) == (2, 66)
    assert "other: left out: 66 trained the network" in done.err


def test_a_limit_takes_from_every_class_and_the_run_knows_only_what_it_used(run):
    noise(Path("noise"), {"cat": 40, "dog": 40})
    assert run(*TINY, "--limit", "16").code == 0
    content = checkpoint.load(Path("checkpoints/custom_cnn.pt"))
    for split, count in (("train", 8), ("test", 6)):
        names = list(content["pictures"][split].values())
        assert (names.count("cat"), names.count("dog")) == (count, count)
    before = report()
    rename_all(Path("noise"))
    assert run("evaluate", "checkpoints/custom_cnn.pt").code == 0
    assert report() == before


def test_a_training_does_not_depend_on_the_names_of_its_pictures(run):
    noise(Path("noise"), {"cat": 20, "dog": 20})
    assert run(*TINY, "--run-name", "one").code == 0
    rename_all(Path("noise"))
    assert run(*TINY, "--run-name", "two").code == 0
    assert outcome(".", "one") == outcome(".", "two")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("class", "class c is new, pictures added: 20"),
        ("rename", "class b is gone, class c is new, pictures in another class or split: 40"),
        ("remove", "pictures removed or changed: 1"),
        ("add", "pictures added: 3"),
        ("nothing", ""),
    ],
)
def test_resume_refuses_pictures_that_changed(after, run, refused, signal_at, change, words):
    folder = after / "noise"
    signal_at(3, 2)
    assert run(*TINY, "--run-name", "cut").code == 130
    rename_all(folder)  # which is none
    if change == "class":
        noise(folder, {"c": 20}, seed=5)
    elif change == "rename":
        (folder / "b").rename(folder / "c")
    elif change == "remove":
        next(iter(sorted((folder / "a").iterdir()))).unlink()
    elif change == "add":
        noise(folder, {"a": 3}, seed=5)
    if change == "nothing":
        assert run(*TINY, "--run-name", "cut", "--resume").code == 0
        assert outcome(".", "cut") == outcome(".", "custom_cnn")
        return
    line = refused(*TINY, "--run-name", "cut", "--resume")
    assert "noise: changed since this run began" in line
    assert words in line
    assert "restore them, or start another run with --run-name NAME" in line


def test_resume_of_a_run_that_began_from_a_checkpoint_says_what_is_missing(
    after, run, refused, signal_at
):
    weights = Path("checkpoints/custom_cnn.pt")
    begin = (*TINY, "--weights", weights, "--run-name", "cut")
    signal_at(3, 2)
    assert run(*begin).code == 130
    weights.rename("away.pt")
    assert f"--weights {weights}: no such file" in refused(*begin, "--resume")
    checkpoint.save(weights, checkpoint.load(Path("away.pt")) | {"pictures": {"train": {"1": "a"}}})
    assert f"{weights}: is another file than this run began from" in refused(*begin, "--resume")
    Path("away.pt").replace(weights)
    known = checkpoint.load(weights)["pictures"]["train"]
    gone = next(path for path in (after / "noise").rglob("*.*") if sha256(path)[:16] in known)
    gone.rename("away.png")
    assert "began: pictures removed or changed: 1;" in refused(*begin, "--resume")
    Path("away.png").rename(gone)
    assert run(*begin, "--resume").code == 0


def test_what_follows_from_the_number_of_pictures_is_said_and_resumed(run, refused, signal_at):
    noise(Path("noise"), {"a": 40, "b": 40})
    words = "train_custom --recipe classic --image-size 16 --precision fp32 --device cpu"
    plain = [*words.split(), "--pictures", "noise"]
    signal_at(3, 2)
    done = run(*plain)
    assert done.code == 130
    assert "66 training images: batches of 32, 334 epochs (--batch-size, --epochs)" in done.out
    saved = json.loads(Path("results/custom_cnn/config.json").read_text(encoding="utf-8"))
    assert (saved["config"]["batch_size"], saved["config"]["epochs"]) == (32, 334)
    assert saved["changed"].keys() == {"pictures", "image_size", "precision"}
    assert "--epochs 9 (was 334)" in refused(*plain, "--resume", "--epochs", "9")
    signal_at(3, 2)
    assert run(*plain, "--resume").code == 130


def test_changes_name_classes_and_count_pictures():
    before = {"train": {"1": "a", "2": "b"}, "test": {"3": "a", "4": "b"}}
    now = {"train": {"1": "a", "2": "c", "5": "c"}, "test": {"3": "a"}}
    assert changes(before, now) == (
        "class b is gone, class c is new, pictures removed or changed: 1, pictures added: 1, "
        "pictures in another class or split: 1"
    )
    assert changes(before, before) == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fit", "pad"), "--fit pad: CIFAR-10's images are squares; leave it out, or name"),
        (("--labels", "a.csv"), "--labels a.csv: they are of pictures of your own; say with --pi"),
    ],
)
def test_what_is_for_pictures_of_ones_own_is_refused_without_them(refused, flags, words):
    assert words in refused("train_custom", *flags)


@pytest.mark.parametrize("share", ["0", "0.5"])
def test_a_share_to_validate_on_is_refused_where_a_folder_is_given(workplace, run, refused, share):
    for number, split in enumerate(("train", "val")):
        noise(workplace / "noise" / split, {"a": 8, "b": 8}, seed=number)
    words = f"--val-fraction {share}: noise has a val/ of its own, which validates; leave the flag"
    assert words in refused(*TINY, "--val-fraction", share)
    assert run(*TINY, "--batch-size", "8", "--val-fraction", "0.04").code == 0  # as without it


def test_the_fit_of_a_training_is_that_of_its_evaluation(workplace, run):
    """The class stands at the left of wide pictures: cropped, they look alike."""
    rng = np.random.default_rng(0)
    rows = ["name,label"]
    Path("wide").mkdir()
    for number in range(80):
        pixels = rng.integers(0, 256, (16, 48, 3), np.uint8)
        pixels[:, :8] = 255 * (number % 2)
        Image.fromarray(pixels).save(f"wide/{number}.png")
        rows.append(f"{number},{['dark', 'bright'][number % 2]}")
    Path("labels.csv").write_text("\n".join(rows))
    command = (*TINY, "--pictures", "wide", "--labels", "labels.csv", "--epochs", "6")
    done = run(*command, "--fit", "pad")
    assert done.code == 0
    assert report()["top1"] == 1.0
    before = report()
    rename_all(Path("wide"))
    assert run("evaluate", "checkpoints/custom_cnn.pt").code == 0
    assert report() == before
    done = run("evaluate", "checkpoints/custom_cnn.pt", "--predict", "wide")
    assert done.code == 0
    right = 0
    for line in done.out.splitlines()[1:]:
        name, guess = line.split()[:2]
        is_bright = np.asarray(Image.open(f"wide/{name}"))[0, 0, 0] > 0
        right += guess == ("bright" if is_bright else "dark")
    assert right > 70


def test_balance_raises_the_recall_of_a_rare_class(workplace, run):
    rng = np.random.default_rng(0)
    for split, counts in (("train", (160, 10)), ("test", (40, 40))):
        for name, mean, count in zip(("often", "rare"), (110, 150), counts, strict=True):
            place = Path("grey", split, name)
            place.mkdir(parents=True)
            for number in range(count):
                noise = rng.normal(rng.normal(mean, 25), 20, (16, 16, 3))
                pixels = noise.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    command = (*TINY, "--pictures", "grey", "--epochs", "6")
    plain = run(*command, "--run-name", "plain")
    assert (plain.code, plain.err) == (0, "")
    line = "unbalanced: 154 often to train on, 9 rare; macro F1 tells more than accuracy, --balance"
    assert line in " ".join(plain.out.split())
    balanced = run(*command, "--run-name", "balanced", "--balance")
    assert "all classes weigh alike (--balance)" in " ".join(balanced.out.split())
    assert "macro F1" in balanced.out
    assert report("balanced")["per_class"]["rare"] > report("plain")["per_class"]["rare"] + 0.2


def flags_of_mapping(tensor):
    """What Linux's `smaps` says of the memory that a tensor lies in; nothing on other systems."""
    place = Path("/proc/self/smaps")
    inside = False
    for line in place.read_text().splitlines() if place.exists() else ():
        bounds = re.match("([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_a_training_whose_pictures_do_not_fit_into_memory_ends_in_the_same_bits(
    after, run, monkeypatch
):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000.0)
    flags = []
    begun = []

    def noted(tensor):
        begin_reading = memory.random_reads(tensor)
        flags.extend(flags_of_mapping(tensor))

        def begin(rows):
            begin_reading(rows)
            begun.extend(rows.tolist())

        return begin if begin_reading else None

    monkeypatch.setattr(training, "random_reads", noted)
    done = run(*TINY, "--run-name", "mapped")
    assert done.code == 0
    # Without it the system reads what surrounds a row, too, and lets go of other rows.
    if Path("/proc/self/smaps").exists():
        assert "rr" in flags
        assert set(begun) == set(range(max(begun) + 1))  # every training picture
    assert "80 pictures of 16 px: 0 MB in a file in checkpoints/, not in memory" in done.out
    assert outcome(".", "mapped") == outcome(".", "custom_cnn")
    before = report("mapped")
    done = run("evaluate", "checkpoints/mapped.pt")
    assert "12 pictures of 16 px: 0 MB in a file in checkpoints/" in done.out
    assert report("mapped") == before
    assert os.name == "nt" or not list(Path("checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("num_bits", "colour_type", "samples", "clear"),
    [
        (4, 0, bytes([0x5F]), b"\x00\x05"),  # two greys, 5 of 15 is clear
        (16, 0, b"\x10\x00\x80\x00", b"\x10\x00"),
        (16, 2, b"\x12\x34" * 3 + b"\x80\x00" * 3, b"\x12\x34" * 3),
    ],
)
def test_the_transparent_colour_of_any_png_is_white(
    tmp_path, num_bits, colour_type, samples, clear
):
    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return len(body).to_bytes(4, "big") + kind + body + checksum.to_bytes(4, "big")

    size = struct.pack(">IIBBBBB", 2, 1, num_bits, colour_type, 0, 0, 0)
    rows = zlib.compress(b"\x00" + samples)
    path = tmp_path / "clear.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"tRNS", clear)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )
    square = pictures.load(path, 2, "squash")
    assert (square[:, 0] > 250).all()


def test_no_chain_of_weights_hands_a_test_picture_on(workplace, run, refused):
    noise(workplace / "one", {"a": 20, "b": 20})
    few = ("--recipe", "classic", "--epochs", "1", "--batch-size", "8", "--precision", "fp32")
    own = ("train_custom", *few, "--pictures", "one")
    assert run(*own, "--run-name", "first").code == 0
    by_way = ("train_custom", *few, "--limit", "20", "--weights", "checkpoints/first.pt")
    assert run(*by_way, "--run-name", "cifar").code == 0
    assert run("evaluate", "checkpoints/cifar.pt").code == 0
    again = (*own, "--seed", "5", "--run-name", "again", "--weights")
    for name in ("first", "cifar"):
        assert "pictures trained it; take the --seed" in refused(*again, f"checkpoints/{name}.pt")
    assert run(*own, "--weights", "checkpoints/cifar.pt", "--run-name", "third").code == 0
    back = (*by_way[:-1], "checkpoints/third.pt", "--run-name", "back")
    assert "validation images trained it" in refused(*back, "--val-fraction", "0.5")
    content = checkpoint.load(Path("checkpoints/first.pt"))
    del content["pictures"]
    checkpoint.save(Path("checkpoints/old.pt"), content)
    assert "does not say which pictures trained it" in refused(*again, "checkpoints/old.pt")


def test_the_median_side_is_of_shorter_sides_and_passes_over_what_cannot_be_opened(tmp_path):
    sides = {"a/wide.png": (500, 90), "a/tall.jpg": (210, 400), "b/square.png": (300, 300)}
    for name, size in sides.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(path)
    (tmp_path / "b/broken.jpg").write_bytes(b"no picture")
    assert pictures.median_side(tmp_path) == 210
    assert pictures.median_side(tmp_path / "absent") == 0
