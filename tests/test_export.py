import importlib.util
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image

import models
import pretrained
from storage import checkpoint, outputs

OWN = ROOT / "checkpoints/custom_cnn-modern.pt"
SAMPLES = sorted((ROOT / "tests/samples").glob("*.png"))


def fine_tuned(arch, side, classes):
    """A checkpoint as finetune.py leaves it, of random weights that tell the samples apart."""
    torch.manual_seed(0)
    network = models.create_model(arch, {"image_size": side}, len(classes))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    x = torch.from_numpy(squares(side)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        network.train()(x)
        network.classifier.weight.mul_(2 / network.eval()(x).std())
    content = {
        "name": arch,
        "arch": arch,
        "surgery": {"image_size": side},
        "image_size": side,
        "classes": classes,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "config": {"pictures": "photos"},
        "data": {"image_shape": [48, 48]},
        "metrics": {"temperature": None},
        "environment": {},
        "state_dict": network.state_dict(),
    }
    return content, network


def exported(path):
    """An exported file as a function from uint8 pictures to probabilities, and its metadata."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        return lambda images: session.run(None, {"images": images})[0], metadata
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    metadata = json.loads(extra["metadata.json"])
    return lambda images: program(torch.from_numpy(images)).detach().numpy(), metadata


def squares(side):
    """The sample pictures (N, side, side, 3) uint8."""
    resized = [Image.open(file).convert("RGB").resize((side, side)) for file in SAMPLES]
    return np.stack([np.array(picture) for picture in resized])


@pytest.mark.parametrize(
    ("arch", "ending"),
    [
        ("custom_cnn", ".onnx"),
        ("custom_cnn", ".pt2"),
        ("resnet18", ".pt2"),
        ("mobilenet_v3_small", ".onnx"),
    ],
)
def test_an_exported_network_says_what_predict_says(run, workplace, arch, ending):
    path = OWN
    side = 32
    if arch != "custom_cnn":
        path = workplace / f"{arch}.pt"
        content, _ = fine_tuned(arch, 64, ["cat", "Ärger, 猫", "ship"])
        checkpoint.save(path, content)
        side = 48
    file = workplace / f"network{ending}"
    assert run("evaluate", path, "--export", file).code == 0
    outputs.check("--export", file, (ending,))  # it may be replaced
    ask, metadata = exported(file)
    classes = checkpoint.load(path)["classes"]
    assert json.loads(metadata["classes"]) == classes
    assert (metadata["side"], metadata["views"]) == (str(side), "none")
    assert ("temperature" in metadata["calibration"]) == (arch == "custom_cnn")

    table = workplace / "p.csv"
    for image, name in zip(squares(side), SAMPLES, strict=True):
        Image.fromarray(image).save(workplace / name.name)
    wanted = "--predict", "*.png", "--tta", "none", "--predictions", table
    assert run("evaluate", path, *wanted).code == 0
    lines = table.read_text().splitlines()[1:]
    expected = [[float(cell) for cell in line.split(",")[4:]] for line in lines]
    assert np.abs(ask(squares(side)) - expected).max() < 1e-4
    assert np.ptp(expected, axis=0).max() > 0.2  # the pictures are told apart

    model = checkpoint.load_model(path)
    for other in (20, 64, 65, 150):  # enlarged, as they are, antialiased
        images = squares(other)[:3]
        with torch.inference_mode():
            logits = model(torch.from_numpy(images))
        temperature = checkpoint.load(path)["metrics"]["temperature"] or 1
        assert np.abs(ask(images) - (logits / temperature).softmax(1).numpy()).max() < 1e-4


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    refused, workplace, monkeypatch
):
    before = sorted(workplace.rglob("*"))
    assert "must be .onnx or .pt2" in refused("evaluate", OWN, "--export", "a.tflite")
    assert "leave --tta out" in refused("evaluate", OWN, "--export", "a.onnx", "--tta", "flip")
    assert "takes one checkpoint" in refused("evaluate", OWN, OWN, "--export", "a.onnx")
    installed = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else installed(name)
    )
    assert "`pip install onnx`" in refused("evaluate", OWN, "--export", "a.onnx")
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("arch", "last"), [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3")]
)
def test_fine_tuned_weights_open_in_torchvisions_own_class(tmp_path, arch, last):
    content, network = fine_tuned(arch, 64, ["cat", "dog", "ship"])
    checkpoint.save(tmp_path / "a.pt", content)

    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    model = getattr(torchvision.models, arch)()
    classifier = torch.nn.Linear(pretrained.ARCHS[arch].features, len(saved["classes"]))
    model.set_submodule(last, torch.nn.Sequential(torch.nn.Dropout(), classifier))
    weights = {key.removeprefix("network."): value for key, value in saved["state_dict"].items()}
    model.load_state_dict(weights)

    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), network.eval()(x))
