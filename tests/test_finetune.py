import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import CPU, outcome, rows

import data
import engine
import finetune
import pretrained
from pretrained import IMAGENET_STATS
from reports import provenance
from runs import features, loading
from runtime import amx, memory
from storage import checkpoint

PARAMETERS = {  # of the backbone, and of the new classifier
    "vgg19": 20_024_384 + 5_130,
    "resnet18": 11_176_512 + 5_130,
    "resnet50": 23_508_032 + 20_490,
    "mobilenet_v3_small": 1_517_856 + 10_250,
}
TAILS = {  # the last stage and the head, as names of parameters begin
    "vgg19": (tuple(f"features.{i}." for i in range(28, 37)), ("classifier.",)),
    "resnet18": (("layer4.",), ("fc.",)),
    "resnet50": (("layer4.",), ("fc.",)),
    "mobilenet_v3_small": (tuple(f"features.{i}." for i in range(9, 13)), ("classifier.",)),
}
FIRST = {  # the first two stages
    "vgg19": tuple(f"features.{i}." for i in range(10)),
    "resnet18": ("conv1.", "bn1.", "layer1."),
    "resnet50": ("conv1.", "bn1.", "layer1."),
    "mobilenet_v3_small": ("features.0.", "features.1."),
}


def adapted(arch, **arguments):
    torch.manual_seed(0)
    return pretrained.PretrainedNetwork(arch, **arguments).eval()


@pytest.mark.parametrize("arch", pretrained.ARCHS)
def test_backbone_equals_torchvisions_own_feature_for_feature(arch):
    torch.manual_seed(1)
    original = getattr(torchvision.models, arch)(weights=None).eval()
    model = adapted(arch)
    model.load_pretrained(original.state_dict())
    x = own = torch.randn(2, 3, 64, 64)
    names = [name for stage in model.row.stages.values() for name in stage]
    for name in names[: -1 if arch == "vgg19" else None]:  # its last max-pool is replaced
        x = original.get_submodule(name)(x)
    backbone = torch.nn.Sequential(*list(model.stages().values())[:-1])
    assert torch.equal(backbone(own), x)
    assert provenance.num_parameters(model)["total"] == PARAMETERS[arch]


@pytest.mark.parametrize("arch", pretrained.ARCHS)
@pytest.mark.parametrize("unfreeze", ["head", "last", "most", "all"])
def test_stages_compose_to_the_network_and_only_the_named_part_trains(arch, unfreeze):
    model = adapted(arch)
    pretrained.freeze(model, unfreeze)
    backbone, tail = pretrained.parts(model, unfreeze)
    images = torch.randn(2, 3, 32, 32)
    middle = backbone(images) if backbone else images
    torch.testing.assert_close(tail(middle), model(images))
    trained = {name for name, p in model.network.named_parameters() if p.requires_grad}
    last, head = TAILS[arch]
    names = {name for name, _ in model.network.named_parameters()}
    expected = {
        "head": {name for name in names if name.startswith(head)},
        "last": {name for name in names if name.startswith((*last, *head))},
        "most": {name for name in names if not name.startswith(FIRST[arch])},
        "all": names,
    }
    assert trained == expected[unfreeze]
    assert (backbone is None) == (unfreeze == "all")


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_opened_stem_keeps_four_times_the_pixels_or_more(arch):
    sides = []
    for opened in (False, True):
        stages = list(adapted(arch, image_size=32, open_stem=opened).stages().values())
        sides.append(torch.nn.Sequential(*stages[:-1])(torch.randn(1, 3, 32, 32)).shape[-1])
    assert sides == [1, 4]


def test_learning_rates_fall_from_head_to_stem():
    model = adapted("resnet18")
    settings = finetune.parse(["--unfreeze", "all", "--stage-lr-scale", "0.5"])
    groups = finetune.parameter_groups(model, settings)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    network = model.network
    assert scales[id(network.fc[1].weight)] == 1
    assert scales[id(network.layer4[0].conv1.weight)] == 0.5
    assert scales[id(network.conv1.weight)] == 0.5**5


