import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PIPED, ROOT, SMALL, outcome, rows
from PIL import Image
from torch import nn

import data
import engine
import evaluate
import metrics
import models
from reports import evaluation
from runs import loading
from sources.cifar10 import cifar10
from storage import checkpoint, history

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHECKPOINT, RESULTS = Path("checkpoints/custom_cnn.pt"), Path("results/custom_cnn")
STATE = CHECKPOINT.with_suffix(".resume.pt")


def test_run_leaves_checkpoint_numbers_and_pictures_and_a_second_one_keeps_them(
    run, drawing, monkeypatch
):
    done = run(*SMALL, "--epochs", "3", "--lr", "0.002")
    assert done.code == 0
    assert "evaluate.py checkpoints/custom_cnn.pt" in done.out
    *lines, command = done.out.splitlines()  # whose length is that of the folders' names
    assert command.startswith("next ")
    assert max(map(len, lines)) < 80
    assert {p.name for p in RESULTS.iterdir()} == {
        *("config.json", "history.csv", "test.json", "index.html", "curves.png", "batch.png"),
        *("confusion_matrix.png", "mistakes.png", "calibration.png", "first_layer.png"),
    }
    written = rows(RESULTS)
    assert [row["epoch"] for row in written] == ["1", "2", "3"]
    assert float(written[2]["train_loss"]) < float(written[0]["train_loss"]) - 0.2
    report = json.loads((RESULTS / "test.json").read_text())
    assert report["n"] == 80
    assert report["top1"] == checkpoint.load(CHECKPOINT)["metrics"]["test_top1"]
    assert not list(CHECKPOINT.parent.glob("*.resume*"))
    described = json.loads((RESULTS / "config.json").read_text())
    assert described["splits"] == {"train": 308, "val": 12, "test": 80}  # 4 % of each class
    assert described["changed"] == {"batch_size": 32, "epochs": 3, "lr": 0.002, "precision": "fp32"}
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert described["revision"] is None or commit in described["revision"]
    before = CHECKPOINT.read_bytes()
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    done = run(*SMALL, "--seed", "1")
    assert "finished and kept; this one is custom_cnn-2" in done.out
    assert "delete checkpoints/custom_cnn.pt" in done.out
    assert CHECKPOINT.with_name("custom_cnn-2.pt").exists()
    assert CHECKPOINT.read_bytes() == before


@pytest.mark.parametrize(
    ("recipe", "device"),
    [("classic", "cpu"), ("speedrun", "cpu"), pytest.param("speedrun", "cuda", marks=NEEDS_GPU)],
)
def test_run_stopped_again_and_again_within_epochs_equals_the_uninterrupted_one(
    run, signal_at, recipe, device
):
    # The second recipe whitens, takes Muon's steps and grows its images in the second epoch.
    size = "--limit", "64", "--batch-size", "16", "--epochs", "2", "--small-first", "0.75:16"
    command = (*SMALL, *size, "--recipe", recipe, "--device", device, "--run-name")
    assert run(*command, "whole").code == 0
    for name, code in (("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGINT", 130)):
        signal_at(2, getattr(signal, name))
        done = run(*command, "parts", *["--resume"] * (name != "SIGTERM"))
        assert done.code == code
        assert done.err.startswith("stopped, state saved; continue with\n")
        assert done.err.endswith("--run-name parts --resume\n")
        state, _ = checkpoint.load_state(STATE.with_name("parts.resume.pt"))
        assert state["step"] > 0  # it stopped within an epoch
    signal_at(0, 0)
    assert run(*command, "parts", "--resume").code == 0
    assert outcome(".", "parts") == outcome(".", "whole")


def test_a_signal_that_is_ignored_stays_ignored(run, signal_at):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        signal_at(3, signal.SIGHUP)
        assert run(*SMALL).code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_unfinished_run_names_its_own_command_and_all_flags_that_differ(run, refused, signal_at):
    signal_at(3, signal.SIGTERM)
    go_on = run(*SMALL).err.splitlines()[-1].strip()
    assert go_on.endswith(f"train_custom.py {' '.join(SMALL[1:])} --resume")
    other = "train_custom", "--recipe", "speedrun", "--batch-size", "16", "--lr", "0.1"
    assert f"continue with `{go_on}`" in refused(*other)  # not this command, which could not go on
    error = refused(*other, "--device", "cpu", "--resume")
    for words in ("--recipe speedrun (was classic)", "--batch-size 16 (was 32)", "--lr 0.1 (was"):
        assert words in error
    # Where files lie and how often they are written changes no result.
    assert run(*SMALL, "--resume", "--save-every", "9").code == 0
    assert "run custom_cnn is finished" in run(*SMALL, "--resume").out
    assert "--lr 0.1 (was 0.001)" in refused(*SMALL, "--resume", "--lr", "0.1")


