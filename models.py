"""The networks: the nine-layer CNN, and ImageNet networks operated on for small pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Whitening(nn.Module):
    """Rotates and scales the input's patches so that their values are uncorrelated; never trains.

    It is to patches what the division by the standard deviation is to channels: measured on the
    training images (`initialization.whiten`) and kept with the checkpoint. Until it is measured,
    the patches come out as they are.

    Args:
        side: of the square patches, pixels.
    """

    def __init__(self, side: int):
        super().__init__()
        # Both signs of each direction: the activation that follows would lose half of one.
        directions = torch.eye(3 * side**2).reshape(-1, 3, side, side)
        self.register_buffer("filters", torch.cat([directions, -directions]))

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to (B, 6 side^2, H - side + 1, W - side + 1)."""
        return F.conv2d(x, self.filters)


class CustomCNN(nn.Module):
    """Nine layers: six 3x3 convolutions in three pairs, BatchNorm after each, then three linear.

    The defaults are the tutorial shape: each pair doubles the width and ends in a 2x2 max-pool.
    What counts on a CPU is accuracy per multiplication, and nearly all multiplications are in the
    convolutions, so the `modern` recipe pools earlier and spends them on width: see `MODERN`. The
    last map is reduced by a global max-pool, which keeps the linear layers small: a flattened
    4x4 map would put half of all parameters into the first of them.

    Args:
        widths: output channels of the six convolutions.
        pool_after: the convolutions, counted from 1, that a 2x2 max-pool follows (before BatchNorm,
            so that normalisation and activation see a quarter of the values).
        hidden: widths of the first two linear layers.
        num_classes: width of the third.
        activation: "relu" or "gelu".
        whitened: side of the patches that a fixed layer, with an activation of its own, whitens
            before the nine layers; 0 for none.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128),
        pool_after: tuple[int, ...] = (2, 4, 6),
        hidden: tuple[int, int] = (256, 128),
        num_classes: int = 10,
        activation: str = "relu",
        whitened: int = 0,
    ):
        super().__init__()
        act = ACTIVATIONS[activation]
        layers: list[nn.Module] = [Whitening(whitened), act()] if whitened else []
        channels = 6 * whitened**2 if whitened else 3
        for number, width in enumerate(widths, start=1):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            channels = width
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width), act()]
        self.features = nn.Sequential(*layers)  # (B, 3, 32, 32) -> (B, widths[-1], 4, 4)
        self.pool = nn.AdaptiveMaxPool2d(1)  # -> (B, widths[-1], 1, 1)
        first, second = hidden
        self.head = nn.Sequential(
            nn.Linear(widths[-1], first, bias=False),
            nn.BatchNorm1d(first),
            act(),
            nn.Linear(first, second, bias=False),
            nn.BatchNorm1d(second),
            act(),
            nn.Linear(second, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, 32, 32) to logits (B, num_classes)."""
        return self.head(self.pool(self.features(x)).flatten(1))


