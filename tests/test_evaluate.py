import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

import data
import metrics
import models
from config import recipes
from engine import predict
from storage import checkpoint
from storage.files import write_json

REPORT = Path("results/custom_cnn/test.json")


def report(path=REPORT):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def trained(run, kept, workplace):
    """The checkpoint of a run in the working folder; trained once for all tests."""
    if not (kept / "checkpoints").exists():
        assert run(*SMALL).code == 0
        for name in ("checkpoints", "results"):
            shutil.copytree(name, kept / name)
    shutil.copytree(kept, workplace, dirs_exist_ok=True)
    return Path("checkpoints/custom_cnn.pt")


def test_evaluation_repeats_the_numbers_of_the_training_on_all_test_images(run, trained):
    before, described = report(), REPORT.with_name("config.json").read_bytes()
    done = run("evaluate", trained, "--tta", "crops", "--batch-size", "7")
    after = report()
    for key in ("n", "top1", "top1_tta", "per_class", "checkpoint_sha256", "temperature"):
        assert after[key] == before[key], key
    assert after["loss"] == pytest.approx(before["loss"])
    assert REPORT.with_name("config.json").read_bytes() == described
    assert f"{100 * after['top1']:.2f} % of 80 test images" in done.out
    for words in ("airplane", "macro average"):
        assert words in done.out
    # Without views an earlier number over views stays; elsewhere config.json comes from the file.
    assert run("evaluate", trained, "--results-dir", "other").code == 0
    alone = report("other/custom_cnn/test.json")
    assert (alone["top1"], alone["top1_tta"]) == (before["top1"], None)
    assert "| classic" in Path("other/README.md").read_text()
    assert run("evaluate", trained).code == 0
    assert report()["top1_tta"] == before["top1_tta"]


def test_every_finished_checkpoint_is_compared_and_a_bad_one_is_named(run, trained):
    trained.with_name("other.resume.pt").write_bytes(b"unfinished")
    trained.with_name("broken.pt").write_bytes(b"no checkpoint")
    done = run("evaluate")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "broken.pt" in done.err
    assert "custom_cnn" in done.out
    assert "other" not in done.out + done.err
    assert max(map(len, done.out.splitlines())) <= 80
    assert "custom_cnn" in Path("results/README.md").read_text()


def test_a_folder_with_the_results_of_another_checkpoint_is_left_alone(refused, trained):
    write_json(REPORT, report() | {"checkpoint_sha256": "0" * 64})
    before = REPORT.read_bytes()
    assert "give --results-dir" in refused("evaluate", trained)
    assert REPORT.read_bytes() == before


def test_a_run_on_part_of_the_data_is_evaluated_on_that_part(run, trained):
    content = checkpoint.load(trained)
    checkpoint.save(trained, content | {"name": "part", "config": {"limit": 16}})
    assert run("evaluate", trained).code == 0
    assert report("results/part/test.json")["n"] == 16


def test_own_pictures_are_classified_and_an_unreadable_one_is_named(run, refused, trained, sample):
    for index in range(2):
        image = Image.fromarray(sample["test_images"][index]).resize((90, 60))
        Path("photos").mkdir(exist_ok=True)
        image.save(f"photos/{index}.jpg")
    Path("photos/\x1b[31m\nbroken.png").write_text("no picture")
    done = run("evaluate", trained, "--predict", "photos", "--figure", "seen.png")
    heading, *lines = done.out.splitlines()
    assert heading.startswith("probabilities: averaged over views (flip), not calibrated")
    assert [line.split()[0] for line in lines] == ["0.jpg", "1.jpg", "drawn"]
    assert all(line.count("%") == 3 for line in lines[:2])
    assert (done.code, done.err.count("\n")) == (2, 2)
    assert "broken.png" in done.err
    assert "1 of 3" in done.err
    assert "\x1b" not in done.out + done.err
    with Image.open("seen.png") as image:
        assert image.width > 300
    assert "no pictures there" in refused("evaluate", trained, "--predict", "checkpoints")