def test_a_run_of_an_older_version_goes_on_as_it_was_begun_or_not_at_all(run, refused, signal_at):
    signal_at(3, signal.SIGTERM)
    assert run(*SMALL).code == 143
    state = checkpoint.load(STATE)
    settings = state["config"]
    for without, more, flags, words in (
        (["balance"], {}, ["--balance"], "--balance (was --no-balance)"),
        (["weights"], {}, ["--weights", "none"], "--weights none (was no --weights)"),
        (["flip"], {}, [], "--flip random (was no --flip)"),  # what was done nothing says
        ([], {"enlarge": 0.5}, [], "no --enlarge (was 0.5)"),
    ):
        kept = {key: value for key, value in settings.items() if key not in without}
        checkpoint.save(STATE, state | {"config": kept | more})
        assert words in refused(*SMALL, "--resume", *flags)
    newer = ("fit", "balance", "cutout")  # which are at what was done before, or off
    kept = {key: value for key, value in settings.items() if key not in newer}
    checkpoint.save(STATE, state | {"config": kept | {"enlarge": 0.0}})
    assert run(*SMALL, "--resume").code == 0


def test_a_folder_of_a_persons_own_files_is_no_folder_of_a_run(run, refused):
    RESULTS.mkdir(parents=True)
    (RESULTS / "notes.txt").write_text("mine")
    (RESULTS / ".notes.tmp").write_text("mine")
    assert run(*SMALL).code == 0  # what a run never writes may lie there
    assert (RESULTS / ".notes.tmp").read_text() == (RESULTS / "notes.txt").read_text() == "mine"
    for name in ("config.json", "curves.png", "index.html"):
        place = Path("own", name, "custom_cnn")
        place.mkdir(parents=True)
        (place / name).write_text('{"mine": 1}')
        for command in ((*SMALL, "--run-name", "custom_cnn"), ("evaluate", CHECKPOINT)):
            words = (
                f"custom_cnn/{name}: is of no run, and a run would replace it; give another --res"
            )
            folders = ("--results-dir", place.parent, "--checkpoint-dir", "new")
            assert words in refused(*command, *folders)
        assert [path.name for path in place.iterdir()] == [name]
        assert (place / name).read_text() == '{"mine": 1}'


def test_resume_begins_what_has_not_begun_and_finds_the_unfinished_one_of_a_series(
    run, refused, signal_at
):
    assert "no saved state: it begins" in run(*SMALL, "--resume").out
    signal_at(3, signal.SIGTERM)
    assert run(*SMALL).code == 143
    assert STATE.with_name("custom_cnn-2.resume.pt").exists()
    assert run(*SMALL, "--resume").code == 0
    assert CHECKPOINT.with_name("custom_cnn-2.pt").exists()
    STATE.with_name("custom_cnn-3.resume.pt").write_bytes(b"damaged")
    error = refused(*SMALL, "--resume")
    assert "custom_cnn-3.resume.pt" in error
    assert "--run-name" in error  # a way out


def test_resume_on_another_kind_of_device_and_other_hardware_warns(run, signal_at):
    signal_at(3, signal.SIGTERM)
    assert run(*SMALL).code == 143
    state = checkpoint.load(STATE)
    # As a GPU would have left it: its graphs need an Adam that is `capturable`.
    state["identity"] |= {"device": "cuda", "hardware": "an abacus"}
    state["device_rng"] = [torch.zeros(16, dtype=torch.uint8)]
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    checkpoint.save(STATE, state)
    done = run(*SMALL, "--resume", "--device", "cpu")
    assert done.code == 0
    assert done.err.count("\n") == 2
    assert "warning: the run was started with device cuda, not cpu; the last bits" in done.err
    assert "warning: the run was started with hardware an abacus, not" in done.err


