from pathlib import Path

import numpy as np
import pytest
import torch

import data
import downloads


@pytest.fixture
def split(sample):
    return data.Split(
        torch.from_numpy(sample["train_images"]),
        torch.arange(len(sample["train_images"])),  # labels that name the image
    )


def batches(split, batch_size=48, seed=0, **augmentation):
    return data.TrainBatches(
        split, batch_size, [0.5] * 3, [0.25] * 3, data.Augmentation(**augmentation), seed
    )


def test_channel_stats_equal_those_of_all_pixels(sample):
    images = sample["train_images"]
    mean, std = data.channel_stats(images)
    pixels = images.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-9)


def test_channel_stats_of_the_whole_training_set_are_the_known_ones():
    # How often each value occurs in each channel of the 50,000 images; the order does not matter.
    counts = np.load(Path(__file__).parent / "histogram.npy")
    channels = [np.repeat(np.arange(256, dtype=np.uint8), row) for row in counts]
    images = np.stack(channels, axis=1).reshape(50_000, 32, 32, 3)
    mean, std = data.channel_stats(images)
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=5e-9)
    np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=5e-9)


def test_split_is_stratified_seeded_and_disjoint(sample):
    labels = sample["train_labels"]
    train, val = data.stratified_split(labels, 0.25, seed=3)
    assert sorted([*train, *val]) == list(range(len(labels)))
    for label in range(10):
        assert (labels[val] == label).sum() == round(0.25 * (labels == label).sum())
    assert np.array_equal(val, data.stratified_split(labels, 0.25, seed=3)[1])
    assert not np.array_equal(val, data.stratified_split(labels, 0.25, seed=4)[1])


@pytest.mark.parametrize("batch_size", [7, 48, 319, 320])
def test_every_image_is_seen_exactly_once_an_epoch(split, batch_size):
    loader = batches(split, batch_size)
    seen = [labels for _, labels in loader.epoch(0)]
    assert len(seen) == loader.num_steps
    assert torch.equal(torch.cat(seen).sort().values, split.labels)
    sizes = [len(labels) for labels in seen]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_batches_depend_on_seed_epoch_and_step_alone(split):
    options = {"flip": "random", "translate": 2, "cutout": 6}
    loader = batches(split, **options)
    list(loader.epoch(0))  # what ran before must not matter
    whole = list(loader.epoch(4))
    entered = list(batches(split, **options).epoch(4, first_step=3))
    assert len(entered) == len(whole) - 3
    for (x, labels), (other, other_labels) in zip(entered, whole[3:], strict=True):
        assert torch.equal(x, other)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(next(loader.epoch(5))[1], whole[0][1])
    assert not torch.equal(next(batches(split, seed=1).epoch(4))[1], whole[0][1])


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs(split):
    loader = batches(split, flip="alternating")
    plain = data.normalize(split.images, loader.mean, loader.std)

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
    chosen = torch.arange(len(shifts)) * 5
    moved = data.gather(split.images, chosen, torch.zeros(len(chosen), dtype=torch.bool), shifts)
    for index, (dy, dx), image in zip(chosen, shifts.tolist(), moved, strict=True):
        padded = np.pad(split.images[index].numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
        expected = padded[2 - dy : 34 - dy, 2 - dx : 34 - dx]
        assert np.array_equal(image.numpy(), expected)


def test_cutout_blanks_one_square_to_the_mean(split):
    x = torch.ones(2, 3, 32, 32)
    data.erase(x, torch.tensor([[-3, 4], [10, 30]]), side=8)
    assert (x[0] == 0).sum() == 3 * 5 * 8
    assert (x[1] == 0).sum() == 3 * 8 * 2
    assert (x[0, :, :5, 4:12] == 0).all()


def test_normalised_batches_are_channels_last_and_invertible(split):
    mean, std = data.channel_stats(split.images.numpy())
    x = data.normalize(split.images, mean, std)
    assert x.shape == (320, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_limit_takes_the_first_images_of_each_split(workplace):
    splits = data.load_splits(
        workplace / "data", val_fraction=0.1, limit=20, seed=0, device=torch.device("cpu")
    )
    assert [len(s.labels) for s in (splits.train, splits.val, splits.test)] == [20, 20, 20]
    arrays = downloads.cifar10(workplace / "data")
    assert np.array_equal(splits.test.images.numpy(), arrays.test_images[:20])
