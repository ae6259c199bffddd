"""What people's own pictures look like to the network, whatever file they come in."""

import io
import os
import struct
import sys
import threading
import time
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, SMALL, outcome
from PIL import Image, ImageFile, PngImagePlugin

from benchmarks import odd_pictures
from benchmarks.odd_pictures import chunk, exif, jpeg, png, tiff
from errors import UnusableInput
from sources import pictures
from sources.cifar10 import CLASSES

RAMP = np.tile(np.arange(0, 256, 8), (32, 1))  # 0, 8, ... 248 from left to right
COLOURS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
HALVES = np.zeros((40, 60, 3), np.uint8)
HALVES[:, :30] = 255  # white on the left


def loaded(tmp_path, content, notes=None):
    path = tmp_path / "picture"
    path.write_bytes(content)
    return pictures.load(path, 32, notes)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_small_picture_keeps_its_very_bits(tmp_path):
    for kind in ("PNG", "BMP", "TIFF", "PPM", "TGA"):
        assert np.array_equal(loaded(tmp_path, saved(COLOURS, kind)), COLOURS), kind


def test_a_large_picture_is_reduced_by_lanczos_from_its_central_square(tmp_path):
    image = Image.fromarray(COLOURS).resize((100, 60))
    expected = image.resize((32, 32), Image.Resampling.LANCZOS, box=(20, 0, 80, 60))
    assert np.array_equal(loaded(tmp_path, saved(np.asarray(image), "PNG")), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_every_mode_shows_its_central_square_in_rgb(tmp_path, mode):
    image = Image.fromarray(HALVES)
    if mode == "I;16":
        image = Image.fromarray(HALVES[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    result = pictures.load(path)
    assert result.shape == (32, 32, 3)
    assert result[:, :12].min() > 245
    assert result[:, 20:].max() < 10


def test_what_is_transparent_is_white(tmp_path):
    clear = np.zeros((9, 9, 4), np.uint8)
    assert loaded(tmp_path, saved(clear, "PNG")).min() == 255
    assert loaded(tmp_path, saved(clear, "WEBP", lossless=True)).min() == 255


@pytest.mark.parametrize("kind", ["TGA", "BMP", "ICO"])
def test_alpha_of_zeros_everywhere_is_no_transparency(tmp_path, kind):
    image = np.dstack([COLOURS, np.zeros((32, 32), np.uint8)])
    if kind == "BMP":  # Pillow writes no alpha mask
        masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        head = struct.pack("<IiiHHIIiiII", 108, 32, 32, 1, 32, 3, 4096, 0, 0, 0, 0) + masks
        start = b"BM" + struct.pack("<IHHI", 122 + 4096, 0, 0, 122) + head.ljust(108, b"\0")
        content = start + image[::-1, :, [2, 1, 0, 3]].tobytes()
    else:
        content = saved(image, kind, **({"sizes": [(32, 32)]} if kind == "ICO" else {}))
    assert np.array_equal(loaded(tmp_path, content), COLOURS)
    image[:16, :, 3] = 255
    if kind == "TGA":  # where some are not zero, they count
        assert loaded(tmp_path, saved(image, kind))[16:].min() == 255


# --- the range of values -----------------------------------------------------------------------


def with_odd(values, *odd):
    values = np.array(values, np.float32)
    for place, value in enumerate(odd):
        values[5, 10 + place] = value
    return values


UNIT = RAMP / 248
STRETCHED = np.rint(UNIT * 255)
SBIT = chunk(b"sBIT", b"\x0c")


@pytest.mark.parametrize(
    ("content", "expected", "assumed"),
    [
        (tiff(with_odd(UNIT), 3), STRETCHED, "took 0 and 1 "),
        (tiff((UNIT / 2).astype("f4"), 3), UNIT / 2 * 255, "took 0 and 1 "),
        (tiff(RAMP.astype("f4"), 3), RAMP, "took 0 and 255 "),
        (tiff((UNIT * 2 - 1).astype("f4"), 3), STRETCHED, "took -1 and 1 "),
        (tiff((UNIT - 7).astype("f4"), 3), STRETCHED, "took -7 and -6 "),
        (tiff((UNIT * 1e-4).astype("f4"), 3), STRETCHED, "took 0 and 0.0001 "),
        (tiff((RAMP * 2).astype("f4"), 3, t341=(11, 510)), RAMP, None),
        (tiff(RAMP.astype("i4"), 2), RAMP, "took 0 and 255 "),
        (tiff(RAMP.astype("u4")), RAMP, "took 0 and 255 "),
        (tiff((RAMP * 0x1010101).astype("u4")), RAMP, None),
        (tiff((RAMP * 257).astype("i4"), 2), RAMP, "took 0 and 65535 "),
        (tiff((RAMP * 128).astype("i2"), 2), RAMP * 128 / 32767 * 255, None),
        (tiff((RAMP * 257).astype("u2")), RAMP, None),
        (tiff((RAMP * 257).astype("u2"), order=">"), RAMP, None),
        (tiff((RAMP * 16).astype("u2")), RAMP * 16 / 4095 * 255, "took 0 and 4095 "),
        (tiff(RAMP.astype("u2")), RAMP, "took 0 and 255 "),
        (tiff((RAMP * 8).astype("u2"), t281=(3, 4095)), RAMP * 8 / 4095 * 255, None),
        (tiff((RAMP * 257).astype("u2"), t262=(3, 0)), 255 - RAMP, None),
        (png(RAMP * 257, 16, 0), RAMP, None),
        (png(RAMP * 16 + 1, 16, 0, SBIT), (RAMP * 16 + 1) / 4095 * 255, None),
        (png(RAMP * 16, 16, 0, SBIT), RAMP * 16 / 65535 * 255, None),  # in the upper bits, dark
        (png(RAMP * 16, 16, 0), RAMP * 16 / 4095 * 255, "took 0 and 4095 "),
        (b"P5 32 32 4095\n" + RAMP.astype(">u2").tobytes(), RAMP / 4095 * 255, None),
        (tiff(np.zeros((32, 32), "u2")), RAMP * 0, None),
        (tiff(np.full((32, 32), -3, "i4"), 2), RAMP * 0, "took -3 and -3 "),
    ],
)
def test_deep_values_come_to_8_bits_by_the_files_range_or_a_said_one(
    tmp_path, content, expected, assumed
):
    notes = []
    result = loaded(tmp_path, content, notes)
    assert abs(result - np.asarray(expected)[..., None]).max() <= 0.51
    assert [assumed in note for note in notes] == [True] * (assumed is not None)


def test_twelve_packed_bits_fill_the_range(tmp_path):
    values = RAMP.astype(np.uint16)  # a dark picture: nothing is to be guessed here
    packed = np.packbits(np.unpackbits(values.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 4:])
    file = tiff(np.zeros((32, 24), "u2"), t256=(4, 32), t258=(3, 12))[: -32 * 48]
    notes = []
    result = loaded(tmp_path, file + packed.tobytes(), notes)
    assert abs(result[..., 0] - RAMP / 4095 * 255).max() <= 0.51
    assert not notes


def test_one_value_that_is_no_number_changes_no_other(tmp_path):
    whole = loaded(tmp_path, tiff(with_odd(UNIT), 3))
    odd = loaded(tmp_path, tiff(with_odd(UNIT, np.nan, np.inf, -np.inf), 3))
    assert odd[5, 10:13, 0].tolist() == [0, 255, 0]
    odd[5, 10:13] = whole[5, 10:13]
    assert np.array_equal(odd, whole)
    with pytest.raises(UnusableInput, match="finite"):
        loaded(tmp_path, tiff(with_odd(UNIT * np.nan), 3))


@pytest.mark.parametrize(("depth", "top"), [(1, 1), (2, 3), (4, 15), (8, 255), (16, 65535)])
def test_the_transparent_grey_is_the_one_that_trns_names(tmp_path, depth, top):
    values = np.tile([0, top, 0, top // 3], (32, 8))
    content = png(values, depth, 0, chunk(b"tRNS", struct.pack(">H", top // 3)))
    result = loaded(tmp_path, content + chunk(b"IHDR", bytes(13)))  # the end is the end
    expected = np.where(values == top // 3, 255, values * 255 // top)
    assert np.array_equal(result[..., 0], expected)


@pytest.mark.parametrize(("depth", "scale"), [(8, 1), (16, 257)])
def test_the_transparent_colour_is_the_one_that_trns_names(tmp_path, depth, scale):
    expected, colour = COLOURS.copy(), COLOURS[3, 4].astype(int) * scale
    expected[3, 4] = 255
    clear = chunk(b"tRNS", struct.pack(">HHH", *colour))
    result = loaded(tmp_path, png(COLOURS.astype(int) * scale, depth, 2, clear))
    assert np.array_equal(result, expected)


# --- what surrounds the pixels -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(10))
def test_every_orientation_comes_out_upright(tmp_path, kind, value):
    data = Image.Exif()
    data[0x0112] = value
    options = {"quality": 100, "lossless": True} if kind != "TIFF" else {}
    result = loaded(tmp_path, saved(COLOURS, kind, exif=data, **options))
    plain = loaded(tmp_path, saved(COLOURS, kind, **options))
    assert np.array_equal(result, odd_pictures.TURNS.get(value, odd_pictures.TURNS[1])(plain))


ODD_EXIF = {
    "negative altitude": odd_pictures.negative_altitude(6),
    "negative altitude, big-endian": odd_pictures.negative_altitude(6, ">"),
    "GPS of a wrong type": exif(6, (0x8825, 2, 1, b"7\0\0\0")),
    "GPS points nowhere": exif(6, (0x8825, 4, 1, b"\xff\xff\xff\x7f")),
    "resolution of two values": exif(6, (0x011A, 5, 2, b"\x08\0\0\0")),
    "unknown type": exif(6, (0x0213, 99, 1, b"abcd")),
    "comment of wrong type": exif(6, (0x9286, 2, 4, b"abcd"), (0x927C, 7, 9999, b"abcd")),
    "cut behind the tag": exif(6, (0x8825, 4, 1, b"abcd"))[:-12],
    "a long number": exif(6, form=4),
}


@pytest.mark.parametrize("data", ODD_EXIF.values(), ids=ODD_EXIF.keys())
def test_orientation_is_read_whatever_the_other_tags_are(tmp_path, data):
    content, plain = jpeg(COLOURS, data)
    assert np.array_equal(loaded(tmp_path, content), np.rot90(plain, -1))
    content = png(COLOURS, 8, 2, chunk(b"eXIf", data[6:]))
    assert np.array_equal(loaded(tmp_path, content), np.rot90(COLOURS, -1))


@pytest.mark.parametrize(
    "data",
    [
        exif(0),
        exif(9),
        exif(6, form=4).replace(
            struct.pack("<HHI", 0x0112, 4, 1), struct.pack("<HHI", 0x0112, 2, 4)
        ),
        exif(6).replace(struct.pack("<HHI", 0x0112, 3, 1), struct.pack("<HHI", 0x0112, 12, 1)),
        exif(6)[:16],
        b"Exif\0\0",
        b"Exif\0\0II*\0" + b"\xff" * 40,
        b"Exif\0\0nonsense",
    ],
    ids=["0", "9", "text", "double", "cut", "empty", "nowhere", "nonsense"],
)
def test_an_orientation_that_is_none_turns_nothing(tmp_path, data):
    content, plain = jpeg(COLOURS, data)
    assert np.array_equal(loaded(tmp_path, content), plain)


def test_tiff_is_turned_though_its_other_tags_are_odd(tmp_path):
    file = tiff((RAMP * 257).astype("u2"), t274=(3, 6), t34665=(4, 5), t700=(4, 65))
    place = file.index(struct.pack("<HHI", 34665, 4, 1))
    file = file[: place + 2] + struct.pack("<HIi", 9, 1, -5) + file[place + 12 :]  # to before it
    assert np.array_equal(loaded(tmp_path, file)[..., 0], np.rot90(RAMP, -1))


BIG = zlib.compress(bytes(3 << 20), 9)  # Pillow unpacks 1 MiB
BOMB = zlib.compress(bytes(20 << 20), 9)
AROUND = {
    "text": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "bombs": chunk(b"zTXt", b"Comment\0\0" + BOMB) * 20,
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + BIG),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG),
    "much plain text": chunk(b"tEXt", b"Comment\0" + bytes(40_000)) * 2,
    "ICC profile": chunk(b"iCCP", b"ICC\0\0" + BIG),
    "ICC of unknown packing": chunk(b"iCCP", b"ICC\0\7" + BIG),
    "cut pHYs": chunk(b"pHYs", b"\0\0\x0b"),
    "cut gAMA": chunk(b"gAMA", b"\0"),
    "cut acTL": chunk(b"acTL", b"\0"),
    "cut fcTL": chunk(b"acTL", bytes(3) + b"\2" + bytes(4)) + chunk(b"fcTL", bytes(9)),
    "cut tRNS": chunk(b"tRNS", b"\0\1\0"),
    "damaged text": chunk(b"tEXt", b"Comment\0words")[:-1] + b"!",
    "damaged tRNS": chunk(b"tRNS", bytes(6))[:-1] + b"!",
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_png_shows_its_pixels_whatever_surrounds_them(tmp_path, monkeypatch, around):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1 << 16)  # of Pillow's 64 MB
    turn = chunk(b"eXIf", exif(3)[6:])
    result = loaded(tmp_path, png(COLOURS, 8, 2, around, turn))
    assert np.array_equal(result, COLOURS[::-1, ::-1])
    if b"tRNS" not in around:
        assert np.array_equal(loaded(tmp_path, png(COLOURS, 8, 2, after=around)), COLOURS)


def test_an_interlaced_or_animated_png_whose_surroundings_are_broken_shows_its_first_picture(
    tmp_path,
):
    second = Image.fromarray(255 - COLOURS)
    moving = saved(COLOURS, "PNG", save_all=True, append_images=[second])
    broken = moving.replace(b"fcTL", b"fcTM", 1)
    assert np.array_equal(loaded(tmp_path, moving), COLOURS)
    assert np.array_equal(loaded(tmp_path, broken), COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_picture_is_refused_wherever_it_is_cut(tmp_path, kind):
    small = COLOURS[:9, :9]
    whole = png(small, 8, 2, chunk(b"tEXt", b"a\0b")) if kind == "PNG" else saved(small, kind)
    # What comes last are the marks of the end, and PNG's checksums.
    for length in range(0, len(whole) - 24, 1 if kind == "PNG" else 9):
        with pytest.raises(UnusableInput, match="picture: cannot be read"):
            loaded(tmp_path, whole[:length])


@pytest.mark.parametrize("size", [(20_000, 5_001), (32_000, 32_000)])
def test_a_picture_of_too_many_pixels_is_refused(tmp_path, size):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0))
    with pytest.raises(UnusableInput, match="more than 100,000,000 pixels; make it smaller"):
        loaded(tmp_path, odd_pictures.SIGNATURE + head + chunk(b"IDAT", bytes(99)))


def test_odd_pictures_are_what_they_show():
    counts = odd_pictures.compare(300, seed=1)
    assert counts["different"] == 0
    assert counts["equal"] > 200


def test_reading_leaves_pillow_and_warnings_as_they_were(tmp_path):
    def state():
        limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        return *limits, ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, warnings.filters[:]

    before = state()
    loaded(tmp_path, png(COLOURS, 8, 2, AROUND["XMP"]))
    classes(tmp_path / "photos")
    pictures.folder(tmp_path / "photos", 8, val_fraction=0.1, test_fraction=0.1, seed=0)
    assert state() == before


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
    assert list(pictures.find(explicit)) == explicit


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
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    pictures._formats.cache_clear()
    pictures._formats()
    pictures._formats.cache_clear()
    assert called


# --- a folder per class ------------------------------------------------------------------------

FRACTIONS = {"val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def classes(path, counts=(("cat", 10), ("dog", 20), ("owl", 3)), first=0):
    """Writes pictures of one colour each: red is the class, green and blue the number."""
    for label, (name, count) in enumerate(counts):
        (path / name).mkdir(parents=True)
        for number in range(first, first + count):
            colour = (label, *divmod(number, 256))
            Image.new("RGB", (8, 8), colour).save(path / name / f"{number:05}.png")
    return path


def colours(images):
    return [tuple(image[0, 0].tolist()) for image in images]


def test_a_folder_per_class_is_split_stratified_and_by_seed(tmp_path):
    classes(tmp_path)
    arrays, said = pictures.folder(tmp_path, 8, **FRACTIONS)
    assert arrays.classes == ("cat", "dog", "owl")
    assert arrays.train_images.shape == (26, 8, 8, 3)
    assert np.bincount(arrays.test_labels).tolist() == [2, 4, 1]
    assert arrays.val_images is arrays.val_labels is None
    for images, labels in (arrays[1:3], arrays[3:5]):
        assert [red for red, _, _ in colours(images)] == labels.tolist()
    both = colours(arrays.train_images) + colours(arrays.test_images)
    assert len(set(both)) == len(both) == 33
    assert said == {
        **{"source": "pictures", "folder": str(tmp_path), "read": 33, "unreadable": 0},
        **{"per_class": {"cat": 10, "dog": 20, "owl": 3}, "splits": "made (seed 0, 20 % test)"},
    }
    again, _ = pictures.folder(tmp_path, 8, **FRACTIONS)
    other, _ = pictures.folder(tmp_path, 8, **FRACTIONS | {"seed": 1})
    assert np.array_equal(again.test_images, arrays.test_images)
    assert not np.array_equal(other.test_images, arrays.test_images)


@pytest.mark.parametrize(("fraction", "sizes"), [(0.01, [1, 1, 1]), (0.99, [8, 18, 1])])
def test_every_class_keeps_a_picture_for_each_split(tmp_path, fraction, sizes):
    classes(tmp_path)
    arrays, _ = pictures.folder(tmp_path, 8, **FRACTIONS | {"test_fraction": fraction})
    assert np.bincount(arrays.test_labels).tolist() == sizes


def test_given_splits_are_honoured(tmp_path, capsys):
    for number, split in enumerate(("train", "val", "test")):
        classes(tmp_path / split, (("cat", 2), ("dog", 1)), first=100 * number)
    (tmp_path / "val" / "dog" / "00100.png").unlink()
    (tmp_path / "extra.png").touch()
    arrays, said = pictures.folder(tmp_path, 8, **FRACTIONS)
    assert colours(arrays.train_images) == [(0, 0, 0), (1, 0, 0), (0, 0, 1)]
    assert colours(arrays.val_images) == [(0, 0, 100), (0, 0, 101)]
    assert colours(arrays.test_images) == [(0, 0, 200), (1, 0, 200), (0, 0, 201)]
    assert said["splits"] == "as given"
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: 1 pictures outside the folders of classes are left out",
        f"{tmp_path}: val/ has 0 pictures of class dog",
    ]


def test_train_and_test_may_be_names_of_classes(tmp_path):
    classes(tmp_path, (("bus", 4), ("test", 5), ("train", 6)))
    (tmp_path / "train" / "steam").mkdir()
    arrays, said = pictures.folder(tmp_path, 8, **FRACTIONS)
    assert arrays.classes == ("bus", "test", "train")
    assert said["per_class"] == {"bus": 4, "test": 5, "train": 6}


@pytest.mark.parametrize(
    "script",
    [
        SMALL,
        ("finetune", "--arch", "resnet18", "--weights", "none", *CPU, "--image-size", "32"),
    ],
)
def test_cifar_written_out_as_pictures_trains_to_the_same_bits(run, sample, script):
    folder = Path("photos")
    for split in ("train", "test"):
        for number, label in enumerate(sample[f"{split}_labels"]):
            path = folder / split / CLASSES[label] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample[f"{split}_images"][number]).save(path)
    arrays, _ = pictures.folder(folder, 32, **FRACTIONS)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(arrays, name), sample[name])
    assert run(*script, "--run-name", "arrays").code == 0
    done = run(*script, "--run-name", "photos", "--pictures", folder)
    assert done.code == 0
    assert "10 steps are few to learn in: try --batch-size 32 --epochs 15\n" in done.out
    assert outcome(".", "arrays") == outcome(".", "photos")


def test_unreadable_pictures_are_named_counted_and_left_out(tmp_path, capsys):
    classes(tmp_path)
    for number in range(14):
        (tmp_path / "dog" / f"x{number:02}.png").write_text("no picture")
    (tmp_path / "dog" / "._00000.png").write_text("of macOS")
    Image.fromarray((RAMP * 16).astype(np.uint16)).save(tmp_path / "cat" / "12 bits.png")
    arrays, said = pictures.folder(tmp_path, 8, **FRACTIONS)
    assert len(arrays.train_images) + len(arrays.test_images) == said["read"] == 34
    assert said["unreadable"] == 14
    lines = capsys.readouterr().err.splitlines()
    assert "took 0 and 4095" in lines[0]
    assert sum("no picture" in line or "left out" in line for line in lines) == 9
    assert lines[-1] == "and 5 more like these"


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "0 folders of classes; make it two to 1,000"),
        ({"cat": 5}, "1 folders of classes"),
        (dict.fromkeys(map(str, range(1001)), 0), "1,001 folders of classes"),
        (
            {"cat": 5, "dog": 0},
            "has 0 pictures of class dog that can be read for train, 3 are needed",
        ),
        ({"cat": 5, "dog": 2}, "has 2 pictures of class dog .* add some, or take the folder away"),
        ({"val/cat": 3, "val/dog": 3}, "no train/"),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/cow": 1},
            "test/cow is not in train/; add it",
        ),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 0},
            "has 0 pictures of class cat .* for test",
        ),
        ({"train/cat": 3, "train/dog": 3, "test": 9}, "has 0 pictures of class cat .* for test"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path, layout, words):
    for name, count in layout.items():
        classes(tmp_path, ((name, count),))
    with pytest.raises(UnusableInput, match=words) as caught:
        pictures.folder(tmp_path, 8, **FRACTIONS)
    assert str(caught.value).isprintable()
    assert str(tmp_path) in str(caught.value)