def test_the_printed_commands_run_from_where_the_user_stands(tmp_path, monkeypatch):
    # Without the sample: the scripts themselves, on pictures, in a notebook's environment.
    monkeypatch.chdir(tmp_path)
    for name, value in (("black cats", 30), ("white cats", 220)):
        folder = tmp_path / "my photos" / name
        folder.mkdir(parents=True)
        for index in range(12):
            pixels = np.full((16, 16, 3), value + index, np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    notebook = {"PATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    shell = PIPED | {"env": PIPED["env"] | notebook, "shell": True}
    options = "--epochs", "20", "--batch-size", "8", "--save-every", "0.001", "--run-name", "cats"
    script = str(ROOT / "train_custom.py"), "--recipe", "classic", "--pictures", "my photos"
    training = subprocess.Popen([sys.executable, *script, *options], **shell | {"shell": False})
    while not STATE.with_name("cats.resume.pt").exists() and training.poll() is None:
        time.sleep(0.02)
    training.send_signal(signal.SIGTERM)
    _, error = training.communicate(timeout=60)
    assert training.returncode == 143, error
    again = subprocess.run(error.splitlines()[-1], **shell, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "warning" not in again.stdout  # whatever the environment, its pictures are drawn
    saved = checkpoint.load(CHECKPOINT.with_name("cats.pt"))
    assert saved["classes"] == ["black cats", "white cats"]
    assert saved["metrics"]["epoch"] == 20
    following = again.stdout.splitlines()[-1].removeprefix("next").strip()
    following = following.replace("photo.jpg", "'my photos'/*/0.png")
    classified = subprocess.run(following, **shell, timeout=60)
    assert classified.returncode == 0, classified.stderr
    assert "white cats" in classified.stdout
    report = Path("results/cats/test.json")
    before = json.loads(report.read_text())
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    assert evaluate.main(["checkpoints/cats.pt"]) == 0  # on the same pictures
    after = json.loads(report.read_text())
    assert (after["n"], after["per_class"]) == (before["n"], before["per_class"])


def test_without_validation_the_run_is_whole_and_the_temperature_left_out(run, monkeypatch):
    fitted = []
    monkeypatch.setattr(metrics, "fit_temperature", lambda *a: fitted.append(a) or 2.0)
    assert run(*SMALL, "--val-fraction", "0").code == 0
    report = json.loads((RESULTS / "test.json").read_text())
    assert report["temperature"] is report["ece_calibrated"] is None
    assert rows(RESULTS)[0]["val_accuracy"] == ""
    assert not fitted
    assert run(*SMALL).code == 0
    [(logits, labels)] = fitted
    assert len(logits) == len(labels) == 12  # the validation images


class Compiled(nn.Module):
    """What torch.compile returns, without the wait."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod, self.calls = model, []

    def forward(self, x):
        self.calls.append(len(x))
        return self._orig_mod(x)


def test_a_compiled_network_learns_and_is_saved_as_any_other(run, monkeypatch):
    wrapped = []

    def fake(function, **options):
        if isinstance(function, nn.Module):
            wrapped.append(function := Compiled(function))
        return function

    monkeypatch.setattr(torch, "compile", fake)
    assert run(*SMALL, "--run-name", "plain").code == 0
    assert not wrapped
    assert run(*SMALL, "--run-name", "compiled", "--compile").code == 0
    assert len(wrapped[0].calls) == 2 * 10  # steps, and BatchNorm measured on their batches
    assert outcome(".", "compiled") == outcome(".", "plain")

    def no_compiler(*arguments, **options):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    done = run(*SMALL, "--run-name", "without", "--compile")
    assert "no torch.compile here (RuntimeError: no C++" in done.out
    assert outcome(".", "without") == outcome(".", "plain")


@pytest.mark.parametrize(
    ("often", "kept"), [("9", "no state was saved"), ("0.0001", "the last saved state is good")]
)
def test_what_is_not_finite_ends_the_run_and_leaves_no_bad_state(run, monkeypatch, often, kept):
    forward, calls = engine.forward, iter(range(100))

    def broken(*arguments):
        return forward(*arguments) * (torch.inf if next(calls) == 4 else 1)

    monkeypatch.setattr(engine, "forward", broken)
    done = run(*SMALL, "--save-every", often)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "loss or gradient not finite in epoch 1, step 5, learning rate" in done.err
    assert kept in done.err
    state, _ = checkpoint.load_state(STATE)
    if "no state" in kept:
        assert state is None
    else:
        assert state["step"] == 4
        assert all(value.isfinite().all() for value in state["model"].values())


def test_a_huge_learning_rate_and_a_validation_loss_that_is_not_finite_are_told(run, monkeypatch):
    done = run(*SMALL, "--optimizer", "sgd", "--lr", "9999", "--epochs", "9")
    assert done.code == 1
    assert ("no state was saved" in done.err) != STATE.exists()
    assert ("the last saved state is good" in done.err) == STATE.exists()
    monkeypatch.setattr(engine, "evaluate", lambda *_: (float("nan"), 0.1))
    done = run(*SMALL, "--run-name", "other")
    assert done.code == 1
    assert "validation loss not finite after epoch 1; no state was saved" in done.err


@pytest.mark.parametrize(
    ("module", "function"),
    [(engine, "evaluate"), (engine, "train_step"), (models, "create_model"), (history, "line")],
)
def test_a_mistake_in_the_code_shows_its_traceback(run, monkeypatch, capsys, module, function):
    def mistaken(*arguments, **options):
        raise ValueError("a contributor's mistake")

    monkeypatch.setattr(module, function, mistaken)
    with pytest.raises(ValueError, match="a contributor's mistake"):
        run(*SMALL)
    assert "not finite" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken",
    ["display.figures.mistakes", "display.figures.batch", "reports.evaluation.first_layer"],
)
def test_a_picture_that_cannot_be_drawn_costs_a_warning_alone(run, drawing, monkeypatch, broken):
    def fail(*arguments):
        raise ImportError("no such backend")

    for name in ("curves", "confusion_matrix", "calibration", "mistakes", "batch", "first_layer"):
        monkeypatch.setattr(f"display.figures.{name}", lambda *_: None)
    monkeypatch.setattr(broken, fail)
    monkeypatch.setattr("display.pages.write_index", fail)
    done = run(*SMALL, "--limit", "64")
    assert done.code == 0
    assert done.out.count("warning: ") == done.out.count(": ImportError: no such backend") == 2
    assert CHECKPOINT.exists()
    assert json.loads((RESULTS / "test.json").read_text())["n"] == 64
    assert "evaluate.py" in done.out.splitlines()[-1]


def images_of(split, **settings):
    """The bytes of the images that train, or validate, under such settings."""
    splits = data.make_splits(cifar10(Path("data")), device=torch.device("cpu"), **settings)
    return {image.numpy().tobytes() for image in getattr(splits, split).images}


def test_no_chain_of_weights_validates_on_images_that_trained_it(run, refused):
    first = {"seed": 0, "val_fraction": 0.2, "limit": None}
    assert run(*SMALL, "--val-fraction", "0.2", "--run-name", "first").code == 0
    # The same seed keeps fewer images aside of the same ones; this one learns from a few alone.
    from_first = (*SMALL, "--weights", "checkpoints/first.pt")
    few = ("--val-fraction", "0.1", "--limit", "40", "--run-name", "few")
    assert run(*from_first, *few).code == 0
    for name, last in (("first", 0.2), ("few", 0.1)):
        begin = (*SMALL, "--weights", f"checkpoints/{name}.pt")
        for seed, share in ((1, 0.1), (0, 0.3)):
            own = {"seed": seed, "val_fraction": share, "limit": None}
            kept = images_of("val", **own)
            num_seen = len(kept & images_of("train", **first))
            words = (
                f"checkpoints/{name}.pt: {num_seen} of the {len(kept)} validation images trained "
                f"it; give --seed 0 --val-fraction {last}, as its training had them, or "
                "--val-fraction 0"
            )
            assert 0 < num_seen < len(kept)
            assert words in refused(*begin, "--seed", str(seed), "--val-fraction", str(share))
    for number, remedy in enumerate((("0", "0.1"), ("1", "0"))):
        flags = ("--seed", remedy[0], "--val-fraction", remedy[1], "--run-name", f"good{number}")
        assert run(*begin, *flags).code == 0

    content = checkpoint.load(Path("checkpoints/few.pt"))
    del content["data"][loading.CIFAR10_BEFORE]
    checkpoint.save(Path("checkpoints/old.pt"), content)
    old = (*SMALL, "--weights", "checkpoints/old.pt")
    assert "does not say which images trained what it began from" in refused(*old)
