import csv
import json
import shutil
import signal
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
from reports import predictions
from reports.heat_map import heat_maps
from storage import checkpoint
from storage.files import sha256, write_json

REPORT = Path("results/custom_cnn/test.json")


def report(path=REPORT):
    return json.loads(Path(path).read_text())


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
    low, high = after["top1_interval"]
    assert low < after["top1"] < high
    assert f"95 % interval   {100 * low:.2f} to {100 * high:.2f} %" in done.out
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
    Path("photos/notes.txt").touch()
    done = run(
        "evaluate", trained, "--predict", "photos", "--figure", "seen.png", "--predictions", "p.csv"
    )
    left_out, heading, *lines = done.out.splitlines()
    assert left_out == "left out: 1 without an ending of a picture (like photos/notes.txt)"
    assert heading.startswith("probabilities: averaged over views (flip), not calibrated")
    assert [line.split()[0] for line in lines] == ["0.jpg", "1.jpg", "drawn", "listed"]
    assert [row["file"] for row in table("p.csv")] == ["photos/0.jpg", "photos/1.jpg"]
    assert all(line.count("%") == 3 for line in lines[:2])
    assert (done.code, done.err.count("\n")) == (2, 2)
    assert "broken.png" in done.err
    assert "1 of 3" in done.err
    assert "\x1b" not in done.out + done.err
    with Image.open("seen.png") as image:
        assert image.width > 300
    assert "no pictures there" in refused("evaluate", trained, "--predict", "checkpoints")


def test_what_a_flag_names_is_replaced_only_where_the_same_flag_wrote_it(
    run, refused, trained, sample
):
    Path("photos").mkdir()
    for index in range(3):
        Image.fromarray(sample["test_images"][index]).save(f"photos/{index}.png")
    Path("labels.csv").write_text("file,label\nphotos/0.png,cat\n")
    shutil.copy("photos/0.png", "elsewhere.png")
    Path("link.csv").symlink_to("labels.csv")
    Path("folder.csv").mkdir()
    Path("other.onnx").write_bytes(b"a network of another program")
    Path("other.pt2").write_bytes(trained.read_bytes())
    before = {file: file.read_bytes() for file in Path().rglob("*.*") if file.is_file()}
    ask = ("evaluate", trained, "--predict", "photos")
    for option, name, words in (
        ("--figure", "seen.jpg", "the ending must be .png"),
        ("--figure", trained, "the ending must be .png"),
        ("--figure", "photos/0.png", "--figure has not written it, or an older version has; give"),
        ("--figure", "elsewhere.png", "--figure has not written it"),
        ("--predictions", trained, "the ending must be .csv"),
        ("--predictions", "labels.csv", "--predictions has not written it"),
        ("--predictions", "link.csv", "--predictions has not written it"),
        ("--predictions", "results/custom_cnn/history.csv", "--predictions has not written it"),
        ("--predictions", "folder.csv", "is a folder"),
        ("--export", "other.onnx", "--export has not written it"),
        ("--export", "other.pt2", "--export has not written it"),
    ):
        command = ask[:2] if option == "--export" else ask
        assert words in refused(*command, option, name), name
    assert {file: file.read_bytes() for file in before} == before

    again = (*ask, "--figure", "photos/seen.png", "--predictions", "photos/list.csv")
    for _ in range(2):  # what it wrote is no picture of the folder, and may be replaced
        done = run(*again)
        assert (done.code, done.err) == (0, "")
        assert "listed in photos/list.csv: 3 of 3" in done.out
    assert run("evaluate", trained, "--predictions", "photos/list.csv").code == 0
    words = "is one of the pictures of --predict"
    seen = "photos/seen.png"
    assert words in refused("evaluate", trained, "--predict", seen, "--figure", seen)