def test_class_names_of_a_foreign_checkpoint_do_not_reach_the_terminal_raw(
    run, refused, trained, sample
):
    content = checkpoint.load(trained)
    names = [f"\x1b[2J\n{name}" for name in content["classes"]]
    checkpoint.save(trained, content | {"classes": names})
    Image.fromarray(sample["test_images"][0]).save("a.png")
    done = run("evaluate", trained, "--predict", "a.png")
    assert (done.code, done.out.count("\n")) == (0, 2)
    assert "\x1b" not in done.out
    error = refused("evaluate", trained, "--results-dir", "other")
    assert "knows other classes than CIFAR-10" in error


def test_predictions_are_a_row_for_each_test_image_with_probabilities(run, trained, sample):
    assert run("evaluate", trained, "--predictions", "p.csv").code == 0
    with open("p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["true"] == row["predicted"] for row in rows) / len(rows)
    assert right == pytest.approx(report()["top1_tta"])
    assert {row["views"] for row in rows} == {"flip"}
    classes = checkpoint.load(trained)["classes"]
    assert [row["true"] for row in rows] == [classes[label] for label in sample["test_labels"]]
    for row in rows:
        values = [float(row[name]) for name in classes]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert classes[values.index(max(values))] == row["predicted"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        *((b"", "it.pt"), (b"\x89PNG\r\n\x1a\n" + bytes(60), "it.pt"), (None, "it.pt")),
        ({"optimizer": {}, "step": 3}, "the state of an unfinished run: finish it with --resume"),
    ],
)
def test_what_is_no_finished_checkpoint_is_said(refused, trained, content, found):
    path = Path("it.pt")
    if isinstance(content, dict):
        checkpoint.save(path, content)
    else:
        path.write_bytes(trained.read_bytes()[:-5000] if content is None else content)
    error = refused("evaluate", path)
    assert found in error
    assert "weights_only" not in error  # torch's advice, not what was found


def test_the_checkpoint_that_comes_with_the_repository_knows_real_images(sample):
    path = ROOT / "checkpoints/custom_cnn-modern.pt"
    assert path.stat().st_size <= 8e6
    model, saved = checkpoint.load_checkpoint(path)
    assert saved["name"] == path.stem  # of its reference run, so that a user's first is no twin
    assert (ROOT / "results/reference" / path.stem / "test.json").exists()
    # `train_custom.py --weights` goes on from it.
    assert models.NETWORKS[recipes.custom({}).network].items() <= saved["surgery"].items()
    stats = data.ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    logits, _ = predict(model, data.inputs(torch.from_numpy(sample["test_images"]), stats, 32))
    assert metrics.top1(logits, torch.from_numpy(sample["test_labels"]).long()) > 0.9


@pytest.fixture
def sides(workplace):
    """A folder of pictures that are bright on the left, or on the right: mirror images."""
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = rng.integers(0, 120, (16, 16, 3), np.uint8)
        pixels[:, :8] += 120
        for name, picture in (("left", pixels), ("right", pixels[:, ::-1])):
            path = Path("sides", name, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture + np.uint8(number % 5)).save(path)
    return Path("sides")


def test_a_network_trained_without_mirror_images_is_never_asked_about_them(run, sides):
    settings = "--pictures", sides, "--flip", "none", "--epochs", "4", "--batch-size", "16"
    assert run("train_custom", "--recipe", "classic", *settings).code == 0
    before = report()
    assert before["tta"] == "shifts"
    assert before["top1"] == before["top1_tta"] == 1
    asked = run("evaluate", "checkpoints/custom_cnn.pt", "--predict", sides / "left")
    heading, *lines = asked.out.splitlines()
    assert "each picture as it is" in heading
    assert len(lines) == 60
    assert all(line.split()[1] == "left" for line in lines)
    # Who asks for mirror images gets them: half of each answer is then about the other side.
    assert run("evaluate", "checkpoints/custom_cnn.pt", "--tta", "flip").code == 0
    assert report()["top1_tta"] < 0.8
