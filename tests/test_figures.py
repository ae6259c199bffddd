import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from display import figures

ROOT = Path(__file__).parent.parent
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LABELS = torch.arange(60) % 10
LOGITS = 3 * torch.eye(10)[LABELS] + 2 * torch.randn(
    60, 10, generator=torch.Generator().manual_seed(0)
)
CUNEIFORM = "\U00012000"  # a script that few systems have a font of; matplotlib's has none
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
EPOCH = {
    "epoch": 1,
    "lr": 1e-3,
    "train_loss": 1.5,
    "train_accuracy": 0.4,
    "val_loss": 1.2,
    "val_accuracy": 0.5,
}
HISTORY = [EPOCH, {**EPOCH, "epoch": 2, "val_loss": 0.9}, {**EPOCH, "epoch": 3, "lr": 0.0}]
NO_VAL = [{**row, "val_loss": "", "val_accuracy": float("nan")} for row in HISTORY]
ODD_NAME = "cost_$5$ ^2\n\x1b[31m 猫 " + 40 * "x"


def pixels(path):
    """An opaque PNG's colours, (H, W, 3); its outermost pixels are white, so nothing is clipped."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width <= 1200
        array = np.asarray(image.convert("RGBA"))
    assert (array[..., 3] == 255).all()
    array = array[..., :3]
    for edge in (array[:3], array[-3:], array[:, :3], array[:, -3:]):
        assert (edge == 255).all()
    return array


def count(array, colour):
    """How many pixels have exactly this colour, given as #RRGGBB."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (array == rgb).all(-1).sum()


def shows(array, colour):
    """Whether at least a marker's worth of pixels has exactly this colour."""
    return count(array, colour) > 20


@pytest.mark.parametrize(
    ("history", "validated"),
    [(HISTORY, True), (HISTORY[:1], True), (NO_VAL, False), (NO_VAL[:1], False)],
    ids=["three epochs", "one epoch", "no validation", "one epoch, no validation"],
)
def test_curves_show_what_the_history_holds(tmp_path, history, validated):
    figures.curves(history, tmp_path / "curves.png", "a run")
    panels = np.array_split(pixels(tmp_path / "curves.png")[:440], [425, 840], axis=1)
    assert all(shows(panel, figures.ORANGE) for panel in panels[:2])
    assert [shows(panel, figures.BLUE) for panel in panels[:2]] == [validated, validated]
    assert shows(panels[2], figures.GREY)


def test_curves_mark_where_a_training_begins_again(tmp_path):
    for name, begins in (("once.png", []), ("again.png", [1])):
        figures.curves(HISTORY, tmp_path / name, "a run", begins)
    greys = [count(pixels(tmp_path / name), figures.GREY) for name in ("once.png", "again.png")]
    assert greys[1] > greys[0] + 100


def test_confusion_matrix_colours_the_mistakes_on_their_own_scale(tmp_path):
    matrix = 990 * torch.eye(10, dtype=torch.int64)
    matrix[3, 5] = 10  # 1 % must be as dark as anything gets
    figures.confusion_matrix(matrix, CLASSES, tmp_path / "rare.png", "a run")
    assert count(pixels(tmp_path / "rare.png"), "#08306B") > 2000  # the end of "Blues"
    matrix[3, 5] = 0
    matrix[9, 9] = 0  # a class without images divides by nothing
    figures.confusion_matrix(matrix, CLASSES, tmp_path / "none.png", "a run")
    pixels(tmp_path / "none.png")


@pytest.mark.parametrize("num_classes", [2, 20, 21, 1000])
def test_confusions_of_up_to_1000_classes_fit_a_readable_picture(tmp_path, num_classes):
    labels = torch.arange(4 * num_classes) % num_classes
    matrix = torch.diag(torch.bincount(labels))
    if num_classes > 2:
        matrix[0, 1], matrix[2, 0] = 3, 1
    names = [f"{number} {ODD_NAME}" for number in range(num_classes)]
    figures.confusion_matrix(matrix, names, tmp_path / "confusions.png", ODD_NAME)
    array = pixels(tmp_path / "confusions.png")
    # Beyond 20 classes a blue bar for each of the two pairs, the first three times the second.
    bars = (array == [0, 0x72, 0xB2]).all(-1)
    lengths = [int(row.sum()) for row in bars if row.sum() > 20]
    assert bool(lengths) == (num_classes > 20)
    if lengths:
        assert max(lengths) == pytest.approx(3 * min(lengths), rel=0.03)


