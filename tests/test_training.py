import csv
import json
import signal

import numpy as np
import pytest
import torch
from conftest import start
from torch import nn
from torch.nn import functional as F

import checkpoint
import compute
import engine
import history
import metrics
import train_custom
from config import TrainConfig
from optimizers import make_optimizer, parameter_groups

SMALL = ["--recipe", "classic", "--batch-size", "32", "--precision", "fp32", "--device", "cpu"]


def tensors(path):
    return checkpoint.load(path)["state_dict"]


def rows(path):
    with open(path, newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in history.TIMINGS}
            for row in csv.DictReader(file)
        ]


def same_run(one, other):
    """Compares two runs' checkpoints and histories, bit for bit."""
    first, second = (
        checkpoint.load(folder / "checkpoints/custom_cnn.pt") for folder in (one, other)
    )
    assert first["metrics"] == second["metrics"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    assert rows(one / "results/custom_cnn/history.csv") == rows(
        other / "results/custom_cnn/history.csv"
    )


def test_classic_run_leaves_checkpoint_history_config_test_and_pictures(workplace, capsys):
    assert train_custom.main([*SMALL, "--epochs", "3", "--lr", "0.002"]) == 0
    run = workplace / "results/custom_cnn"
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "history.csv", "test.json"),
        *("curves.png", "confusion_matrix.png", "mistakes.png", "calibration.png"),
    }
    history = rows(run / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert float(history[2]["train_loss"]) < float(history[0]["train_loss"]) - 0.2
    report = json.loads((run / "test.json").read_text())
    saved = checkpoint.load(workplace / "checkpoints/custom_cnn.pt")
    assert report["n"] == 80
    assert report["top1"] == saved["metrics"]["test_top1"]
    assert not list((workplace / "checkpoints").glob("*.resume*"))
    sizes = json.loads((run / "config.json").read_text())["splits"]
    assert sizes["train"] + sizes["val"] == 320
    assert sizes["val"] == 12  # 4 % of each class, rounded
    output = capsys.readouterr().out
    assert "evaluate.py checkpoints/custom_cnn.pt" in output
    assert max(map(len, output.splitlines())) <= 100
    # A second run of the name keeps the first.
    before = tensors(workplace / "checkpoints/custom_cnn.pt")
    assert train_custom.main([*SMALL, "--epochs", "1", "--seed", "1"]) == 0
    assert (workplace / "checkpoints/custom_cnn-2.pt").exists()
    assert checkpoint.digest(before) == checkpoint.digest(
        tensors(workplace / "checkpoints/custom_cnn.pt")
    )
    assert "finished and kept" in capsys.readouterr().out


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("recipe", "device"),
    [("classic", "cpu"), ("speedrun", "cpu"), pytest.param("speedrun", "cuda", marks=NEEDS_GPU)],
)
def test_run_stopped_mid_epoch_by_a_signal_and_resumed_equals_the_uninterrupted_one(
    workplace, tmp_path, recipe, device
):
    arguments = [*SMALL, "--recipe", recipe, "--epochs", "2", "--device", device]
    whole = tmp_path / "whole"
    whole.mkdir()
    signal_itself = (
        "import data, os; draw, calls = data.TrainBatches._draw, []\n"
        "def counted(*a):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), {})\n"
        "    return draw(*a)\n"
        "data.TrainBatches._draw = counted"
    )
    uninterrupted = start("train_custom", *arguments, cwd=whole)
    _, error = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, error
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        resume = ["--resume"] if number == signal.SIGINT else []
        before = signal_itself.format(int(number))
        run = start("train_custom", *arguments, *resume, cwd=workplace, before=before)
        _, error = run.communicate(timeout=60)
        assert run.returncode == code, error
        assert "--resume" in error
        assert "error" not in error
    state = checkpoint.load(workplace / "checkpoints/custom_cnn.resume.pt")
    assert state["step"] > 0  # it stopped within an epoch
    last = start("train_custom", *arguments, "--resume", cwd=workplace)
    _, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    same_run(whole, workplace)