def test_many_pictures_are_classified_at_once_and_listed_in_order(
    run, trained, sample, monkeypatch
):
    monkeypatch.setattr(predictions, "AT_ONCE", 32)  # so that 80 take three rounds
    Path("photos").mkdir()
    for index, image in enumerate(sample["test_images"]):
        Image.fromarray(image).save(f"photos/{index:02}.png")
    Path("photos/note.txt").write_text("no picture")
    # Quoted, as where no shell expands it.
    asked = run("evaluate", trained, "--predict", "photos/*.png", "--predictions", "asked.csv")
    assert asked.code == 0
    assert run("evaluate", trained, "--predictions", "tested.csv").code == 0
    rows = table("asked.csv")
    assert list(rows[0])[:4] == ["file", "predicted", "views", "calibrated"]
    assert [row.pop("file") for row in rows] == [f"photos/{index:02}.png" for index in range(80)]
    tested = table("tested.csv")
    for row in tested:  # the same pictures
        del row["index"], row["true"]
    assert rows == tested


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
    before = report()
    assert run("evaluate", trained, "--predictions", "p.csv").code == 0
    # The views of the list are not those of the report: its accuracy over six views stays.
    assert [report()[key] for key in ("tta", "top1_tta")] == ["crops", before["top1_tta"]]
    rows = table("p.csv")
    right = sum(row["true"] == row["predicted"] for row in rows) / len(rows)
    assert run("evaluate", trained, "--tta", "flip").code == 0
    assert right == pytest.approx(report()["top1_tta"])
    assert {row["views"] for row in rows} == {"flip"}
    classes = checkpoint.load(trained)["classes"]
    assert [row["true"] for row in rows] == [classes[label] for label in sample["test_labels"]]
    for row in rows:
        values = [float(row[name]) for name in classes]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert classes[values.index(max(values))] == row["predicted"]


def test_no_class_is_called_like_another_column_of_the_predictions(run, trained, sample):
    for kind, names in (("plain", ["yes", "no"]), ("clash", ["true", "false"])):
        content = checkpoint.load(trained)
        content["classes"][:2] = names
        checkpoint.save(trained, content)
        Image.fromarray(sample["test_images"][0]).save("a.png")
        words = ("evaluate", trained, "--predict", "a.png", "--predictions", f"{kind}.csv")
        assert run(*words).code == 0
    (plain,), (clash,) = table("plain.csv"), table("clash.csv")
    fixed = ["file", "predicted", "views", "calibrated"]
    assert list(plain)[:6] == [*fixed, "yes", "no"]
    assert list(clash)[:7] == [*fixed, "p(true)", "p(false)", "p(bird)"]
    assert list(clash.values())[4:] == list(plain.values())[4:]


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
    done = run("evaluate", "checkpoints/custom_cnn.pt", "--tta", "flip")
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert "--tta flip averages over mirror images too, and none trained this network" in done.err
    assert report()["top1_tta"] < 0.8


@pytest.fixture
def of_sides(run, sides):
    """The checkpoint of a run that has learned from `sides`."""
    settings = "--pictures", sides, "--epochs", "1", "--batch-size", "16", "--flip", "none"
    assert run("train_custom", "--recipe", "classic", *settings).code == 0
    return Path("checkpoints/custom_cnn.pt")


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_another_labelled_folder_is_evaluated_beside_the_runs_own_test(
    run, refused, of_sides, sides
):
    own = REPORT.read_bytes()
    for number in range(6):
        picture(Path(f"new/left/{number}.png"), number)
    shutil.copy("new/left/0.png", "new/left/copy.png")
    for number in range(2):
        picture(Path(f"new/{number}.png"), 70 + number)
    known = checkpoint.load(of_sides)["pictures"]
    by_hash = {sha256(file)[:16]: file for file in sides.rglob("*.png")}
    trained = [by_hash[digest] for digest in known["train"]][:3]
    for number, file in enumerate([*trained, by_hash[next(iter(known["val"]))]]):
        shutil.copy(file, f"new/left/known{number}.png")
    for name in ("0", "known0"):  # other bytes, the same pixels
        Image.open(f"new/left/{name}.png").save(f"new/left/{name}.bmp")

    done = run("evaluate", of_sides, "--pictures", "new", "--predictions", "p.csv")
    assert done.code == 0
    assert "on 6 labelled pictures in new, none of them of its training" in done.out
    assert "left out: 4 trained the network, 1 validated it, 2 copies" in done.err
    assert "new: left out: 2 pictures outside the folders of classes" in done.err
    assert (report("results/custom_cnn/test-new.json")["n"], REPORT.read_bytes()) == (6, own)
    assert "labelled pictures in new" in Path("results/custom_cnn/test-new/index.html").read_text()
    files = sorted(Path(row["file"]).stem for row in table("p.csv"))
    assert files == [str(number) for number in range(6)]
    assert {row["true"] for row in table("p.csv")} == {"left"}
    for number in range(2):  # another folder of this name keeps that report
        picture(Path(f"other/new/left/{number}.png"), 50 + number)
    for _ in range(2):
        assert run("evaluate", of_sides, "--pictures", "other/new").code == 0
    assert report("results/custom_cnn/test-new.json")["n"] == 6
    assert report("results/custom_cnn/test-new-2.json")["n"] == 2
    assert not Path("results/custom_cnn/test-new-3.json").exists()

    # Beside a test picture of the training the others do not count, which is said.
    mixed = by_hash[next(iter(known["test"]))]
    shutil.copytree("other/new", "mixed")
    for number, file in enumerate([mixed, trained[0]]):
        shutil.copy(file, f"mixed/left/{number + 7}.png")
    done = run("evaluate", of_sides, "--pictures", "mixed")
    assert (
        "mixed: not counted: 2 labelled pictures that the training did not use, for 1 of"
        in done.err
    )
    assert report("results/custom_cnn/test-mixed.json")["n"] == 1

    picture(Path("new/up/0.png"), 9)
    error = refused("evaluate", of_sides, "--pictures", "new")
    assert "does not know the class up; it knows left, right" in error
    assert "nor folders of its classes" in refused("evaluate", of_sides, "--pictures", "data")