# The pool stands early in each pair: the wide convolutions see maps of 15, 7, 7 and 3 pixels, the
# widest the smallest. That makes 143 million multiplications an image, 3.7 times the tutorial
# shape's, for a far better network. A 2x2 colour patch has twelve directions: 24 channels.
MODERN = {
    "widths": (64, 64, 256, 256, 384, 512),
    "pool_after": (1, 3, 5),
    "activation": "gelu",
    "whitened": 2,
}
# The same shape with 1.7 times the multiplications, 240 million an image: the `best` recipe's.
WIDE = MODERN | {"widths": (96, 96, 320, 320, 512, 512)}


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHS`: one pretrained network and what is done to it.

    Attributes:
        build: torchvision's function.
        head: the module that is replaced by a new classifier; its input is `features` wide.
        features: see `head`.
        stages: the trunk from input to output, each stage as its modules' names in order; what
            follows the last of them, pooling and classifier, is the head stage.
        tail: the modules between the last stage and the end, with "flatten" for the reshaping.
        edits: modules to replace, by name.
        opened: attributes to set where the early strides are opened for 32x32 input.
        image_size: default side of the input in pixels; the 32x32 images are upsampled to it.
    """

    build: Callable[..., nn.Module]
    head: str
    features: int
    stages: Mapping[str, tuple[str, ...]]
    tail: tuple[str, ...]
    edits: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 64


def _span(prefix: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{index}" for index in range(start, stop))


_RESNET = {
    "head": "fc",
    "stages": {
        "stem": ("conv1", "bn1", "relu", "maxpool"),
        **{f"layer{number}": (f"layer{number}",) for number in range(1, 5)},
    },
    "tail": ("avgpool", "flatten", "fc"),
    "opened": {"conv1.stride": (1, 1), "maxpool": nn.Identity()},
}
WEIGHTS = "IMAGENET1K_V1"  # of torchvision, for every row below
ARCHS = {
    "vgg19": Architecture(
        torchvision.models.vgg19,
        head="classifier",  # three layers for 7x7 maps, which small pictures do not leave
        features=512,
        stages={
            f"block{number}": _span("features", *span)
            for number, span in enumerate(((0, 5), (5, 10), (10, 19), (19, 28), (28, 37)), 1)
        },
        tail=("avgpool", "flatten", "classifier"),
        edits={"features.36": nn.Identity, "avgpool": lambda: nn.AdaptiveAvgPool2d(1)},
    ),
    "resnet18": Architecture(torchvision.models.resnet18, features=512, image_size=80, **_RESNET),
    "resnet50": Architecture(torchvision.models.resnet50, features=2048, image_size=80, **_RESNET),
    "mobilenet_v3_small": Architecture(
        torchvision.models.mobilenet_v3_small,
        head="classifier.3",
        features=1024,
        stages={
            "stem": ("features.0",),
            "blocks16": _span("features", 1, 2),
            "blocks8": _span("features", 2, 4),
            "blocks4": _span("features", 4, 9),
            "blocks2": _span("features", 9, 13),
        },
        tail=("avgpool", "flatten", "classifier"),
        edits={"classifier.2": nn.Identity},  # its dropout; ours stands before the last layer too
        opened={"features.0.0.stride": (1, 1), "features.1.block.0.0.stride": (1, 1)},
    ),
}


class OperatedNetwork(nn.Module):
    """A torchvision network with its surgery: bilinear upsampling, edits, a new classifier.

    Args:
        arch: a key of `ARCHS`.
        image_size: side to which the input is upsampled on the device, pixels.
        open_stem: undo the early strides instead, for input that is not upsampled.
        dropout: share of the classifier's inputs that training leaves out.
        num_classes: width of the new classifier.
    """

    def __init__(
        self,
        arch: str,
        image_size: int,
        open_stem: bool = False,
        dropout: float = 0.0,
        num_classes: int = 10,
    ):
        super().__init__()
        if not 32 <= image_size <= 512:
            raise ValueError(f"image size {image_size}: must be 32 to 512 pixels")
        self.row, self.image_size = ARCHS[arch], image_size
        self.network = self.row.build(weights=None)
        self.resize = nn.Upsample(image_size, mode="bilinear", align_corners=False)
        for name, make in self.row.edits.items():
            self.network.set_submodule(name, make())
        for name, value in self.row.opened.items() if open_stem else ():
            owner, _, attribute = name.rpartition(".")
            setattr(self.network.get_submodule(owner), attribute, value)
        classifier = nn.Linear(self.row.features, num_classes)
        self.network.set_submodule(self.row.head, nn.Sequential(nn.Dropout(dropout), classifier))

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, 32, 32) to logits (B, num_classes)."""
        return self.network(self.resize(x))

    def stages(self) -> dict[str, nn.Sequential]:
        """The network as stages in order, head last; they share its modules.

        Applying all of them, one after the other, gives what `forward` gives.
        """
        parts = {
            name: nn.Sequential(*map(self.network.get_submodule, names))
            for name, names in self.row.stages.items()
        }
        first = next(iter(parts))
        parts[first] = nn.Sequential(self.resize, *parts[first])
        parts["head"] = nn.Sequential(
            *(
                nn.Flatten() if name == "flatten" else self.network.get_submodule(name)
                for name in self.row.tail
            )
        )
        return parts

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads ImageNet weights; the layer they may hold in the new one's place is left out.

        A file may also hold the trunk alone; layers before the new one then keep random weights.

        Raises:
            ValueError: another tensor is missing, has another shape or does not belong here.
        """
        head = self.row.head + "."
        top = head.split(".")[0] + "."
        if not any(key.startswith(top) for key in state):
            head = top
        own = {k: v for k, v in self.network.state_dict().items() if not k.startswith(head)}
        given = {k: v for k, v in state.items() if not k.startswith(head)}
        # Files from before 2017 lack the counters, which nothing here reads.
        missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
        for kind, keys in (("lack", missing), ("hold the unknown", sorted(given.keys() - own))):
            if keys:
                raise ValueError(f"the weights {kind} {keys[0]!r} ({len(keys)} such tensors)")
        for key, value in given.items():
            if value.shape != own[key].shape:
                shapes = f"{tuple(value.shape)}, needed is {tuple(own[key].shape)}"
                raise ValueError(f"the weights' {key!r} has shape {shapes}")
            if not value.isfinite().all():
                raise ValueError(f"the weights' {key!r} holds numbers that are not finite")
        self.network.load_state_dict(given, strict=False)


def freeze(model: OperatedNetwork, unfreeze: str) -> tuple[nn.Sequential | None, nn.Sequential]:
    """Freezes the trunk's stages that `unfreeze` does not name.

    Args:
        model: changed in place.
        unfreeze: "head" trains the classifier, "last" the last stage too, "all" everything.

    Returns:
        The frozen trunk (None with "all") and the part that trains; both share the modules.
    """
    *stages, head = model.stages().values()
    if unfreeze == "head":  # the trunk ends in pooled features: to keep them takes little memory
        trunk, tail = [*stages, head[:-1]], [head[-1]]
    else:
        cut = {"last": -1, "all": 0}[unfreeze]
        trunk, tail = stages[:cut], [*stages[cut:], head]
    for stage in trunk:
        stage.requires_grad_(False)
    return nn.Sequential(*trunk) if trunk else None, nn.Sequential(*tail)


def create_model(arch: str, surgery: dict[str, Any]) -> nn.Module:
    """Builds a network with random weights from what a checkpoint says of it.

    Args:
        arch: "custom_cnn" or a key of `ARCHS`.
        surgery: keyword arguments of `CustomCNN` or `OperatedNetwork`.

    Raises:
        ValueError: the architecture or one of the settings is unknown.
    """
    try:
        if arch == "custom_cnn":
            return CustomCNN(**surgery)
        if arch in ARCHS:
            return OperatedNetwork(arch, **surgery)
    except (TypeError, LookupError, ValueError, RuntimeError) as error:
        raise ValueError(f"settings {surgery} do not fit architecture {arch}: {error}") from error
    raise ValueError(f"architecture {arch!r} is unknown: choose custom_cnn or {', '.join(ARCHS)}")


def num_parameters(model: nn.Module) -> dict[str, int]:
    """Counts parameters: all of them, and those that train."""
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
