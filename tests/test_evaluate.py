import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint
import compute
import evaluate
import metrics
import train_custom


@pytest.fixture
def trained(workplace):
    arguments = [
        "--recipe",
        "classic",
        "--batch-size",
        "64",
        "--epochs",
        "1",
        "--precision",
        "fp32",
    ]
    assert train_custom.main(arguments) == 0
    return workplace / "checkpoints/custom_cnn.pt"


def test_evaluation_repeats_the_numbers_of_the_training_on_all_test_images(trained, capsys):
    path = trained.parent.parent / "results/custom_cnn/test.json"
    before = json.loads(path.read_text())
    assert evaluate.main([str(trained), "--tta", "crops", "--batch-size", "7"]) == 0
    after = json.loads(path.read_text())
    for key in ("n", "top1", "top1_tta", "per_class", "checkpoint_sha256"):
        assert after[key] == before[key], key
    assert after["loss"] == pytest.approx(before["loss"])
    output = capsys.readouterr().out
    assert f"{100 * after['top1']:.2f} % of 80 test images" in output
    assert "airplane" in output


def test_every_finished_checkpoint_is_compared_and_the_table_is_written(trained, capsys):
    (trained.parent / "other.resume.pt").write_bytes(b"unfinished")
    capsys.readouterr()
    assert evaluate.main([]) == 0
    output = capsys.readouterr().out
    assert "custom_cnn" in output
    assert "other" not in output
    assert max(map(len, output.splitlines())) <= 80
    table = (trained.parent.parent / "results/README.md").read_text()
    assert "custom_cnn" in table


def test_own_pictures_are_classified_and_an_unreadable_one_is_named(
    trained, tmp_path, sample, capsys
):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        Image.fromarray(sample["test_images"][index]).resize((90, 60)).save(folder / f"{index}.jpg")
    (folder / "broken.png").write_text("no picture")
    capsys.readouterr()
    assert evaluate.main([str(trained), "--predict", str(folder)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["0.jpg", "1.jpg"]
    assert all(line.count("%") == 3 for line in lines)
    assert "broken.png" in printed.err
    assert "1 of 3" in printed.err


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(60), None])
def test_what_is_no_checkpoint_is_one_line_and_exit_code_2(trained, tmp_path, capsys, content):
    path = tmp_path / "it.pt"
    path.write_bytes(trained.read_bytes()[:-5000] if content is None else content)
    assert evaluate.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "it.pt" in error


def test_without_any_checkpoint_the_next_step_is_named(workplace, capsys):
    assert evaluate.main([]) == 2
    assert "train_custom.py" in capsys.readouterr().err


def test_the_checkpoint_that_comes_with_the_repository_knows_real_images(sample):
    path = Path(__file__).parent.parent / "checkpoints/custom_cnn.pt"
    assert path.stat().st_size <= 8e6
    model, saved = checkpoint.load_model(path)
    images, labels = (torch.from_numpy(sample[key]) for key in ("test_images", "test_labels"))
    logits, _ = compute.predict(model, images, saved["mean"], saved["std"])
    assert metrics.top1(logits, labels.long()) > 0.9
