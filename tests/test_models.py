import numpy as np
import pytest
import torch
from torch import nn

import data
import models
from reports import provenance

NETWORKS = tuple(models.NETWORKS)


@pytest.mark.parametrize("network", NETWORKS)
def test_custom_cnn_has_six_padded_convolutions_with_batchnorm_and_three_linear_layers(network):
    model = models.create_model("custom_cnn", models.NETWORKS[network], num_classes=7)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size, c.padding) for c in convs] == [((3, 3), (1, 1))] * 6
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 6
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 3
    for height, width in ((32, 32), (24, 24), (64, 48)):  # one network for images of any size
        assert model(torch.randn(2, 3, height, width)).shape == (2, 7)


def test_parameter_counts():
    counts = [
        provenance.num_parameters(models.create_model("custom_cnn", arguments, 10))["total"]
        for arguments in models.NETWORKS.values()
    ]
    assert counts == [355_050, 2_235_672, 3_975_704, 5_000_472, 18_346_520]


def normalised(images):
    return data.normalize(torch.from_numpy(images), data.channel_stats(images))


def test_whitening_makes_the_channels_of_real_patches_uncorrelated_and_no_filter_trains(sample):
    x = normalised(sample["train_images"])
    layer = models.Whitening(2, biased=True)
    torch.testing.assert_close(layer(x)[0, 0], x[0, 0, :-1, :-1])  # not measured yet: as they are
    models.whiten(layer, x, eps=0.0)
    white = layer(x)[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(white @ white.T / white.shape[1], torch.eye(12), atol=2e-2, rtol=0)
    assert torch.equal(layer.filters[12:], -layer.filters[:12])
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_tint_does_not_blind_a_network_of_grey_pictures(sample):
    brightness = sample["train_images"].mean(3, keepdims=True).round().astype(np.uint8)
    grey = np.repeat(brightness, 3, axis=3)
    tinted = np.rint((grey * np.array([1.03, 1, 0.97])).clip(max=255)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(-1, 2, grey.shape)
    noisy = np.clip(grey.astype(int) + noise, 0, 255).astype(np.uint8)
    for seen in (grey, noisy):
        torch.manual_seed(0)
        model = models.create_model("custom_cnn", models.NETWORKS["slim"], 10)
        stats = data.channel_stats(seen)
        models.begin_from_images(model, data.normalize(torch.from_numpy(seen), stats))
        gains = model.features[0].filters[:12].flatten(1).norm(dim=1)
        assert gains.max() < 5  # of what occurs: 0.3 to 4; without a bound 45 and 38
        model.eval()
        with torch.no_grad():
            plain, moved = (
                model(data.normalize(torch.from_numpy(images[:50]), stats))
                for images in (grey, tinted)
            )
        assert (moved - plain).norm() < 0.1 * (plain - plain.mean(0)).norm()


def test_layers_begin_by_passing_their_input_through(sample):
    model = models.create_model("custom_cnn", models.NETWORKS["wide"], 10)
    x = normalised(sample["train_images"][:64])
    models.begin_from_images(model, x)
    whitening, *convs = (m for m in model.features if isinstance(m, models.Whitening | nn.Conv2d))
    fitted = models.Whitening(2)
    models.whiten(fitted, x)
    assert torch.equal(whitening.filters, fitted.filters)
    for conv in convs:
        features = torch.randn(1, conv.in_channels, 8, 8)
        torch.testing.assert_close(conv(features)[:, : conv.in_channels], features)
    pooled = torch.randn(2, model.classifier.in_features)
    assert torch.equal(model.head[0](pooled), pooled)  # adds nothing yet
    counts = provenance.num_parameters(model)  # all but BatchNorm's scales train
    scales = sum(m.weight.numel() for m in model.modules() if "BatchNorm" in type(m).__name__)
    assert counts["total"] - counts["trainable"] == scales > 0


def test_unknown_architecture_and_arguments_are_refused():
    with pytest.raises(ValueError, match="'resnet19' is unknown"):
        models.create_model("resnet19", {}, 10)
    with pytest.raises(ValueError, match="do not fit"):
        models.create_model("custom_cnn", {"depth": 3}, 10)
