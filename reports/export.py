"""A trained network as a file for other programs: pictures in, probabilities out."""

import io
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from storage.files import write_atomically
from storage.outputs import EXPORT_METADATA


class Probabilities(nn.Module):
    """A trained network from pictures as they are to probabilities, each picture as it is.

    It says what `evaluate.py --predict --tta none` says.

    Args:
        network: in eval mode, from normalised images (B, 3, side, side) to logits.
        stats: mean and standard deviation that the network expects, of channels in [0, 1].
        side: of the network's input, pixels.
        temperature: fitted on the validation split; None where there was none.
    """

    def __init__(
        self, network: nn.Module, stats: data.ChannelStats, side: int, temperature: float | None
    ):
        super().__init__()
        self.network = network
        self.stats = stats
        self.side = side
        self.temperature = 1.0 if temperature is None else temperature

    def forward(self, images: Tensor) -> Tensor:
        """Maps squares (B, H, W, 3) uint8, RGB, of any side, to probabilities (B, C) float32."""
        x = data.normalize(images, self.stats)
        # `data.resize` without its branches, which a file cannot hold for all sides: where images
        # are enlarged the filter against aliasing is as wide as without, and equal sides stay.
        x = F.interpolate(
            x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True
        )
        return (self.network(x) / self.temperature).softmax(1)


class HighestOfMap(nn.Module):
    """What `nn.AdaptiveMaxPool2d(1)` computes; older exporters to ONNX know no such layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, 1, 1)."""
        return x.amax((2, 3), keepdim=True)


def write(path: Path, network: nn.Module, saved: dict[str, Any]) -> None:
    """Writes a network as ONNX or as a program of torch.export, by the ending.

    Input `images` is (N, H, W, 3) uint8, output `probabilities` (N, C) float32; N, H and W are
    free. What else a program must know goes into the file, see `metadata`: in ONNX as its metadata,
    in a .pt2 as the extra file `EXPORT_METADATA`.

    Args:
        path: ends in .onnx, which needs the packages onnx and onnxscript, or in .pt2.
        network: on the CPU; its weights are laid out anew, its last pool is exchanged.
        saved: what its checkpoint says of it.
    """
    stats = data.ChannelStats(tuple(saved["mean"]), tuple(saved["std"]))
    temperature = saved["metrics"].get("temperature")
    side = saved.get("image_size", 32)
    network.to(memory_format=torch.contiguous_format)  # as torch.export.save expects weights
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.AdaptiveMaxPool2d) and module.output_size == 1:
            network.set_submodule(name, HighestOfMap())
    model = Probabilities(network, stats, side, temperature).eval()
    described = metadata(saved)
    example = torch.zeros(2, side + 8, side + 8, 3, dtype=torch.uint8)  # of a side that resizes
    free = {"images": {dim: torch.export.Dim(name) for dim, name in enumerate(("N", "H", "W"))}}
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=free)
    if path.suffix == ".onnx":
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=free,  # the names of the free sizes
            input_names=["images"],
            output_names=["probabilities"],
            external_data=False,
            verbose=False,
        )
        onnx.model.metadata_props.update(described)
        content = onnx.model_proto.SerializeToString()
    else:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={EXPORT_METADATA: json.dumps(described)})
        content = file.getvalue()
    write_atomically(path, content)


def metadata(saved: dict[str, Any]) -> dict[str, str]:
    """What a program must know to use the network, as text.

    Returns:
        `name` of the run; `classes`, a JSON list in the order of the outputs; `side` of the squares
        that pictures were brought to for its training, pixels; `fit`, how they became squares, see
        `sources.pictures.load`; `views`, what the probabilities are averaged over; `calibration`.
    """
    temperature = saved["metrics"].get("temperature")
    calibration = "not calibrated"
    if saved.get("unfinished"):
        calibration = f"not calibrated ({saved['unfinished']})"
    elif temperature is not None:
        calibration = f"temperature {temperature:.4g}, fitted on validation images"
    return {
        "name": saved["name"],
        "classes": json.dumps(saved["classes"]),
        "side": str(stored_side(saved)),
        "fit": saved["config"].get("fit", "crop"),
        "views": "none",
        "calibration": calibration,
    }


def stored_side(saved: dict[str, Any]) -> int:
    """Side of the squares that pictures are brought to before the network resizes them, pixels."""
    return saved.get("data", {}).get("image_shape", [32])[0]