@pytest.mark.parametrize("num_mistakes", [0, 1, 7, 60])
def test_mistakes_fit_their_number(tmp_path, num_mistakes):
    probabilities = 0.9 * torch.eye(10)[LABELS] + 0.01
    probabilities[:num_mistakes] = probabilities[:num_mistakes].roll(1, 1)
    path = tmp_path / "mistakes.png"
    figures.mistakes(IMAGES, LABELS, probabilities, CLASSES, path, "a-$long$-name-" * 8)
    inches = {0: 2.8, 1: 2.8, 7: 4.8, 60: 10.8}[num_mistakes]  # 25 at most, 5 to a row
    assert pixels(path).shape[0] == pytest.approx(120 * inches, abs=1)


def test_the_surest_mistakes_come_first(tmp_path):
    probabilities = torch.full((60, 10), 0.05)
    probabilities[range(60), LABELS] = 0.55
    probabilities[7] = torch.eye(10)[8] * 0.6
    probabilities[40] = torch.eye(10)[1] * 0.9
    images = np.zeros_like(IMAGES)
    images[7], images[40] = (0, 255, 0), (255, 0, 0)
    figures.mistakes(images, LABELS, probabilities, CLASSES, tmp_path / "m.png", "a run")
    array = pixels(tmp_path / "m.png")
    red = np.argwhere((array == (255, 0, 0)).all(-1))[:, 1]
    green = np.argwhere((array == (0, 255, 0)).all(-1))[:, 1]
    assert len(red) == len(green) > 150**2
    assert red.max() < green.min()


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_the_batch_shows_32_images_in_the_colours_the_network_sees(tmp_path, kind):
    images = np.zeros((40, 32, 32, 3), np.uint8)
    images[31], images[32] = (0, 255, 0), (255, 0, 0)
    images = images if kind == "uint8" else torch.from_numpy(images / np.float32(255))
    figures.batch(images, LABELS[:40], CLASSES, tmp_path / "batch.png", "a run")
    array = pixels(tmp_path / "batch.png")
    assert count(array, "#00FF00") > 100**2
    assert count(array, "#FF0000") == 0


def test_first_layer_shows_every_filter_grey_where_it_is_zero(tmp_path):
    filters = torch.zeros(24, 3, 2, 2)
    filters[0], filters[1, :, 0] = 1.0, -2.0  # each is scaled by its own largest value
    responses = torch.zeros(64, 16, 16)
    figures.first_layer(filters, tmp_path / "alone.png", "a run")
    figures.first_layer(filters, tmp_path / "with.png", "a run", (IMAGES[0], responses))
    array = pixels(tmp_path / "alone.png")
    light, dark, grey = (count(array, colour) for colour in ("#E5E5E5", "#191919", "#7F7F7F"))
    assert light == pytest.approx(2 * dark, rel=0.1)
    assert grey == pytest.approx(22.5 * light, rel=0.1)
    assert (pixels(tmp_path / "with.png") == 0).all(-1).sum() > 280**2