def test_weights_with_a_missing_misshapen_or_unknown_tensor_are_refused_by_name():
    model = adapted("resnet18")
    good = torchvision.models.resnet18(num_classes=3).state_dict()
    model.load_pretrained(good)  # a classifier of another size is no obstacle, nor is none at all
    model.load_pretrained({k: v for k, v in good.items() if not k.startswith("fc.")})
    key = "layer3.0.conv1.weight"
    for bad in (
        {k: v for k, v in good.items() if k != key},
        good | {key: good[key][:2]},
    ):
        with pytest.raises((ValueError, RuntimeError), match=key):
            model.load_pretrained(bad)
    with pytest.raises(ValueError, match=r"layer9\.weight"):
        model.load_pretrained(good | {"layer9.weight": good[key]})
    good = torchvision.models.mobilenet_v3_small().state_dict()  # two layers follow its backbone
    model = adapted("mobilenet_v3_small")
    model.load_pretrained({k: v for k, v in good.items() if k.startswith("features.")})
    with pytest.raises(ValueError, match=r"classifier\.0\.bias"):
        model.load_pretrained({k: v for k, v in good.items() if k != "classifier.0.bias"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_give_the_batches_the_uncached_backbone_gives(sample, tmp_path, precision):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ).eval()
    images, labels = (torch.from_numpy(sample[f"train_{kind}"]) for kind in ("images", "labels"))
    split = data.Split(images, labels.long())
    flips = data.Augmentation("alternating")
    plain = data.TrainBatches(split, IMAGENET_STATS, 64, augmentation=flips, seed=5)
    scratch = tmp_path / "r.pt"
    kept = features.compute_features(backbone, images, IMAGENET_STATS, 32, precision, scratch)
    assert kept.shape == (320, 2, 15, 15, 8)
    cached = features.FeatureBatches(plain, kept)
    for epoch in (0, 1):
        for (x, labels), (feature, same) in zip(
            plain.epoch(epoch), cached.epoch(epoch), strict=True
        ):
            assert torch.equal(labels, same)
            expected = engine.forward(backbone, x, precision).to(feature.dtype)
            tolerance = {"rtol": 1e-2, "atol": 1e-3} if precision == "bf16" else {}
            torch.testing.assert_close(feature, expected, **tolerance)


@pytest.mark.parametrize(
    ("flags", "num_images", "kind", "kept"),
    [
        ("--rounds 2 --average 0.6", 4999, "cpu", True),
        ("--rounds 2 --average 0.6", 5000, "cpu", False),  # of CIFAR-10 25 GB in fp32
        ("--rounds 2 --average 0.6", 4999, "cuda", False),
        ("--rounds 2 --average 0.6 --no-cache", 4999, "cpu", False),
        ("--rounds 2 --average 0.6 --cutout 4", 4999, "cpu", False),
        ("", 4999, "cpu", False),
        ("--unfreeze last", 50_000, "cuda", True),
        ("--unfreeze all --rounds 2 --average 0.6", 300, "cpu", False),
    ],
)
def test_large_maps_are_kept_of_few_images_alone(flags, num_images, kind, kept):
    settings = finetune.parse(flags.split())
    assert features.keeps(settings, num_images, torch.device(kind)) == kept


def test_kept_maps_move_by_whole_cells_where_the_images_would_move_by_their_pixels(
    sample, tmp_path
):
    images, labels = (torch.from_numpy(sample[f"train_{kind}"]) for kind in ("images", "labels"))
    split = data.Split(images, labels.long())
    moves = data.Augmentation("alternating", translate=3)  # of 8 cells: 0.75, rounded
    plain = data.TrainBatches(split, IMAGENET_STATS, 64, augmentation=moves, seed=5)
    pooled = torch.nn.AvgPool2d(4)  # cells of 4x4 pixels
    scratch = tmp_path / "r.pt"
    kept = features.compute_features(pooled, images, IMAGENET_STATS, 32, "fp32", scratch)
    batches = features.FeatureBatches(plain, kept)
    for epoch in (0, 1):
        draws = batches._draw(epoch)
        assert draws.shifts.unique().tolist() == [-1, 0, 1]
        moved = data.gather(images, draws.chosen, draws.flipped, 4 * draws.shifts)
        expected = pooled(data.normalize(moved, IMAGENET_STATS))
        found = torch.cat([x for x, _ in batches.epoch(epoch)])
        inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # of the reflected border
        torch.testing.assert_close(found[inside], expected[inside])


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_features_that_do_not_fit_in_memory_go_to_a_file_that_vanishes(
    sample, tmp_path, monkeypatch, capsys
):
    images = torch.from_numpy(sample["test_images"])
    arguments = (torch.nn.Conv2d(3, 4, 3), images, IMAGENET_STATS, 32, "fp32", tmp_path / "r.pt")
    kept = features.compute_features(*arguments)
    assert "MB\n" in capsys.readouterr().out
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
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


@pytest.mark.parametrize(
    ("line", "groups", "free"),
    [  # limits and use from the process's own group outwards
        ("0::/pod/job", {"pod/job": ("max", 10), "pod": ("5000", 1000), "": ("9000", 0)}, 4000),
        ("0::/pod/job", {"pod/job": ("700", 100), "pod": ("5000", 1000)}, 600),
        ("4:cpu,cpuacct:/pod\n3:memory:/pod", {"pod": ("900", 1), "": ("800", 9)}, 791),
        # Within a container the outer part of the path cannot be seen.
        ("3:memory:/docker/1f", {"": ("3000", 1000)}, 2000),
        ("0::/../outside", {"": ("3000", 1000)}, 2000),
        ("2:cpu:/pod\n0::/", {"pod": ("5", 1)}, 1024 * 64),
    ],
)
def test_the_free_memory_is_that_of_the_narrowest_control_group(tmp_path, line, groups, free):
    version_1 = "memory" in line
    names = ("memory.limit_in_bytes", "total_rss") if version_1 else ("memory.max", "anon")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 64 kB\n")
    for group, (limit, used) in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / ("memory" if version_1 else "") / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(limit)
        (folder / "memory.stat").write_text(f"{names[1]} {used}\nfile 77\n")
    assert memory.available_memory(tmp_path) == free


TINY = ("finetune", "--arch", "mobilenet_v3_small", "--image-size", "32", "--limit", "96", *CPU)


def test_finetuned_checkpoint_says_where_it_began_and_needs_nothing_to_be_used(run):
    start = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(start, "start.pth")
    assert run(*TINY, "--unfreeze", "last", "--weights", "start.pth").code == 0
    model, saved = checkpoint.load_checkpoint(Path("checkpoints/mobilenet_v3_small.pt"))
    assert saved["start_weights"]["file"] == "start.pth"
    assert len(saved["start_weights"]["sha256"]) == 64
    trained = model.network.state_dict()
    for key, value in start.items():  # statistics of frozen BatchNorm layers included
        if key.startswith("features.") and int(key.split(".")[1]) < 9:
            assert torch.equal(value, trained[key]), key
    assert not torch.equal(start["features.12.0.weight"], trained["features.12.0.weight"])
    described = json.loads(Path("results/mobilenet_v3_small/config.json").read_text())
    assert described["start_weights"] == saved["start_weights"]
    assert described["parameters"]["trainable"] < described["parameters"]["total"]
    # And one run may begin where another has ended.
    begin = "--weights", "checkpoints/mobilenet_v3_small.pt", "--lr", "1e-9"
    assert run(*TINY, *begin, "--run-name", "again").code == 0
    later, _ = checkpoint.load_checkpoint(Path("checkpoints/again.pt"))
    for parameter, other in zip(model.parameters(), later.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_other_classes_gives_all_but_its_classifier(run, capsys):
    assert run(*TINY, "--weights", "none", "--unfreeze", "head").code == 0
    path = "checkpoints/mobilenet_v3_small.pt"
    trained = checkpoint.load_checkpoint(Path(path))[0].state_dict()
    model = adapted("mobilenet_v3_small", num_classes=2)
    begun = model.classifier.weight.clone()
    loading.start_weights(model, path, "mobilenet_v3_small", ("tea", "coffee"))
    assert torch.equal(model.classifier.weight, begun)
    state = model.state_dict()
    differ = {key for key in state if not torch.equal(state[key], trained[key])}
    assert f"{path} knows other classes: the last layer begins anew" in capsys.readouterr().out
    assert differ == {f"{model.classifier_name}.weight", f"{model.classifier_name}.bias"}


@pytest.fixture
def lively_weights(workplace, sample):
    """Random weights with the BatchNorm statistics of images: the backbone tells them apart."""
    model = adapted("mobilenet_v3_small", image_size=32, open_stem=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        model(data.normalize(torch.from_numpy(sample["test_images"]), IMAGENET_STATS))
    torch.save(model.network.state_dict(), "lively.pth")
    return "lively.pth"


@pytest.mark.parametrize(
    "more",
    [
        ("head",),
        ("last",),
        ("most", "--translate", "0", "--rounds", "3", "--average", "0.6"),
    ],
    ids=["head", "last", "most"],
)
def test_the_cache_runs_the_backbone_twice_an_image_and_changes_no_bit(
    run, monkeypatch, lively_weights, more
):
    seen, forward = [], engine.forward

    def counted(backbone, x, precision):
        seen.append(len(x))
        return forward(backbone, x, precision)

    monkeypatch.setattr(features, "forward", counted)
    options = "--weights", lively_weights, "--dropout", "0", "--epochs", "3"
    options = (*options, "--unfreeze", *more)
    assert run(*TINY, *options, "--run-name", "without", "--no-cache").code == 0
    assert not seen
    done = run(*TINY, *options, "--run-name", "with")
    assert (done.code, f"first weights: {lively_weights}\n" in done.out) == (0, True)
    splits = json.loads(Path("results/with/config.json").read_text())["splits"]
    assert sum(seen) == 2 * splits["train"] + splits["val"]
    assert len({row["train_loss"] for row in rows(Path("results/with"))}) == 3
    assert outcome(".", "with") == outcome(".", "without")


@pytest.mark.parametrize(
    ("more", "number", "place"),
    [
        (("last", "--epochs", "2"), 5, (1, 1)),
        (("head", "--no-cache", "--epochs", "2"), 5, (1, 1)),
        # Stopped where the second round begins.
        (("most", "--epochs", "3", "--average", "0.8", "--rounds", "3"), 4, (1, 0)),
    ],
    ids=["cache", "plain", "rounds"],
)
def test_finetuning_with_dropout_resumes_to_the_same_bits(run, signal_at, more, number, place):
    common = (*TINY, "--weights", "none", "--unfreeze", *more, "--run-name")
    assert run(*common, "whole").code == 0
    signal_at(number, signal.SIGTERM)
    assert run(*common, "halves").code == 143
    state, _ = checkpoint.load_state(Path("checkpoints/halves.resume.pt"))
    assert (state["epoch"], state["step"]) == place
    if "most" in more:  # its state holds what does not train, too
        done = run("evaluate", "checkpoints/halves.resume.pt")
        assert (done.code, done.err) == (0, "")
        assert "an unfinished run, after 1 of 3 epochs" in done.out
    assert run(*common, "halves", "--resume").code == 0
    assert outcome(".", "halves") == outcome(".", "whole")


@pytest.mark.parametrize("unfreeze", ["head", "last", "most"])
def test_small_maps_are_products_in_the_frozen_part_and_in_the_one_that_trains(
    monkeypatch, unfreeze
):
    monkeypatch.setattr(amx, "cpu_features", lambda: {"amx_bf16": True})
    model = adapted("vgg19")
    amx.as_products(model, "bf16", torch.device("cpu"))
    frozen, trained = pretrained.parts(model, unfreeze)
    found = [
        module
        for part in (frozen, trained)
        for module in part.modules()
        if isinstance(module, amx.SmallMapConv2d)
    ]
    assert len(found) == 11  # all convolutions with at least 256 channels on both sides
