import errno
import json
import os

import pytest
import torch
import torchvision
from test_training import rows

import checkpoint
import compute
import data
import features
import finetune
import history
import models
from finetune import FineTuneConfig

# Each network at a size its torchvision original takes too, so that they can be compared.
MODELS = tuple(models.ARCHS)


TAILS = {  # the last stage and the head, as names of parameters begin
    "vgg19": (tuple(f"features.{i}." for i in range(28, 37)), ("classifier.",)),
    "resnet18": (("layer4.",), ("fc.",)),
    "resnet50": (("layer4.",), ("fc.",)),
    "mobilenet_v3_small": (tuple(f"features.{i}." for i in range(9, 13)), ("classifier.",)),
}


def operated(arch, **surgery):
    torch.manual_seed(0)
    return models.OperatedNetwork(arch, **{"image_size": 64, **surgery}).eval()


@pytest.mark.parametrize("arch", MODELS)
def test_trunk_equals_torchvisions_own_feature_for_feature(arch):
    torch.manual_seed(1)
    original = getattr(torchvision.models, arch)(weights=None).eval()
    model = operated(arch)
    model.load_pretrained(original.state_dict())
    images = torch.randn(2, 3, 32, 32)
    x = torch.nn.functional.interpolate(images, size=64, mode="bilinear", align_corners=False)
    names = [name for stage in model.row.stages.values() for name in stage]
    for name in names[: -1 if arch == "vgg19" else None]:  # its last max-pool is the surgery
        x = original.get_submodule(name)(x)
    trunk = torch.nn.Sequential(*list(model.stages().values())[:-1])
    assert torch.equal(trunk(images), x)


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("unfreeze", ["head", "last", "all"])
def test_stages_compose_to_the_network_and_only_the_named_part_trains(arch, unfreeze):
    model = operated(arch)
    trunk, tail = models.freeze(model, unfreeze)
    images = torch.randn(2, 3, 32, 32)
    middle = trunk(images) if trunk else images
    torch.testing.assert_close(tail(middle), model(images))
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    last, head = TAILS[arch]
    prefixes = {"head": head, "last": (*last, *head), "all": ("",)}[unfreeze]
    assert trained == {n for n, _ in model.network.named_parameters() if n.startswith(prefixes)}
    assert (trunk is None) == (unfreeze == "all")


@pytest.mark.parametrize(
    ("arch", "total"),
    [
        ("vgg19", 20_024_384 + 5_130),
        ("resnet18", 11_176_512 + 5_130),
        ("resnet50", 23_508_032 + 20_490),
        ("mobilenet_v3_small", 1_517_856 + 10_250),
    ],
)
def test_parameter_counts(arch, total):
    assert models.num_parameters(operated(arch))["total"] == total


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_opened_stem_keeps_four_times_the_pixels_or_more(arch):
    sizes = []
    for opened in (False, True):
        stages = list(operated(arch, image_size=32, open_stem=opened).stages().values())
        sizes.append(torch.nn.Sequential(*stages[:-1])(torch.randn(1, 3, 32, 32)).shape[-1])
    assert sizes == [1, 4]


def test_learning_rates_fall_from_head_to_stem():
    model = operated("resnet18")
    models.freeze(model, "all")
    config = FineTuneConfig(stage_lr_scale=0.5)
    groups = finetune.parameter_groups(model, config)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    network = model.network
    assert scales[id(network.fc[1].weight)] == 1
    assert scales[id(network.layer4[0].conv1.weight)] == 0.5
    assert scales[id(network.conv1.weight)] == 0.5**5


