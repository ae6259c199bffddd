"""ImageNet networks of torchvision and what is changed in them to learn from small pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data import ChannelStats
from errors import UnusableInput

try:
    import torchvision
except (RuntimeError, AttributeError, OSError) as error:  # compiled for another torch
    raise UnusableInput(
        f"the torchvision here does not fit torch {torch.__version__} ({error}): install the pair "
        "that belongs together with `pip install --upgrade torch torchvision`"
    ) from None

WEIGHTS = "IMAGENET1K_V1"  # of torchvision, for every row of `ARCHS`
# What every torchvision network of 2015 to 2021 was trained with
IMAGENET_STATS = ChannelStats(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHS`: a pretrained network, by torchvision's name, and what is changed in it.

    Attributes:
        head: the module that is replaced by a new classifier; its input is `features` wide.
        features: see `head`.
        stages: the backbone from input to output, each stage as its modules' names in order; what
            follows the last of them, pooling and classifier, is the head stage.
        replaced: makers of the modules that take another one's place, by its name.
        opened: attributes to set where the early strides are opened for 32x32 input.
    """

    head: str
    features: int
    stages: Mapping[str, tuple[str, ...]]
    replaced: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)


def _span(prefix: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{index}" for index in range(start, stop))


def _resnet(features: int) -> Architecture:
    return Architecture(
        head="fc",
        features=features,
        stages={
            "stem": ("conv1", "bn1", "relu", "maxpool"),
            "layer1": ("layer1",),
            "layer2": ("layer2",),
            "layer3": ("layer3",),
            "layer4": ("layer4",),
        },
        opened={"conv1.stride": (1, 1), "maxpool": nn.Identity()},
    )


ARCHS = {
    "vgg19": Architecture(
        head="classifier",  # three layers for 7x7 maps, which small pictures do not leave
        features=512,
        stages={
            "block1": _span("features", 0, 5),
            "block2": _span("features", 5, 10),
            "block3": _span("features", 10, 19),
            "block4": _span("features", 19, 28),
            "block5": _span("features", 28, 37),
        },
        replaced={"features.36": nn.Identity, "avgpool": lambda: nn.AdaptiveAvgPool2d(1)},
    ),
    "resnet18": _resnet(features=512),
    "resnet50": _resnet(features=2048),
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
        replaced={"classifier.2": nn.Identity},  # its dropout; ours precedes the last layer too
        opened={"features.0.0.stride": (1, 1), "features.1.block.0.0.stride": (1, 1)},
    ),
}


class PretrainedNetwork(nn.Module):
    """A torchvision network adapted: modules replaced, a new classifier, an opened stem.

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
        self.arch = arch
        self.network = torchvision.models.get_model(arch, weights=None)
        for name, make in self.row.replaced.items():
            self.network.set_submodule(name, make())
        if open_stem:
            for name, value in self.row.opened.items():
                owner, _, attribute = name.rpartition(".")
                setattr(self.network.get_submodule(owner), attribute, value)
        classifier = nn.Linear(self.row.features, num_classes)
        self.network.set_submodule(self.row.head, nn.Sequential(nn.Dropout(dropout), classifier))
        self.classifier_name = f"network.{self.row.head}.1"  # 0 is the dropout

    @property
    def weights_url(self) -> str:
        """Address of torchvision's ImageNet weights."""
        return official_url(self.arch)

    @property
    def classifier(self) -> nn.Linear:
        """The layer whose outputs are the logits."""
        return self.get_submodule(self.classifier_name)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (B, 3, S, S) to logits (B, num_classes)."""
        return self.network(x)

    def stages(self) -> dict[str, nn.Sequential]:
        """The network as stages in order, head last; they share its modules.

        Applying all of them, one after the other, gives what `forward` gives.
        """
        stages = {}
        for stage, names in self.row.stages.items():
            modules = [self.network.get_submodule(name) for name in names]
            stages[stage] = nn.Sequential(*modules)
        last = self.network.get_submodule(self.row.head.split(".")[0])
        stages["head"] = nn.Sequential(self.network.avgpool, nn.Flatten(), last)
        return stages

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads ImageNet weights; the layer they may hold in the new one's place is left out.

        A file may also hold the backbone alone; layers before the new one then keep random weights.

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
        missing = [k for k in missing if not k.startswith(head)]
        missing = [k for k in missing if not k.endswith("num_batches_tracked")]
        for kind, keys in (("lack", missing), ("hold the unknown", unknown)):
            if keys:
                raise ValueError(f"the weights {kind} {keys[0]!r} ({len(keys)} such tensors)")


def official_url(arch: str) -> str:
    """Address of torchvision's ImageNet weights of a network."""
    return torchvision.models.get_model_weights(arch)[WEIGHTS].url


def freeze(model: PretrainedNetwork, unfreeze: str) -> None:
    """Freezes what `unfreeze` does not name, see `parts`; changes the model in place."""
    frozen, _ = parts(model, unfreeze)
    if frozen is not None:
        frozen.requires_grad_(False)


def parts(model: PretrainedNetwork, unfreeze: str) -> tuple[nn.Sequential | None, nn.Sequential]:
    """The part of a network that stays frozen and the part that trains; they share its modules.

    Args:
        model: from whose modules the parts are made, as they are at this moment.
        unfreeze: "head" trains the classifier, "last" the last stage too, "most" all but the first
            two, whose filters are general and whose large maps take most of the time, "all" all.

    Returns:
        The frozen part (None with "all") and the part that trains.
    """
    *stages, head = model.stages().values()
    if unfreeze == "head":
        # The frozen part ends in pooled features: to keep them takes little memory.
        return nn.Sequential(*stages, head[:-1]), nn.Sequential(head[-1])
    num_frozen = {"last": len(stages) - 1, "most": 2, "all": 0}[unfreeze]
    trained = nn.Sequential(*stages[num_frozen:], head)
    return nn.Sequential(*stages[:num_frozen]) if num_frozen > 0 else None, trained