def test_a_class_whose_pictures_cannot_be_read_is_too_small(tmp_path):
    classes(tmp_path, (("cat", 5), ("dog", 3)))
    (tmp_path / "dog" / "00001.png").write_text("no picture")
    with pytest.raises(UnusableInput, match="2 pictures of class dog that can be read"):
        pictures.folder(tmp_path, 8, **FRACTIONS)
    with pytest.raises(UnusableInput, match="no such folder"):
        pictures.folder(tmp_path / "none", 8, **FRACTIONS)


def test_pictures_that_would_not_fit_are_refused_before_they_are_read(tmp_path, monkeypatch):
    classes(tmp_path)
    monkeypatch.setattr("runtime.memory.available_memory", lambda: 2 * 33 * 64 * 64 * 3 - 1.0)
    with pytest.raises(UnusableInput, match=r"33 pictures of 64 px .* smaller --image-size"):
        pictures.folder(tmp_path, 64, **FRACTIONS)
    assert pictures.folder(tmp_path, 63, **FRACTIONS)


def test_too_little_memory_is_not_the_pictures_fault(tmp_path, monkeypatch):
    classes(tmp_path)
    monkeypatch.setattr(pictures, "_upright", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(UnusableInput, match="MemoryError"):
        pictures.folder(tmp_path, 8, **FRACTIONS)


def test_a_signal_does_not_wait_for_the_pictures_that_are_left(tmp_path, monkeypatch):
    classes(tmp_path, (("cat", 500), ("dog", 500)))
    read = []

    def load(path, side, notes):
        time.sleep(0.01)
        read.append(path)
        return np.zeros((side, side, 3), np.uint8)

    def bar(squares, **_):
        for number, square in enumerate(squares):
            if number == 20:
                raise KeyboardInterrupt
            yield square

    monkeypatch.setattr(pictures, "load", load)
    monkeypatch.setattr(pictures, "tqdm", bar)
    with pytest.raises(KeyboardInterrupt):
        pictures.folder(tmp_path, 8, **FRACTIONS)
    assert len(read) < 200


def test_links_and_odd_names_of_classes_do_no_harm(tmp_path):
    classes(tmp_path / "photos", (("cat", 5), ("new\nline", 5)))
    classes(tmp_path / "elsewhere", (("dog", 5),))
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "photos" / "cat" / "loop").symlink_to(tmp_path / "photos")
    try:
        (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    arrays, said = pictures.folder(tmp_path / "photos", 8, **FRACTIONS)
    assert arrays.classes == ("caf\\udce9", "dog", "new line")
    assert all(name.isprintable() for name in arrays.classes)
    assert said["per_class"]["dog"] == 5
