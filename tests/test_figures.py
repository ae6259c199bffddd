import json

import numpy as np
import pytest
import torch
from PIL import Image

import figures
import metrics
import reports
from files import write_json

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LABELS = torch.arange(60) % 10
LOGITS = 3 * torch.eye(10)[LABELS] + 2 * torch.randn(
    60, 10, generator=torch.Generator().manual_seed(0)
)
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
EPOCH = {
    "epoch": 1,
    "lr": 1e-3,
    "train_loss": 1.5,
    "train_accuracy": 0.4,
    "val_loss": 1.2,
    "val_accuracy": 0.5,
}
HISTORY = [EPOCH, {**EPOCH, "epoch": 2, "val_loss": 0.9}, {**EPOCH, "epoch": 3, "train_loss": 0.8}]
NO_VAL = [{**row, "val_loss": "", "val_accuracy": float("nan")} for row in HISTORY]


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


def shows(array, colour):
    """Whether at least a marker's worth of pixels has exactly this colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (array == rgb).all(-1).sum() > 20


@pytest.mark.parametrize(
    ("history", "validated"),
    [(HISTORY, True), (HISTORY[:1], True), (NO_VAL, False), (NO_VAL[:1], False)],
    ids=["three epochs", "one epoch", "no validation", "one epoch, no validation"],
)
def test_curves_show_what_the_history_holds(tmp_path, history, validated):
    figures.curves(history, tmp_path / "curves.png", "a run")
    array = pixels(tmp_path / "curves.png")
    panels = np.array_split(array, [425, 840], axis=1)
    assert all(shows(panel, figures.ORANGE) for panel in panels[:2])
    assert [shows(panel, figures.BLUE) for panel in panels[:2]] == [validated, validated]
    assert shows(panels[2], figures.GREY)


def test_confusion_matrix_colours_the_mistakes_on_their_own_scale(tmp_path):
    matrix = 990 * torch.eye(10, dtype=torch.int64)
    matrix[3, 5] = 10  # 1 % must be as dark as anything gets
    figures.confusion_matrix(matrix, CLASSES, tmp_path / "rare.png", "a run")
    dark = (pixels(tmp_path / "rare.png") == [8, 48, 107]).all(-1)  # the end of "Blues"
    assert dark.sum() > 2000
    matrix[3, 5] = 0
    matrix[9, 9] = 0  # a class without images divides by nothing
    figures.confusion_matrix(matrix, CLASSES, tmp_path / "none.png", "a run")
    pixels(tmp_path / "none.png")


@pytest.mark.parametrize("num_mistakes", [0, 1, 7, 60])
def test_mistakes_fit_their_number(tmp_path, num_mistakes):
    logits = 5 * torch.eye(10)[LABELS]
    logits[:num_mistakes] = logits[:num_mistakes].roll(1, 1)
    name = "a-long-name-$with-a-dollar$-" * 4
    figures.mistakes(IMAGES, LABELS, logits, CLASSES, tmp_path / "mistakes.png", name, count=10)
    height, width, _ = pixels(tmp_path / "mistakes.png").shape
    assert height == pytest.approx(width * (0.8 + 2.05 * (1 if num_mistakes < 6 else 2)) / 9, abs=1)


def test_the_surest_mistakes_come_first(tmp_path):
    logits = torch.zeros(60, 10)
    logits[range(60), LABELS] = 5.0
    logits[7] = logits[7].roll(1)
    logits[40] = 2 * logits[40].roll(1)
    images = np.zeros_like(IMAGES)
    images[7], images[40] = (0, 255, 0), (255, 0, 0)
    figures.mistakes(images, LABELS, logits, CLASSES, tmp_path / "mistakes.png", "a run")
    array = pixels(tmp_path / "mistakes.png")
    red = np.argwhere((array == (255, 0, 0)).all(-1))[:, 1]
    green = np.argwhere((array == (0, 255, 0)).all(-1))[:, 1]
    assert len(red) == len(green) > 150**2
    assert red.max() < green.min()


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("n", [1, 60])
def test_calibration_draws_a_curve_per_variant(tmp_path, temperature, n):
    figures.calibration(LOGITS[:n], LABELS[:n], temperature, tmp_path / "cal.png", "a run")
    array = pixels(tmp_path / "cal.png")
    assert shows(array, figures.ORANGE)
    assert shows(array, figures.BLUE) == (temperature is not None)


def test_every_way_to_fine_tune_has_a_line_in_the_panel_of_its_network_and_machine(tmp_path):
    rows = [
        {"arch": "vgg19", "hardware": hardware, "flags": flags}
        | {"minutes": minutes, "val_accuracy": minutes / 10}
        for hardware, ways in (("2 cores", ("--epochs 2", "--epochs 3")), ("a GPU", ("",)))
        for flags in ways
        for minutes in (1, 5, 9)
    ]
    figures.accuracy_by_minutes(rows, tmp_path / "by_minutes.png")
    panels = np.array_split(pixels(tmp_path / "by_minutes.png"), 2, axis=1)
    assert [shows(panel, figures.BLUE) for panel in panels] == [True, True]
    assert [shows(panel, figures.ORANGE) for panel in panels] == [True, False]


def test_report_writes_its_numbers_and_a_picture_of_each_kind(tmp_path):
    header = "epoch,step,lr,train_loss,train_accuracy,val_loss,val_accuracy\n"
    (tmp_path / "history.csv").write_text(header + "1,10,0.001,1.5,0.4,,\n2,20,0,1.2,0.5,,\n")
    report = reports.write_test_report(
        tmp_path,
        logits=LOGITS,
        labels=LABELS,
        logits_tta=None,
        temperature=1.5,
        images=torch.from_numpy(IMAGES),
        classes=CLASSES,
        name="a run",
        extra={"device": "cpu"},
    )
    assert json.loads((tmp_path / "test.json").read_text()) == report
    assert report["top1"] == metrics.top1(LOGITS, LABELS)
    assert report["device"] == "cpu"
    for name in ("curves", "confusion_matrix", "mistakes", "calibration"):
        pixels(tmp_path / f"{name}.png")
    lines = reports.per_class_table(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].endswith(f"{100 * report['top1']:.2f} %")


def write_run(folder, seed, top1, **config):
    config = {"epochs": 10, "recipe": "modern", "run_name": folder.name, "seed": seed} | config
    run = {
        "arch": "custom_cnn",
        "config": config,
        "environment": {"hardware": "2 cores | <x>"},
        "parameters": {"total": 1_500_000},
        "train_seconds": 90.0,
        "date": "2025-01-01",
    }
    write_json(folder / "config.json", run)
    write_json(folder / "test.json", {"top1": top1, "top1_tta": None})


def test_comparison_sorts_escapes_and_averages_over_seeds(tmp_path, capsys):
    write_run(tmp_path / "the[first]_run_", 0, 0.90)
    write_run(tmp_path / "second", 1, 0.92)
    write_run(tmp_path / "other", 0, 0.91, epochs=20)
    readme = tmp_path / "README.md"
    rows = reports.write_results_readme(tmp_path)
    assert [row["run"] for row in rows] == ["second", "other", "the[first]_run_"]
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert (
        r"| [the\[first\]\_run\_](the%5Bfirst%5D_run_/) | custom_cnn | modern | none | 10 "
        r"| 90.00 | - | 1.5 | 1.5 | 2 cores \| \<x\> | 0 | 2025-01-01 |"
    ) in lines
    assert lines[-1] == "| custom_cnn | modern | none | 10 | 2 | 91.00 ± 1.41 | - |"
    assert capsys.readouterr().err == ""


def test_runs_without_readable_files_are_left_out_with_one_line_each(tmp_path, capsys):
    write_run(tmp_path / "whole-with-a-very-long-name-that-goes-on-and-on", 123456789, 0.9)
    write_run(tmp_path / "cut", 0, 0.9)
    (tmp_path / "cut/test.json").write_text('{"top1": 0.9')
    write_run(tmp_path / "list", 0, 0.9)
    (tmp_path / "list/config.json").write_text("[]")
    write_run(tmp_path / "nan", 0, 0.9)
    (tmp_path / "nan/test.json").write_text('{"top1": NaN}')
    write_run(tmp_path / "unfinished", 0, 0.9)
    (tmp_path / "unfinished/test.json").unlink()
    write_json(tmp_path / "benchmark/numbers.json", {})
    rows = reports.comparison_rows(tmp_path)
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(":")[0].rsplit("/")[-1] for note in notes] == [
        "cut",
        "list",
        "nan",
        "unfinished",
    ]
    assert notes[-1].endswith("left out, no test.json")
    assert [len(line) for line in reports.terminal_table(rows).splitlines()] == [79, 79]
    assert "±" not in reports.comparison_table(rows)


def test_no_runs_make_a_table_that_says_so(tmp_path):
    assert reports.write_results_readme(tmp_path / "absent") == []
    assert "No finished run yet" in (tmp_path / "absent/README.md").read_text()