def test_state_of_other_settings_is_refused_by_name_and_a_finished_run_says_so(workplace, capsys):
    arguments = [*SMALL, "--epochs", "1"]
    assert train_custom.main(arguments) == 0
    assert train_custom.main([*arguments, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    path = workplace / "checkpoints/other.resume.pt"
    config = TrainConfig(**train_custom.RECIPES["classic"], recipe="classic").plain()
    checkpoint.save(path, dict.fromkeys(checkpoint.STATE) | {"config": config})
    named = ["--recipe", "classic", "--run-name", "other"]
    for extra, name in ((["--epochs", "9"], "epochs"), (["--lr", "0.1"], "lr")):
        assert train_custom.main([*named, *extra, "--resume"]) == 2
        assert f"--resume with {name}" in capsys.readouterr().err
    assert train_custom.main(named) == 2
    assert "is unfinished: continue with" in capsys.readouterr().err


def test_resume_finds_the_unfinished_one_of_a_series(workplace, capsys):
    arguments = [*SMALL, "--epochs", "1"]
    for _ in range(2):
        assert train_custom.main(arguments) == 0
    (workplace / "checkpoints/custom_cnn-3.resume.pt").write_bytes(b"damaged")
    assert train_custom.main([*arguments, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "custom_cnn-3.resume.pt" in error
    assert "--run-name" in error  # a way out


def test_without_validation_the_run_is_whole_and_the_temperature_left_out(workplace, monkeypatch):
    fitted = []
    monkeypatch.setattr(metrics, "fit_temperature", lambda *a: fitted.append(a) or 2.0)
    assert train_custom.main([*SMALL, "--epochs", "1", "--val-fraction", "0"]) == 0
    report = json.loads((workplace / "results/custom_cnn/test.json").read_text())
    assert report["temperature"] is report["ece_calibrated"] is None
    assert rows(workplace / "results/custom_cnn/history.csv")[0]["val_accuracy"] == ""
    assert not fitted
    assert train_custom.main([*SMALL, "--epochs", "1"]) == 0
    [(logits, labels)] = fitted
    assert len(logits) == len(labels) == 12  # the validation images


def test_without_a_compiler_training_goes_on(workplace, capsys, monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert train_custom.main([*SMALL, "--epochs", "1", "--compile"]) == 0
    assert "no torch.compile here (RuntimeError: no C++" in capsys.readouterr().out


def test_non_finite_loss_stops_before_the_step_with_exit_code_1(workplace, capsys, monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def spy(self, *arguments):
        before = [p.clone() for g in self.param_groups for p in g["params"]]
        step(self, *arguments)
        after = [p for g in self.param_groups for p in g["params"]]
        seen.append(all(map(torch.equal, before, after)))

    forward = engine.forward
    calls = iter(range(100))
    monkeypatch.setattr(
        engine, "forward", lambda *a: forward(*a) * (torch.inf if next(calls) == 4 else 1)
    )
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    # A state after each step: the last good one must survive.
    assert train_custom.main([*SMALL, "--epochs", "1", "--save-every", "0.0001"]) == 1
    error = capsys.readouterr().err
    assert "epoch 1, step 5, learning rate" in error
    assert seen == [False] * 4 + [True]
    state, _ = checkpoint.load_state(workplace / "checkpoints/custom_cnn.resume.pt")
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero():
    factors = [engine.lr_factor(step, 100, 0.2) for step in range(100)]
    assert factors[:20] == sorted(factors[:20])
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert 0 < factors[99] < 1e-3
    assert engine.lr_factor(0, 100, 0.0) == 1.0


def test_weight_decay_spares_biases_and_batchnorm_with_adamw_only():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for optimizer, decayed in (("adamw", 2), ("adam", 6)):
        config = TrainConfig(optimizer=optimizer, weight_decay=0.1)
        groups = parameter_groups(model, config)
        assert sum(len(g["params"]) for g in groups) == 6
        assert sum(len(g["params"]) for g in groups if g["weight_decay"]) == decayed


def test_muon_moves_convolutions_alike_in_all_directions_and_by_nothing_not_finite():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, bias=False)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.GELU(), *pooled)
    config = TrainConfig(optimizer="muon", lr=3e-3)
    optimizer = make_optimizer(parameter_groups(model, config), config, "fp32")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    x, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10

    def weights():
        return [p.detach().clone() for p in model.parameters()]

    before = weights()
    loss = F.cross_entropy(model(x), labels)
    gradient = torch.autograd.grad(loss, conv.weight)[0].flatten(1)
    _, bad = engine.train_step(model, optimizer, "fp32", 0.0, x, labels, config.lr)
    assert not bad
    assert not any(map(torch.equal, before, weights()))
    normed = before[0] / before[0].norm() * 8**0.5
    step = (normed - conv.weight.detach()).flatten(1) / config.muon_lr
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    moved = left.T @ step @ right.T  # in the directions of the gradient
    assert values[0] > 3 * values[-1]
    assert moved.diag().min() > 0.5
    assert moved.diag().max() < 1.3
    torch.testing.assert_close(moved, moved.diag().diag(), atol=1e-3, rtol=0)

    before = weights()
    x[0] = torch.nan
    _, bad = engine.train_step(model, optimizer, "fp32", 0.0, x, labels, config.lr)
    assert bad
    assert all(map(torch.equal, before, weights()))


def test_frozen_batchnorm_statistics_do_not_move():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    model[1].requires_grad_(False)
    before = [{k: v.clone() for k, v in model[i].state_dict().items()} for i in (1, 3)]
    compute.train_mode(model)
    model(torch.randn(8, 3, 8, 8))
    assert all(torch.equal(before[0][k], v) for k, v in model[1].state_dict().items())
    assert not torch.equal(before[1]["running_mean"], model[3].running_mean)


def test_prediction_covers_the_last_partial_batch_and_keeps_order(sample):
    images = torch.from_numpy(sample["test_images"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    statistics = [0.5] * 3, [0.25] * 3
    whole, _ = compute.predict(model, images, *statistics, batch_size=80)
    in_parts, _ = compute.predict(model, images, *statistics, batch_size=7)
    torch.testing.assert_close(in_parts, whole)
    mirrored, _ = compute.predict(model, images.flip(2), *statistics)
    plain, averaged = compute.predict(model, images, *statistics, tta="flip")
    torch.testing.assert_close(plain, whole)
    torch.testing.assert_close(averaged, (whole + mirrored) / 2)


def test_crops_are_the_image_and_two_moved_by_a_pixel_each_with_its_mirror_image():
    x = torch.randn(2, 3, 32, 32)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    moved = [padded[:, :, start : start + 32, start : start + 32] for start in (1, 0, 2)]
    expected = [view for each in moved for view in (each, each[..., ::-1])]
    np.testing.assert_array_equal(list(compute.views(x, "crops")), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--epochs", "-3"], ["--epochs -3"]),
        (["--epochs", "many"], ["many"]),
        (["--batch-size", "400"], ["--batch-size 400", "smaller"]),
        (["--limit", "0"], ["--limit 0"]),
        (["--recipe", "best-ever"], ["best-ever", "classic"]),
        (["--run-name", "../x"], ["../x", "--results-dir"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--results-dir", "data/cifar10.npz"], ["--results-dir data/cifar10.npz"]),
        (["--resume"], ["no saved state"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workplace, capsys, arguments, words):
    assert train_custom.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (workplace / "checkpoints/custom_cnn.pt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_exit_code_2_and_says_what_torch_saw(workplace, capsys):
    assert train_custom.main(["--device", "cuda"]) == 2
    assert f"torch {torch.__version__}" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "best"), [(0.80, "bf16"), (0.86, "fp32")])
def test_bf16_must_gain_a_fifth_and_measuring_it_leaves_no_trace(monkeypatch, seconds, best):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3072, 10))
    batch = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)

    def state():
        weights = checkpoint.digest(dict(model.state_dict()))
        return weights, torch.get_rng_state().tolist(), torch.get_num_threads()

    before = state()
    times = iter([time for step in [1.0] * 3 + [seconds] * 3 for time in (0.0, step)])
    monkeypatch.setattr(compute, "now", lambda device: next(times))
    cpu = torch.device("cpu")
    precision, reason = compute.choose_precision("auto", model, batch, cpu)
    assert precision == best
    assert "fp32 8" in reason
    assert state() == before
    assert compute.choose_precision("bf16", model, batch, cpu)[0] == "bf16"
