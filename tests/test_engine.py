import platform
import random
import shutil
import statistics
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, digest
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import engine
import models
import train_custom
from config import recipes
from optimizers import make_optimizer, parameter_groups
from runs import loading
from runtime import amx, device, processes

CPU = torch.device("cpu")
LEARNING = {"epochs": 2, "lr": 3e-3, "warmup": 0.2, "label_smoothing": 0.1}

ALONE = """
import sys; sys.path.insert(0, "."); import engine, torch
torch.manual_seed(0)
x = torch.randn(64, 3, 8, 8); labels = (x.mean((1, 2, 3)) > 0).long()
class Batches:
    num_images, num_steps = 64, 4
    def epoch(self, epoch, first_step=0):
        yield from list(zip(x.split(16), labels.split(16)))[first_step:]
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
optimizer = torch.optim.SGD(groups, lr=0.1, fused=True)
before, _ = engine.evaluate(model, x.split(10), labels)
yielded = [at.step for at in engine.train(model, optimizer, Batches(), epochs=5, lr=0.1)]
loss, accuracy = engine.evaluate(model, x.split(10), labels)
assert yielded == [1, 2, 3, 4, 0] * 5
assert loss < before / 2 and accuracy > 0.9
"""


def test_engine_alone_trains_a_small_network(tmp_path):
    shutil.copy(ROOT / "engine.py", tmp_path)
    words = [sys.executable, "-I", "-W", "error", "-c", ALONE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def beginning(kind="adamw"):
    """A network with everything in it that a step could change, and its optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    return model, optimizer_of(model, model[-1], kind)


PLAIN = {
    "plain adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "fused sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
}


def optimizer_of(model, classifier, kind):
    if kind in PLAIN:
        return PLAIN[kind](model.parameters(), lr=3e-3)
    groups = parameter_groups(
        model, optimizer=kind, classifier=classifier, weight_decay=0.1, muon_lr_scale=50
    )
    return make_optimizer(groups, kind, 3e-3, "fp32")


def whole_state(model, optimizer):
    return digest([dict(model.state_dict()), optimizer.state_dict()])


@pytest.fixture
def loader(sample):
    return batches(sample)


def batches(sample, **options):
    images = torch.from_numpy(sample["train_images"][:96])
    split = data.Split(images, torch.from_numpy(sample["train_labels"][:96]).long())
    stats, changes = data.channel_stats(sample["train_images"]), data.Augmentation("random", 2, 4)
    return data.TrainBatches(split, stats, 32, augmentation=changes, num_epochs=2, **options)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_or_a_line_to_zero():
    factors = [engine.lr_factor(step, 100, 0.2) for step in range(100)]
    np.testing.assert_allclose(np.diff(factors[:21]), 1 / 21)
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert 0 < factors[99] < 1e-3
    assert engine.lr_factor(0, 100, 0.0) == 1.0
    line = [engine.lr_factor(step, 100, 0.2, "linear") for step in range(20, 100)]
    np.testing.assert_allclose(line, 1 - np.arange(80) / 80)
    assert [engine.lr_factor(step, 100, 0.2, "constant") for step in (20, 60, 99)] == [1, 1, 1]


def test_training_yields_each_step_and_each_end_of_an_epoch_with_sums_of_the_epoch(loader):
    model, optimizer = beginning()
    begun = [p.clone() for p in model.parameters()]
    seen = [
        (at.epoch, at.step, at.sums[2].item(), at.lr, at.bad_step.item())
        for at in engine.train(model, optimizer, loader, **LEARNING)
    ]
    rates = [3e-3 * engine.lr_factor(step, 6, 0.2) for step in range(6)]
    assert seen == [
        *((0, step, 32 * step, rates[step - 1], -1) for step in (1, 2, 3)),
        (1, 0, 96, rates[2], -1),
        *((1, step, 32 * step, rates[step + 2], -1) for step in (1, 2, 3)),
        (2, 0, 96, rates[5], -1),
    ]
    assert not any(map(torch.equal, begun, model.parameters()))


@pytest.mark.parametrize("resizing", [(), ((0.3, 16), (0.7, 24))])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon", "rmsprop"])
def test_training_entered_within_an_epoch_gives_the_same_bits(sample, kind, resizing):
    loader = batches(sample, resizing=resizing)
    whole = beginning(kind)
    half = beginning(kind)
    rest = beginning(kind)
    *_, end = engine.train(*whole, loader, **LEARNING)
    for at in engine.train(*half, loader, **LEARNING):
        if (at.epoch, at.step) == (1, 1):
            break
    for begun, stopped in zip(rest, half, strict=True):
        begun.load_state_dict(stopped.state_dict())
    at = engine.Progress(at.epoch, at.step, sums=at.sums.clone())
    *_, at = engine.train(*rest, loader, progress=at, **LEARNING)
    assert whole_state(*rest) == whole_state(*whole)
    assert torch.equal(at.sums, end.sums)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "muon", *PLAIN])
@pytest.mark.parametrize("fault", ["inputs", "one gradient"])
@pytest.mark.parametrize("good_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing_at_all(kind, fault, good_before):
    def step(x, labels):
        return engine.train_step(model, optimizer, x, labels, 1e-2)[1].item()

    torch.manual_seed(1)
    steps = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 10) for _ in range(good_before + 1)]
    results = set()
    for disturbed in (False, True):
        model, optimizer = beginning(kind)
        model.train()
        assert not any(step(*batch) for batch in steps[:good_before])
        if disturbed:
            before, x = whole_state(model, optimizer), torch.full((16, 3, 8, 8), 2.0)
            if fault == "inputs":
                x[3] = torch.nan
            else:  # the loss is finite, and so are most gradients
                hook = model[0].weight.register_hook(lambda gradient: gradient * torch.inf)
            assert step(x, torch.zeros(16, dtype=torch.int64))
            if fault != "inputs":
                hook.remove()
            if good_before:  # before, the optimiser had no moments at all
                assert whole_state(model, optimizer) == before
        assert not step(*steps[-1])
        results.add(whole_state(model, optimizer))
    assert len(results) == 1


def test_weight_decay_spares_biases_and_batchnorm_except_with_adam_and_muon():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for optimizer, decayed in (("adamw", 2), ("sgd", 2), ("adam", 6)):
        groups = parameter_groups(
            model, optimizer=optimizer, classifier=model[-1], weight_decay=0.1
        )
        assert sum(len(g["params"]) for g in groups) == 6
        assert sum(len(g["params"]) for g in groups if g["weight_decay"]) == decayed
    classifier, vectors, _ = parameter_groups(
        model, optimizer="muon", classifier=model[-1], weight_decay=0.2, bias_lr_scale=5000
    )
    assert vectors["lr_scale"] * vectors["weight_decay"] == pytest.approx(0.2)
    assert classifier["weight_decay"] == 0.2  # both shrink alike in a step


def test_a_class_weight_scales_the_loss_of_its_images_and_not_what_smoothing_adds():
    x = torch.randn(8, 3, 8, 8)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    weights = data.class_weights(labels, 10)
    torch.testing.assert_close(weights[:2], torch.tensor([8 / 12, 2.0]))
    assert weights[labels].mean().item() == pytest.approx(1)
    model, optimizer = beginning("sgd")
    losses = F.cross_entropy(model(x), labels, reduction="none", label_smoothing=0.2)
    gradient = torch.autograd.grad((losses * weights[labels]).mean(), model[-1].bias)[0]
    model, optimizer = beginning("sgd")
    before = model[-1].bias.detach().clone()
    summed, _ = engine.train_step(
        model, optimizer, x, labels, 0.1, label_smoothing=0.2, class_weights=weights
    )
    assert summed[0].item() == pytest.approx((losses * weights[labels]).sum().item())
    moved = before - model[-1].bias.detach()
    assert F.cosine_similarity(moved, gradient, dim=0) > 0.99


def test_muon_moves_convolutions_alike_in_all_directions():
    model, optimizer = beginning("muon")
    conv = model[0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    x, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    before = [p.detach().clone() for p in model.parameters()]
    gradient = torch.autograd.grad(F.cross_entropy(model(x), labels), conv.weight)[0].flatten(1)
    engine.train_step(model, optimizer, x, labels, 3e-3)
    assert not any(map(torch.equal, before, model.parameters()))
    normed = before[0] / before[0].norm() * 8**0.5
    step = (normed - conv.weight.detach()).flatten(1) / (50 * 3e-3)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    moved = left.T @ step @ right.T  # in the directions of the gradient
    assert values[0] > 3 * values[-1]
    assert moved.diag().min() > 0.5
    assert moved.diag().max() < 1.3
    torch.testing.assert_close(moved, moved.diag().diag(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "muon"])
def test_an_optimiser_also_steps_outside_the_loop(kind):
    model, optimizer = beginning(kind)
    before = [p.detach().clone() for p in model.parameters()]
    logits = model(torch.randn(16, 3, 8, 8))
    F.cross_entropy(logits, torch.arange(16) % 10).backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_muon_takes_a_closure_as_other_optimisers_do():
    ends = []
    x = torch.randn(16, 3, 8, 8)
    for with_closure in (False, True):
        torch.manual_seed(0)
        model, optimizer = beginning("muon")

        def closure(model=model):
            loss = model(x).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure) if with_closure else closure()
        if not with_closure:
            assert optimizer.step() is None
        ends.append([loss.detach(), *model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("optimizer", recipes.BY_OPTIMIZER)
@pytest.mark.parametrize("recipe", recipes.BY_RECIPE)
def test_every_recipe_trains_with_every_optimiser(sample, monkeypatch, recipe, optimizer):
    thin = {"widths": (16, 16, 32, 32, 64, 64), "hidden": (64, 64)}
    monkeypatch.setattr(
        models, "NETWORKS", {name: given | thin for name, given in models.NETWORKS.items()}
    )
    few = {"batch_size": 20, "epochs": 2, "label_smoothing": 0.0, "cutout": 0, "small_first": ""}
    settings = recipes.custom({"recipe": recipe, "optimizer": optimizer, **few})
    # Three classes that colour tells apart: those of 320 photographs take longer to learn.
    images = torch.from_numpy(sample["train_images"] // 2)
    labels = torch.arange(len(images)) % 3
    images[torch.arange(len(images)), :, :, labels] += 100
    split = data.Split(images, labels)
    stats = data.channel_stats(images.numpy())
    splits = data.Splits(("red", "green", "blue"), stats, split, None, split)
    model, _ = train_custom.make_network(settings, splits)
    batches = loading.train_batches(settings, splits, 32)
    groups = train_custom.parameter_groups(model, settings)
    optimizer = make_optimizer(groups, settings.optimizer, settings.lr, "fp32")
    assert min(group["lr_scale"] for group in groups) > 0
    for _ in engine.train(
        model,
        optimizer,
        batches,
        epochs=settings.epochs,
        lr=settings.lr,
        warmup=settings.warmup,
        schedule=settings.schedule,
    ):
        pass
    loss, accuracy = engine.evaluate(model, data.inputs(images, stats, 32), labels)
    assert loss < 0.5 * np.log(3)
    assert accuracy > 0.9


class Few:
    """Batches whose channels lie about 5, with a deviation of 2."""

    num_images = 480

    def __init__(self, num_steps):
        self.num_steps = num_steps
        self.x = 5 + 2 * torch.randn(num_steps, 16, 3, 8, 8)

    def epoch(self, epoch, first_step=0):
        for x in self.x[first_step:]:
            yield x, torch.arange(16) % 2


def normalising():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
    model[0].running_mean.fill_(1000.0)  # of other pictures
    return model, optimizer_of(model, model[-1], "sgd")


def test_after_few_steps_statistics_are_those_of_the_batches_alone():
    model, optimizer = normalising()
    loader = Few(3)
    for _ in engine.train(model, optimizer, loader, epochs=2, lr=1e-3):
        pass
    means = loader.x.mean((1, 3, 4))
    variances = loader.x.transpose(1, 2).flatten(2).var(2)
    torch.testing.assert_close(model[0].running_mean, means.mean(0))
    torch.testing.assert_close(model[0].running_var, variances.mean(0))
    assert model[0].momentum == 0.1


def test_after_many_steps_statistics_are_those_of_the_momentum_to_the_bit():
    model, optimizer = normalising()
    loader = Few(100)
    usual = nn.BatchNorm2d(3)
    usual.running_mean.fill_(1000.0)
    for _ in engine.train(model, optimizer, loader, epochs=1, lr=1e-3):
        pass
    for x in loader.x:
        usual(x)
    assert torch.equal(model[0].running_mean, usual.running_mean)
    assert torch.equal(model[0].running_var, usual.running_var)


def test_the_averaged_weights_are_the_mean_of_the_last_steps_with_statistics_of_their_own():
    model, optimizer = normalising()
    loader = Few(100)
    scales = []
    for at in engine.train(model, optimizer, loader, epochs=2, lr=1e-3, average=0.25):
        if at.step:
            scales.append(model[0].weight.detach().clone())
        elif at.epoch == 1:
            assert torch.equal(model[0].weight, scales[-1])  # until the end nothing is replaced
    torch.testing.assert_close(model[0].weight.detach(), torch.stack(scales[-50:]).mean(0))
    means = loader.x[: engine.MEASURED].mean((0, 1, 3, 4))
    torch.testing.assert_close(model[0].running_mean, means)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon", "plain adamw"])
def test_each_round_begins_anew_and_all_are_averaged(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    optimizer = optimizer_of(model, model[-1], kind)
    weights = []
    for at in engine.train(
        model, optimizer, Few(5), epochs=4, lr=1e-2, warmup=0.2, average=0.5, rounds=2
    ):
        if at.step:
            weights.append([p.detach().clone() for p in model.parameters()])
    for first, second in zip(weights[:10], weights[10:], strict=True):  # of the same batches
        assert all(map(torch.equal, first, second))
    for number, parameter in enumerate(model.parameters()):
        last = [step[number] for step in (*weights[5:10], *weights[15:])]
        torch.testing.assert_close(parameter.detach(), torch.stack(last).mean(0))
    for epochs, average in ((5, 0.5), (4, 0.05)):
        with pytest.raises(ValueError, match="2 rounds must divide the"):
            next(
                engine.train(
                    model, optimizer, Few(5), epochs=epochs, lr=1, average=average, rounds=2
                )
            )


def test_a_share_of_less_than_a_step_averages_nothing():
    model, optimizer = normalising()
    for at in engine.train(model, optimizer, Few(3), epochs=2, lr=1e-3, average=0.01):
        if at.step:
            last = model[0].weight.detach().clone()
    assert torch.equal(model[0].weight, last)


def test_frozen_batchnorm_statistics_do_not_move():
    frozen, trained = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    frozen.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.Conv2d(4, 4, 3), trained)
    before = digest(dict(frozen.state_dict())), trained.running_mean.clone()
    engine.train_mode(model)
    model(torch.randn(8, 3, 8, 8))
    assert digest(dict(frozen.state_dict())) == before[0]
    assert not torch.equal(before[1], trained.running_mean)


def test_prediction_covers_the_last_partial_batch_keeps_order_and_sees_through_a_wrapper(sample):
    images, labels = (torch.from_numpy(sample[f"test_{kind}"]) for kind in ("images", "labels"))
    x, labels = data.normalize(images, data.channel_stats(sample["test_images"])), labels.long()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))
    whole, _ = engine.predict(model, [x])
    in_parts, _ = engine.predict(nn.Sequential(model), x.split(7))
    torch.testing.assert_close(in_parts, whole)
    mirrored, _ = engine.predict(model, [x.flip(3)])
    plain, averaged = engine.predict(model, x.split(9), tta="flip")
    torch.testing.assert_close(plain, whole)
    torch.testing.assert_close(averaged, (whole + mirrored) / 2)
    loss, accuracy = engine.evaluate(model, x.split(7), labels)
    assert loss == pytest.approx(F.cross_entropy(whole, labels).item())
    assert accuracy == (whole.argmax(1) == labels).double().mean().item()
    model[2].bias.data[0] = torch.nan
    assert np.isnan(engine.evaluate(model, x.split(7), labels)[0])


def test_crops_are_the_image_and_two_moved_by_a_pixel_each_with_its_mirror_image():
    x = torch.randn(2, 3, 32, 32)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    moved = [padded[:, :, start : start + 32, start : start + 32] for start in (1, 0, 2)]
    expected = [view for each in moved for view in (each, each[..., ::-1])]
    np.testing.assert_array_equal(list(engine.views(x, "crops")), expected)


def test_a_numbered_cpu_is_a_cpu():
    with processes.joined(device.select_device("cpu:0")) as chosen:
        assert chosen.type == "cpu"


class NoDoubles(TorchDispatchMode):
    """Refuses what an Apple GPU refuses."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert getattr(tensor, "dtype", None) != torch.float64, function
        return result


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_and_prediction_need_no_double_on_the_device(sample, kind):
    loader, model = batches(sample, resizing=((0.5, 24),)), models.CustomCNN()
    with NoDoubles():
        for _ in engine.train(
            model, optimizer_of(model, model.classifier, kind), loader, epochs=1, lr=1e-3
        ):
            pass
        engine.predict(model, data.inputs(loader.split.images, loader.stats, 32), tta="crops")
    with pytest.raises(AssertionError), NoDoubles():
        torch.zeros(2).double()


MEMORY = """
import resource, torch, models
from runtime.device import prepare
prepare()
model, x = models.CustomCNN(), torch.randn(256, 3, 32, 32)
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x).sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("side", [(1, 1), (3, 3), (2, 4), (5, 5), (6, 4)])
def test_a_convolution_as_matrix_products_is_the_convolution(side):
    x = torch.randn(2, 5, *side, dtype=torch.double, requires_grad=True)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.double, requires_grad=True)
    y = F.conv2d(x, weight, padding=1)
    assert torch.allclose(amx.convolve(x, weight), y)
    assert torch.autograd.gradcheck(amx.convolve, (x, weight))


def test_processors_with_amx_convolve_small_maps_as_products_in_bf16_alone(monkeypatch):
    def trained(precision):
        model = models.CustomCNN(**models.NETWORKS["wide"]).to(memory_format=torch.channels_last)
        model.load_state_dict(weights)
        amx.as_products(model, precision, CPU)
        model.eval()
        logits = engine.forward(model, x, precision)
        logits.square().sum().backward()
        return model, logits, [p.grad for p in model.parameters() if p.requires_grad]

    taken = []
    convolve = amx.convolve

    def noted(x, weight):
        taken.append(tuple(x.shape))
        return convolve(x, weight)

    monkeypatch.setattr(amx, "convolve", noted)
    torch.manual_seed(0)
    x = torch.randn(16, 3, 24, 24)
    weights = models.CustomCNN(**models.NETWORKS["wide"]).state_dict()
    monkeypatch.setattr(amx, "cpu_features", dict)
    _, logits, gradients = trained("bf16")
    monkeypatch.setattr(amx, "cpu_features", lambda: {"amx_bf16": True})
    model, near, near_gradients = trained("bf16")
    convolutions = (nn.Conv2d, amx.SmallMapConv2d)
    kinds = [type(module) for module in model.features if isinstance(module, convolutions)]
    assert kinds == [nn.Conv2d] * 3 + [amx.SmallMapConv2d] * 3
    assert list(model.state_dict()) == list(weights)
    for a, b in zip([logits, *gradients], [near, *near_gradients], strict=True):
        assert (a - b).norm() <= 0.02 * a.norm()
    # of maps of 23, 11, 11, 5, 5 and 2 pixels
    assert taken == [(16, 256, 5, 5), (16, 256, 5, 5), (16, 384, 2, 2)]
    assert torch.equal(engine.forward(model, x, "fp32"), trained("fp32")[1])
    assert len(taken) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stride": 2},
        {"dilation": 2},
        {"padding": 0},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 5},
        {"out_channels": 128},
    ],
)
def test_only_what_products_compute_faster_takes_that_way(monkeypatch, changes):
    monkeypatch.setattr(amx, "cpu_features", lambda: {"amx_bf16": True})
    usual = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1}
    model = nn.Sequential(nn.Conv2d(**usual | changes))
    x = torch.randn(4, 256, 4, 4)
    expected = engine.forward(model, x, "bf16")
    amx.as_products(model, "bf16", torch.device("cuda"))
    assert type(model[0]) is nn.Conv2d
    amx.as_products(model, "bf16", CPU)
    assert type(model[0]) is (nn.Conv2d if changes else amx.SmallMapConv2d)
    assert (engine.forward(model, x, "bf16") - expected).norm() <= 0.01 * expected.norm()


PROBED = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3072, 10))
BATCH = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)


def fake_clock(monkeypatch, seconds, step=lambda *_: None):
    """Lets the steps of `choose_precision` take `seconds(precision)`."""
    clock = [0.0]

    def timed(probe, *arguments):
        step(probe, *arguments)
        clock[0] += seconds(probe.precision)

    monkeypatch.setattr(device._Probe, "__call__", timed)
    monkeypatch.setattr(device.time, "thread_time", lambda: clock[0])


@pytest.mark.parametrize(("seconds", "best"), [(0.80, "bf16"), (0.86, "fp32")])
def test_bf16_must_gain_a_fifth_and_measuring_it_leaves_no_trace(monkeypatch, seconds, best):
    def state():
        weights = digest(dict(PROBED.state_dict()))
        return weights, torch.get_rng_state().tolist(), torch.get_num_threads()

    before, times = state(), {"fp32": 1.0, "bf16": seconds}
    fake_clock(monkeypatch, times.get, device._Probe.__call__)
    precision, reason = device.choose_precision("auto", PROBED, BATCH, CPU)
    assert precision == best
    assert "fp32 8" in reason
    assert state() == before
    assert device.choose_precision("bf16", PROBED, BATCH, CPU)[0] == "bf16"


@pytest.mark.parametrize(
    ("gain", "best"), [(6.0, "bf16"), (1.8, "bf16"), (1.0, "fp32"), (0.2, "fp32")]
)
def test_a_load_beside_it_never_flips_the_choice_of_precision(monkeypatch, gain, best):
    chance, load = random.Random(0), [1.0]

    def seconds(precision):
        load[0] = min(max(load[0] * chance.uniform(0.9, 1.11), 1), 3)  # comes and goes slowly
        jitter = chance.uniform(1, 1.1) * (2 if chance.random() < 0.1 else 1)
        return load[0] * jitter / (gain if precision == "bf16" else 1)

    fake_clock(monkeypatch, seconds)
    chosen = {device.choose_precision("auto", PROBED, BATCH, CPU)[0] for _ in range(200)}
    assert chosen == {best}


def test_the_real_clock_gives_one_choice(loader):
    batch, model = next(loader.epoch(0)), models.CustomCNN()
    assert len({device.choose_precision("auto", model, batch, CPU)[0] for _ in range(3)}) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks for glibc's malloc")
def test_a_step_takes_the_memory_that_the_one_before_it_freed():
    run = [sys.executable, "-c", MEMORY]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    pages = [int(line) for line in done.stdout.split()]
    assert statistics.median(pages) < pages[0] / 10
