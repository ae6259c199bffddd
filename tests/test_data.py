import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data

HALF = data.ChannelStats((0.5,) * 3, (0.25,) * 3)
CPU = torch.device("cpu")
CHANGES = {"flip": "random", "translate": 2, "cutout": 6}


@pytest.fixture
def split(sample):
    images = torch.from_numpy(sample["train_images"])
    return data.Split(images, torch.arange(len(images)))  # labels that name the image


def batches(split, batch_size=48, seed=0, flip="none", translate=0, cutout=0, **options):
    changes = data.Augmentation(flip, translate, cutout)
    return data.TrainBatches(split, HALF, batch_size, augmentation=changes, seed=seed, **options)


ALONE = """
import sys; sys.path.insert(0, "."); import data, numpy, torch
images = numpy.random.default_rng(0).integers(0, 256, (40, 24, 20, 3), numpy.uint8)
labels = numpy.arange(40) % 4
arrays = data.Arrays(tuple("abcd"), images, labels, images[:8], labels[:8])
splits = data.make_splits(arrays, val_fraction=0.2, limit=None, seed=0, device=torch.device("cpu"))
changes = data.Augmentation("random", 2, 4)
batches = data.TrainBatches(splits.train, splits.stats, 10, augmentation=changes, side=24)
for x, y in batches.epoch(0):
    assert (x.shape, len(y), x.std() > 0.5) == ((8, 3, 24, 24), 8, True)
assert [len(s.labels) for s in (splits.train, splits.val, splits.test)] == [32, 8, 8]
"""


def test_data_alone_makes_augmented_batches_from_given_arrays(tmp_path):
    shutil.copy(ROOT / "data.py", tmp_path)
    words = [sys.executable, "-I", "-W", "error", "-c", ALONE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_channel_stats_equal_those_of_all_pixels_and_the_known_ones(sample):
    images = sample["train_images"]
    mean, std = data.channel_stats(images)
    pixels = images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)
    # How often each value occurs in each channel of the 50,000 images; the order does not matter.
    counts = np.load(Path(__file__).parent / "histogram.npy")
    channels = [np.repeat(np.arange(256, dtype=np.uint8), row) for row in counts]
    mean, std = data.channel_stats(np.stack(channels, axis=1).reshape(50_000, 32, 32, 3))
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-9)
    np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=5e-9)
    flat = np.full((4, 8, 8, 3), 200, np.uint8)  # one colour: nothing to divide by
    assert data.normalize(torch.from_numpy(flat), data.channel_stats(flat)).isfinite().all()


def test_split_is_stratified_seeded_and_disjoint(sample):
    labels = sample["train_labels"]
    train, val = data.stratified_split(labels, 0.25, seed=3)
    assert sorted([*train, *val]) == list(range(len(labels)))
    for label in range(10):
        assert (labels[val] == label).sum() == round(0.25 * (labels == label).sum())
    assert np.array_equal(val, data.stratified_split(labels, 0.25, seed=3)[1])
    assert not np.array_equal(val, data.stratified_split(labels, 0.25, seed=4)[1])
    train, _ = data.stratified_split(np.array([0, 0, 0, 1]), 0.9, seed=0)
    assert {label > 2 for label in train.tolist()} == {False, True}  # every class keeps one


def test_limit_takes_the_first_images_of_each_split_and_statistics_are_those_of_training(sample):
    arrays = data.Arrays(tuple("abcdefghij"), *sample.values())
    options = {"limit": 30, "seed": 0, "device": CPU}
    splits = data.make_splits(arrays, val_fraction=0.1, **options)
    assert [len(s.labels) for s in splits[2:]] == [30, 30, 30]
    assert np.array_equal(splits.test.images.numpy(), sample["test_images"][:30])
    assert splits.stats == data.channel_stats(splits.train.images.numpy())
    assert data.make_splits(arrays, val_fraction=0.0, **options).val is None
    brought = arrays._replace(val_images=sample["test_images"], val_labels=sample["test_labels"])
    splits = data.make_splits(brought, val_fraction=0.1, **options)
    assert np.array_equal(splits.train.images.numpy(), sample["train_images"][:30])
    assert np.array_equal(splits.val.images.numpy(), sample["test_images"][:30])


def test_arrays_that_memory_holds_but_once_are_not_copied(sample):
    """They may lie in a file because a second time they would not fit."""
    brought = data.Arrays(
        ("cat", "dog"),
        *(
            sample[f"{split}_{kind}"]
            for split in ("train", "test")
            for kind in ("images", "labels")
        ),
        val_images=sample["test_images"],
        val_labels=sample["test_labels"],
    )
    splits = data.make_splits(brought, val_fraction=0.1, limit=None, seed=0, device=CPU)
    assert np.shares_memory(splits.train.images.numpy(), brought.train_images)
    assert np.shares_memory(splits.val.images.numpy(), brought.val_images)


@pytest.mark.parametrize("limit", [4, 10, 12, 20])
def test_a_limit_leaves_no_class_out_that_could_be_there(sample, limit):
    arrays = data.Arrays(tuple("abcdefghij"), *sample.values())
    splits = data.make_splits(arrays, val_fraction=0.1, limit=limit, seed=0, device=CPU)
    for split in splits[2:]:
        assert len(split.labels) == limit
        assert len(split.labels.unique()) == min(limit, 10)