def test_a_part_of_the_test_pictures_is_evaluated_beside_the_whole(run, of_sides, sides):
    assert run("evaluate", of_sides, "--predictions", "all.csv").code == 0
    rows = table("all.csv")
    assert {row["file"].split("/")[0] for row in rows} == {"left", "right"}
    assert all(row["file"].startswith(row["true"]) for row in rows)
    shutil.move(sides, "moved")
    Path("moved", rows[0]["file"]).unlink()
    own = REPORT.read_bytes()
    done = run("evaluate", of_sides, "--pictures", "moved", "--predictions", "part.csv")
    assert f"on {len(rows) - 1} of the {len(rows)} test images" in done.out
    assert report("results/custom_cnn/test-moved.json")["n"] == len(rows) - 1
    assert REPORT.read_bytes() == own
    assert table("part.csv") == rows[1:]


def test_an_unfinished_run_is_evaluated_when_named_and_says_so(run, refused, signal_at):
    signal_at(4, signal.SIGTERM)
    assert run(*SMALL).code == 128 + signal.SIGTERM
    state = Path("checkpoints/custom_cnn.resume.pt")
    before = state.read_bytes()
    done = run("evaluate", state)
    assert done.code == 0
    assert "an unfinished run, after 0 of 1 epochs and 3 steps" in done.out
    written = report("results/custom_cnn/test-unfinished.json")
    assert (written["n"], written["note"]) == (
        80,
        "an unfinished run, after 0 of 1 epochs and 3 steps",
    )
    page = Path("results/custom_cnn/test-unfinished/index.html").read_text()
    assert "an unfinished run, after 0 of 1 epochs" in page
    assert not REPORT.exists()
    export = run("evaluate", state, "--export", "part.pt2")
    assert "not calibrated (an unfinished run, after 0 of 1 epochs and 3 steps)" in export.out
    assert state.read_bytes() == before
    assert "no finished checkpoint" in refused("evaluate")
    network, saved = checkpoint.load_unfinished(state)
    weights = checkpoint.load(state)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert saved["classes"][0] == "airplane"
    checkpoint.save(state, checkpoint.load(state) | {"model": {}})  # as where all are frozen
    assert "lacks the layers that do not train" in refused("evaluate", state)


@pytest.mark.parametrize(
    "arch", ["custom_cnn", "vgg19", "resnet18", "resnet50", "mobilenet_v3_small"]
)
def test_a_heat_map_is_bright_where_the_maps_speak_for_the_class(arch):
    torch.manual_seed(0)
    arguments = {"widths": (4, 4, 8, 8, 8, 8)} if arch == "custom_cnn" else {"image_size": 64}
    model = models.create_model(arch, arguments, 3).eval()
    pooling = model.pool if arch == "custom_cnn" else model.network.avgpool
    # In the maps one place alone, the upper left, is not 0.
    pooling.register_forward_pre_hook(lambda _, inputs: (first_place(inputs[0]),))
    x = torch.randn(2, 3, 64, 64)
    classes = model(x).argmax(1)
    heat = heat_maps(model, x, classes)
    assert heat.shape == (2, 64, 64)
    assert heat.amax((1, 2)).tolist() == [1, 1]
    assert (heat[:, :4, :4] > 0.9).all()
    assert (heat[:, 48:, 48:] == 0).all()


def first_place(maps):
    kept = torch.zeros_like(maps)
    kept[:, :, 0, 0] = 1
    return maps * 0 + kept