@pytest.mark.parametrize("number", [1, 3])
def test_predictions_have_a_row_for_each_picture(tmp_path, number):
    top = [("cat", 0.98), (ODD_NAME, 0.015), ("dog", 0.005)]
    heat = torch.zeros(64, 64)
    heat[:32] = 1
    rows = [(ODD_NAME, IMAGES[0].repeat(4, 1), np.zeros_like(IMAGES[1]), heat, top)] * number
    figures.predictions(rows, tmp_path / "predictions.png", "a run")
    array = pixels(tmp_path / "predictions.png")
    assert array.shape[0] == pytest.approx(120 * (0.9 + 1.45 * number), abs=1)
    assert count(array, figures.BLUE) > 3000 * number
    # On a black picture the heat alone is seen: as much of its highest as of its lowest colour.
    high = count(array, "#988B21")
    assert high == pytest.approx(count(array, "#00142E"), rel=0.1)
    assert high > 4000 * number


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("n", [1, 60])
def test_calibration_draws_a_curve_per_variant(tmp_path, temperature, n):
    figures.calibration(LOGITS[:n], LABELS[:n], temperature, tmp_path / "cal.png", "a run")
    array = pixels(tmp_path / "cal.png")
    assert shows(array, figures.ORANGE)
    assert shows(array, figures.BLUE) == (temperature is not None)


@pytest.fixture
def fonts(monkeypatch):
    """The system's font files, none but those that the test puts there."""
    files = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    monkeypatch.setattr(figures, "_boxes_said", [])
    figures._other_fonts.cache_clear()
    yield files
    figures._other_fonts.cache_clear()


def write_font(path, character):
    """A font whose only glyph, 10 em wide, is a black rectangle."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (9000, 800), (9000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "block"])
    font.setupCharacterMap({ord(character): "block"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "block": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "block": (10000, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Blocks", "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    font.save(path)


def test_a_class_name_that_matplotlibs_font_lacks_is_drawn_in_an_installed_font(
    tmp_path, capsys, fonts
):
    matrix = torch.eye(2, dtype=torch.int64)
    classes = ["cat", CUNEIFORM]
    figures.confusion_matrix(matrix, classes, tmp_path / "box.png", "a run")
    figures.confusion_matrix(matrix, classes[::-1], tmp_path / "again.png", "a run")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1  # said once
    assert CUNEIFORM in lines[0]

    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    write_font(tmp_path / "Blocks.ttf", CUNEIFORM)
    fonts += [str(tmp_path / "damaged.ttf"), str(tmp_path / "Blocks.ttf")]
    figures._other_fonts.cache_clear()  # as in another process
    figures.confusion_matrix(matrix, classes, tmp_path / "glyph.png", "a run")
    black = [count(pixels(tmp_path / f"{name}.png"), "#000000") for name in ("box", "glyph")]
    assert black[1] > black[0] + 500
    assert capsys.readouterr().err == ""


def test_probabilities_that_are_not_calibrated_say_so(tmp_path):
    wrong = 0.9 * torch.eye(10)[LABELS[:2]].roll(1, 1) + 0.01
    rows = [("a.png", IMAGES[0], IMAGES[1], torch.zeros(8, 8), [("cat", 0.9)])]
    for calibrated in (True, False):
        path = tmp_path / f"mistakes-{calibrated}.png"
        figures.mistakes(IMAGES[:2], LABELS[:2], wrong, CLASSES, path, "a run", calibrated)
        path = tmp_path / f"predictions-{calibrated}.png"
        figures.predictions(rows, path, "a run", calibrated)
    for name in ("mistakes", "predictions"):
        said = (tmp_path / f"{name}-False.png").read_bytes()
        assert said != (tmp_path / f"{name}-True.png").read_bytes()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "none such"])
def test_a_persons_matplotlib_settings_change_nothing(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.size: 30\nfigure.facecolor: black\nsavefig.bbox: tight\n"
        "savefig.dpi: 10\nimage.origin: lower\naxes.grid: True\nbackend: TkAgg\n"
    )
    code = (
        "import pathlib; from display import figures; "
        "figures.curves([dict(epoch=1, lr=0.1, train_loss=2.0)], "
        "pathlib.Path('there.png'), 'a_$run$')"
    )
    more = {"PYTHONPATH": str(ROOT), "MPLBACKEND": backend, "MATPLOTLIBRC": "."}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | more, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    figures.curves([{"epoch": 1, "lr": 0.1, "train_loss": 2.0}], tmp_path / "here.png", "a_$run$")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