@pytest.mark.parametrize("batch_size", [7, 48, 319, 320])
def test_every_image_is_seen_exactly_once_an_epoch_in_batches_of_one_size(split, batch_size):
    loader = batches(split, batch_size)
    seen = [labels for _, labels in loader.epoch(0)]
    assert torch.equal(torch.cat(seen).sort().values, split.labels)
    sizes = {len(labels) for labels in seen}
    assert max(sizes) <= min(batch_size, min(sizes) + 1)
    assert len(seen) == loader.num_steps


def test_batches_depend_on_seed_epoch_and_step_alone_and_parts_of_processes_make_them_up(split):
    loader = batches(split, **CHANGES)
    list(loader.epoch(0))  # what ran before must not matter
    whole = list(loader.epoch(4))
    parts = [batches(split, **CHANGES, part=(rank, 3)).epoch(4) for rank in range(3)]
    joined = [tuple(map(torch.cat, zip(*those, strict=True))) for those in zip(*parts, strict=True)]
    for given, first in ((batches(split, **CHANGES).epoch(4, first_step=3), 3), (joined, 0)):
        for (x, labels), (other, others) in zip(given, whole[first:], strict=True):
            assert torch.equal(x, other)
            assert torch.equal(labels, others)
    assert not torch.equal(next(loader.epoch(5))[1], whole[0][1])
    assert not torch.equal(next(batches(split, seed=1).epoch(4))[1], whole[0][1])


def test_small_images_come_first_and_the_share_of_the_work_rises_to_one(split):
    plan = {"resizing": ((0.3, 16), (0.6, 24)), "num_epochs": 2}
    loader = batches(split, 32, **plan)  # 2 epochs of 10 steps
    sides = [x.shape[2] for epoch in (0, 1) for x, _ in loader.epoch(epoch)]
    assert sides == [16] * 6 + [24] * 6 + [32] * 8
    entered = next(batches(split, 32, **plan).epoch(1, first_step=1))[0]
    assert torch.equal(entered, list(loader.epoch(1))[1][0])
    shares = [loader.share_done(epoch, step) for epoch in (0, 1) for step in range(10)]
    shares.append(loader.share_done(2, 0))
    np.testing.assert_allclose(np.diff(shares), np.square(sides) / np.square(sides).sum())
    assert (shares[0], shares[-1]) == (0, pytest.approx(1))


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs(split):
    loader = batches(split, flip="alternating")
    plain = data.normalize(split.images, HALF)

    def mirrored(epoch):
        flags = torch.zeros(len(plain), dtype=torch.bool)
        for x, labels in loader.epoch(epoch):
            flags[labels] = (x == plain[labels].flip(3)).flatten(1).all(1)
            upright = (x == plain[labels]).flatten(1).all(1)
            assert (flags[labels] ^ upright).all()
        return flags

    first, second = mirrored(0), mirrored(1)
    assert 0.35 < first.float().mean() < 0.65
    assert torch.equal(second, ~first)
    assert torch.equal(mirrored(2), first)


def test_translation_agrees_with_cropping_a_reflected_border(split):
    shifts = torch.tensor([[dy, dx] for dy in (-2, 0, 2) for dx in (-2, 1)])
    chosen, images = torch.arange(len(shifts)) * 5, split.images[:, :, :20]  # not square
    moved = data.gather(images, chosen, torch.zeros(len(chosen), dtype=torch.bool), shifts)
    for index, (dy, dx), image in zip(chosen, shifts.tolist(), moved, strict=True):
        padded = np.pad(images[index].numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
        assert np.array_equal(image.numpy(), padded[2 - dy : 34 - dy, 2 - dx : 22 - dx])


def test_cutout_blanks_one_square_to_the_mean():
    x = torch.ones(2, 3, 32, 32)
    data.erase(x, torch.tensor([[-3, 4], [10, 30]]), side=8)
    assert (x == 0).sum((1, 2, 3)).tolist() == [3 * 5 * 8, 3 * 8 * 2]
    assert (x[0, :, :5, 4:12] == 0).all()


@pytest.mark.parametrize("stored", [32, 96])
def test_translation_and_cutout_take_the_same_share_of_images_of_all_sizes(stored):
    rows = torch.arange(stored, dtype=torch.uint8)[None, :, None, None]
    images = rows.expand(200, stored, stored, 3) + 100
    split = data.Split(images, torch.arange(200))
    stats = data.ChannelStats((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    moved = data.TrainBatches(split, stats, 200, augmentation=data.Augmentation(translate=2))
    x, _ = next(moved.epoch(0))
    middle = 255 * x[:, 0, stored // 2, 0] - 100 - stored // 2  # by how far each image has moved
    assert (middle.min().round(), middle.max().round()) == (-stored // 16, stored // 16)
    blanked = data.TrainBatches(split, stats, 200, augmentation=data.Augmentation(cutout=8))
    x, _ = next(blanked.epoch(0))
    assert (x[:, 0] == 0).flatten(1).sum(1).max() == (stored // 4) ** 2


def test_inputs_are_normalised_whole_and_fewer_at_a_time_where_they_are_large(split):
    stats = data.channel_stats(split.images.numpy())
    plain = torch.cat(list(data.inputs(split.images, stats, 32)))
    assert torch.equal(plain, data.normalize(split.images, stats))
    assert plain.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    parts = list(data.inputs(split.images, stats, 64, batch_size=100))
    assert [len(part) for part in parts] == [25] * 12 + [20]
    assert (data.resize(torch.cat(parts), 32) - plain).abs().mean() < 0.1