def test_weights_with_a_missing_misshapen_unknown_or_infinite_tensor_are_refused_by_name():
    model = operated("resnet18")
    good = torchvision.models.resnet18(num_classes=3).state_dict()
    model.load_pretrained(good)  # a classifier of another size is no obstacle, nor is none at all
    model.load_pretrained({k: v for k, v in good.items() if not k.startswith("fc.")})
    key = "layer3.0.conv1.weight"
    for bad in (
        {k: v for k, v in good.items() if k != key},
        good | {key: good[key][:2]},
        good | {key: good[key] * torch.inf},
    ):
        with pytest.raises(ValueError, match=key):
            model.load_pretrained(bad)
    with pytest.raises(ValueError, match=r"layer9\.weight"):
        model.load_pretrained(good | {"layer9.weight": good[key]})
    good = torchvision.models.mobilenet_v3_small().state_dict()  # two layers follow its trunk
    model = operated("mobilenet_v3_small")
    model.load_pretrained({k: v for k, v in good.items() if k.startswith("features.")})
    with pytest.raises(ValueError, match=r"classifier\.0\.bias"):
        model.load_pretrained({k: v for k, v in good.items() if k != "classifier.0.bias"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_give_the_batches_the_uncached_trunk_gives(sample, tmp_path, precision):
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ).eval()
    split = data.Split(
        torch.from_numpy(sample["train_images"]), torch.from_numpy(sample["train_labels"]).long()
    )
    statistics = [0.5] * 3, [0.25] * 3
    plain = data.TrainBatches(split, 64, *statistics, data.Augmentation("alternating"), seed=5)
    scratch = tmp_path / "r.pt"
    cache = features.compute_features(trunk, split.images, *statistics, precision, scratch)
    assert cache.shape[:3] == (320, 2, 8)
    cached = features.FeatureBatches(cache, split, 64, "alternating", 5, torch.float32)
    for epoch in (0, 1):
        for (x, labels), (kept, kept_labels) in zip(
            plain.epoch(epoch), cached.epoch(epoch), strict=True
        ):
            assert torch.equal(labels, kept_labels)
            expected = compute.forward(trunk, x, precision).to(torch.bfloat16).float()
            torch.testing.assert_close(kept, expected, rtol=1e-2, atol=1e-3)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_features_that_do_not_fit_in_memory_go_to_a_file_that_vanishes(
    sample, tmp_path, monkeypatch, capsys
):
    images = torch.from_numpy(sample["test_images"])
    scratch = tmp_path / "r.pt"
    arguments = (torch.nn.Conv2d(3, 4, 3), images, [0.5] * 3, [0.25] * 3, "fp32", scratch)
    kept = features.compute_features(*arguments)
    assert "in memory" in capsys.readouterr().out
    monkeypatch.setattr(features, "available_memory", lambda: 1000)
    mapped = features.compute_features(*arguments)
    assert f"MB in a file in {tmp_path}" in capsys.readouterr().out
    assert torch.equal(kept, mapped)
    assert os.name == "nt" or not list(tmp_path.iterdir())
    plain = features.compute_features(*arguments, mirrored=False)
    assert torch.equal(plain, kept[:, :1])
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.raises(OSError, match="--no-cache"):
        features.compute_features(*arguments)
    assert not list(tmp_path.iterdir())


def run(workplace, monkeypatch, *arguments):
    parts = {part: {"epochs": epochs} for part, epochs in (("head", 2), ("last", 1), ("all", 1))}
    monkeypatch.setattr(finetune, "PARTS", parts)
    base = ["--arch", "mobilenet_v3_small", "--image-size", "32", "--batch-size", "64"]
    assert finetune.main([*base, "--precision", "fp32", "--limit", "128", *arguments]) == 0


def test_finetuned_checkpoint_says_where_it_began_and_needs_nothing_to_be_used(
    workplace, monkeypatch
):
    start = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(start, "start.pth")
    run(workplace, monkeypatch, "--unfreeze", "last", "--weights", "start.pth")
    model, saved = checkpoint.load_model(workplace / "checkpoints/mobilenet_v3_small.pt")
    assert saved["start_weights"]["file"] == "start.pth"
    assert len(saved["start_weights"]["sha256"]) == 64
    trained = model.network.state_dict()
    for key, value in start.items():  # statistics of frozen BatchNorm layers included
        frozen = key.startswith("features.") and int(key.split(".")[1]) < 9
        if frozen:
            assert torch.equal(value, trained[key]), key
    assert not torch.equal(start["features.12.0.weight"], trained["features.12.0.weight"])
    described = json.loads((workplace / "results/mobilenet_v3_small/config.json").read_text())
    assert described["start_weights"] == saved["start_weights"]
    assert described["parameters"]["trainable"] < described["parameters"]["total"]


@pytest.fixture
def lively_weights(workplace, sample):
    """Random weights with the BatchNorm statistics of images: the trunk tells them apart."""
    model = operated("mobilenet_v3_small", image_size=32, open_stem=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    images = torch.from_numpy(sample["test_images"])
    with torch.no_grad():
        model(data.normalize(images, finetune.IMAGENET_MEAN, finetune.IMAGENET_STD))
    torch.save(model.network.state_dict(), "lively.pth")
    return "lively.pth"


@pytest.mark.parametrize("unfreeze", ["head", "last"])
def test_cache_changes_time_and_nothing_else(workplace, monkeypatch, lively_weights, unfreeze):
    images = torch.from_numpy(data.cifar10(workplace / "data").test_images)
    losses, logits = [], []
    for name, extra in (("with", []), ("without", ["--no-cache"])):
        # Steps small enough that the rounding of the cached features is not blown up.
        start = ["--weights", lively_weights, "--dropout", "0", "--lr", "3e-4"]
        run(workplace, monkeypatch, *start, "--unfreeze", unfreeze, "--run-name", name, *extra)
        history = rows(workplace / f"results/{name}/history.csv")
        losses.append([float(row["train_loss"]) for row in history])
        model, _ = checkpoint.load_model(workplace / f"checkpoints/{name}.pt")
        statistics = finetune.IMAGENET_MEAN, finetune.IMAGENET_STD
        logits.append(compute.predict(model, images, *statistics)[0])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    between_images = logits[0].std(0).mean()
    assert (logits[0] - logits[1]).abs().max() < 0.1 * between_images


def test_time_left_is_that_of_the_epochs_without_the_features():
    numbers = dict.fromkeys(history.COLUMNS, 0.5)
    first, second = (numbers | {"epoch": i, "seconds": 600 + 60 * i} for i in (1, 2))
    assert history.line([first], 4, seconds_before=600).endswith(" 11:00    3:00")
    assert history.line([first, second], 4, seconds_before=600).endswith(" 12:00    2:00")


def test_defaults_follow_from_the_network_what_trains_and_where_it_begins():
    last, every, scratch = map(
        finetune.parse, ([], ["--unfreeze", "all"], ["--weights", "none", "--epochs", "4"])
    )
    assert (last.unfreeze, last.epochs, last.translate) == ("last", 5, 0)
    assert (every.epochs, every.translate) == (10, 2)
    assert (scratch.unfreeze, scratch.epochs, scratch.stage_lr_scale) == ("all", 4, 1.0)
    assert finetune.parse(["--weights", "none", "--unfreeze", "head"]).unfreeze == "head"
    assert finetune.parse(["--arch", "mobilenet_v3_small"]).unfreeze == "all"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "resnet19"], ["resnet19", "resnet18"]),
        (["--image-size", "16"], ["--image-size 16", "32"]),
        (["--weights", "absent.pth"], ["absent.pth"]),
        (["--translate", "2"], ["--translate", "--no-cache"]),
        (["--unfreeze", "some"], ["some"]),
        (["--weights", "data/cifar10.npz"], ["cifar10.npz", "torch.save"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(workplace, capsys, arguments, words):
    assert finetune.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
