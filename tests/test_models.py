import pytest
import torch
from torch import nn

import data
import models


@pytest.mark.parametrize("surgery", [{}, models.MODERN])
def test_custom_cnn_has_six_padded_convolutions_with_batchnorm_and_three_linear_layers(surgery):
    model = models.create_model("custom_cnn", surgery)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size, c.padding) for c in convs] == [((3, 3), (1, 1))] * 6
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 6
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 3
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_parameter_counts():
    counts = [
        models.num_parameters(models.create_model("custom_cnn", surgery))["total"]
        for surgery in ({}, models.MODERN)
    ]
    assert counts == [355_050, 2_052_136]


def test_first_convolution_whitens_real_patches_and_is_frozen(sample):
    images = torch.from_numpy(sample["train_images"])
    x = data.normalize(images, *data.channel_stats(sample["train_images"]))
    model = models.create_model("custom_cnn", models.MODERN)
    models.initialize_from_images(model, x, eps=0.0)
    first = model.features[0]
    assert not first.weight.requires_grad
    responses = nn.functional.conv2d(x, first.weight[:27]).permute(1, 0, 2, 3).reshape(27, -1)
    covariance = responses @ responses.T / responses.shape[1]
    torch.testing.assert_close(covariance, torch.eye(27), atol=2e-2, rtol=0)
    assert torch.equal(first.weight[27:], -first.weight[:27])


def test_dirac_initialisation_passes_channels_through(sample):
    model = models.create_model("custom_cnn", models.MODERN)
    x = data.normalize(torch.from_numpy(sample["train_images"][:64]), [0.5] * 3, [0.25] * 3)
    models.initialize_from_images(model, x)
    second = model.features[4]
    features = torch.randn(1, 54, 8, 8)
    torch.testing.assert_close(second(features)[:, :54], features)


def test_unknown_architecture_and_settings_are_refused():
    with pytest.raises(ValueError, match="'resnet19' is unknown"):
        models.create_model("resnet19", {})
    with pytest.raises(ValueError, match="do not fit"):
        models.create_model("custom_cnn", {"depth": 3})
