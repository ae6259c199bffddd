"""ImageNet networks of torchvision and what is done to them to learn from small pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHS`: a pretrained network, by torchvision's name, and what is done to it.

    Attributes:
        head: the module that is replaced by a new classifier; its input is `features` wide.
        features: see `head`.
        stages: the trunk from input to output, each stage as its modules' names in order; what
            follows the last of them, pooling and classifier, is the head stage.
        edits: modules to replace, by name.
        opened: attributes to set where the early strides are opened for 32x32 input.
    """

    head: str
    features: int
    stages: Mapping[str, tuple[str, ...]]
    edits: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)


def _span(prefix: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{index}" for index in range(start, stop))


_RESNET = {
    "head": "fc",
    "stages": {
        "stem": ("conv1", "bn1", "relu", "maxpool"),
        **{f"layer{number}": (f"layer{number}",) for number in range(1, 5)},
    },
    "opened": {"conv1.stride": (1, 1), "maxpool": nn.Identity()},
}
WEIGHTS = "IMAGENET1K_V1"  # of torchvision, for every row below
ARCHS = {
    "vgg19": Architecture(
        head="classifier",  # three layers for 7x7 maps, which small pictures do not leave
        features=512,
        stages={
            f"block{number}": _span("features", *span)
            for number, span in enumerate(((0, 5), (5, 10), (10, 19), (19, 28), (28, 37)), 1)
        },
        edits={"features.36": nn.Identity, "avgpool": lambda: nn.AdaptiveAvgPool2d(1)},
    ),
    "resnet18": Architecture(features=512, **_RESNET),
    "resnet50": Architecture(features=2048, **_RESNET),
    "mobilenet_v3_small": Architecture(
        head="classifier.3",
        features=1024,
        stages={
            "stem": ("features.0",),
            "blocks16": _span("features", 1, 2),
            "blocks8": _span("features", 2, 4),
            "blocks4": _span("features", 4, 9),
            "blocks2": _span("features", 9, 13),
        },
        edits={"classifier.2": nn.Identity},  # its dropout; ours stands before the last layer too
        opened={"features.0.0.stride": (1, 1), "features.1.block.0.0.stride": (1, 1)},
    ),
}


class OperatedNetwork(nn.Module):
    """A torchvision network with its surgery: edits, a new classifier, an opened stem.

    Args:
        arch: a key of `ARCHS`.
        image_size: side of the input it is meant for, pixels; 32x32 images are enlarged before.
        open_stem: undo the early strides instead, for input that is not enlarged.
        dropout: share of the classifier's inputs that training leaves out.
        num_classes: width of the new classifier.
    """

    def __init__(
        self,
        arch: str,
        image_size: int = 64,
        open_stem: bool = False,
        dropout: float = 0.0,
        num_classes: int = 10,
    ):
        super().__init__()
        if not 16 <= image_size <= 512:
            raise ValueError(f"image size {image_size}: must be 16 to 512 pixels")
        self.row = ARCHS[arch]
        self.network = torchvision.models.get_model(arch, weights=None)
        for name, make in self.row.edits.items():
            self.network.set_submodule(name, make())
        for name, value in self.row.opened.items() if open_stem else ():
            owner, _, attribute = name.rpartition(".")
            setattr(self.network.get_submodule(owner), attribute, value)
        classifier = nn.Linear(self.row.features, num_classes)
        self.network.set_submodule(self.row.head, nn.Sequential(nn.Dropout(dropout), classifier))

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, S, S) to logits (B, num_classes)."""
        return self.network(x)

    def stages(self) -> dict[str, nn.Sequential]:
        """The network as stages in order, head last; they share its modules.

        Applying all of them, one after the other, gives what `forward` gives.
        """
        modules = {**dict(self.network.named_modules()), "flatten": nn.Flatten()}
        stages = {**self.row.stages, "head": ("avgpool", "flatten", self.row.head.split(".")[0])}
        return {k: nn.Sequential(*(modules[name] for name in v)) for k, v in stages.items()}

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads ImageNet weights; the layer they may hold in the new one's place is left out.

        A file may also hold the trunk alone; layers before the new one then keep random weights.

        Raises:
            ValueError: another tensor is missing or does not belong here.
            RuntimeError: one has another shape.
        """
        head = self.row.head + "."
        top = head.split(".")[0] + "."
        if not any(key.startswith(top) for key in state):
            head = top
        given = {key: value for key, value in state.items() if not key.startswith(head)}
        missing, unknown = self.network.load_state_dict(given, strict=False)
        # Files from before 2017 lack BatchNorm's counters, which nothing here reads.
        missing = [k for k in missing if not (k.startswith(head) or k.endswith("batches_tracked"))]
        for kind, keys in (("lack", missing), ("hold the unknown", unknown)):
            if keys:
                raise ValueError(f"the weights {kind} {keys[0]!r} ({len(keys)} such tensors)")


def freeze(model: OperatedNetwork, unfreeze: str) -> tuple[nn.Sequential | None, nn.Sequential]:
    """Freezes the trunk's stages that `unfreeze` does not name.

    Args:
        model: changed in place.
        unfreeze: "head" trains the classifier, "last" the last stage too, "most" all but the first
            two, whose filters are general and whose large maps take most of the time, "all" all.

    Returns:
        The frozen trunk (None with "all") and the part that trains; both share the modules.
    """
    *stages, head = model.stages().values()
    if unfreeze == "head":  # the trunk ends in pooled features: to keep them takes little memory
        trunk, tail = [*stages, head[:-1]], [head[-1]]
    else:
        cut = {"last": -1, "most": 2, "all": 0}[unfreeze]
        trunk, tail = stages[:cut], [*stages[cut:], head]
    for stage in trunk:
        stage.requires_grad_(False)
    return nn.Sequential(*trunk) if trunk else None, nn.Sequential(*tail)
