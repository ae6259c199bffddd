"""The settings of a run, declared once: name, type, default, help and rule; no torch in here.

A default that depends on the recipe or on the network stands in `config/recipes.py`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UnusableInput, printable


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    at_least: float | None = None,
    below: float = math.inf,
    choices: tuple[str, ...] = (),
    shown: str = "none",
    own: str = "",
    affects_result: bool = True,
) -> Any:
    """One setting.

    Args:
        default: None where `config/recipes.py` or something else decides.
        group: heading in `--help`.
        help: what a student needs to know.
        at_least: lowest value; None bounds it on neither side.
        below: values are lower than this.
        choices: values, where they are few.
        shown: what `--help` says where the default is None.
        own: what it says of the default with one's own pictures, where that is another.
        affects_result: whether another value may change a result.
    """
    rules = {
        "group": group,
        "help": help,
        "at_least": at_least,
        "below": below,
        "choices": choices,
        "shown": shown,
        "own": own,
        "affects_result": affects_result,
    }
    return field(default=default, metadata=rules)


# Of fewer, an uneven division could leave a batch of one, which BatchNorm cannot normalise.
SMALLEST_BATCH = 4

DAILY = "every day"
FIT = "how it learns"
LOOK = "what it sees"
FILES = "files"
RARE = "rarely needed"
NUMBER = "by the number of pictures"
GROUPS = (DAILY, FIT, LOOK, FILES, RARE)  # in the order of `--help`


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both training scripts share; `--name` on the command line is `name` here.

    Raises:
        UnusableInput: a value breaks its rule; the message gives value, rule and remedy.
    """

    epochs: int = setting(None, DAILY, "passes over the training images", at_least=1, own=NUMBER)
    device: str = setting("auto", DAILY, "auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    run_name: str | None = setting(None, DAILY, "name of the run's files", shown="the network's")
    resume: bool = setting(
        False,
        DAILY,
        "go on with the unfinished run of this name, or start it",
        affects_result=False,
    )
    limit: int | None = setting(
        None, DAILY, "use the first N images of each split, to try things out", at_least=4
    )
    seed: int = setting(
        0, DAILY, "another number gives other first weights and order", at_least=0, below=2**31
    )
    pictures: Path | None = setting(
        None, DAILY, "a folder of your own pictures, one folder a class, instead of CIFAR-10"
    )

    labels: Path | None = setting(
        None,
        DAILY,
        "a CSV of file names and labels, where the pictures lie in no folders of classes",
    )

    batch_size: int = setting(
        None, FIT, "images a step learns from", at_least=SMALLEST_BATCH, own=NUMBER
    )
    lr: float = setting(
        None,
        FIT,
        "peak learning rate: how far a step goes; with muon of the classifier and, scaled, biases",
        at_least=1e-9,
        below=1e4,
    )
    warmup: float = setting(
        None, FIT, "share of the steps in which the learning rate rises", at_least=0, below=1
    )
    weight_decay: float = setting(None, FIT, "pull of the weights towards 0", at_least=0, below=100)
    label_smoothing: float = setting(
        None, FIT, "share of the truth given to the other classes", at_least=0, below=1
    )
    balance: bool = setting(
        False, FIT, "weigh the images of rare classes more, so that all classes count alike"
    )
    flip: str = setting(
        None,
        LOOK,
        "mirror images: by a coin, or every second epoch",
        choices=("none", "random", "alternating"),
    )
    # One unit for images of all sizes; CIFAR-10's have 32 pixels.
    translate: int = setting(
        None, LOOK, "move images by up to so many 32nds of their side", at_least=0, below=32
    )
    cutout: int = setting(
        None, LOOK, "blank a square of so many 32nds of an image's side", at_least=0, below=33
    )
    small_first: str = setting(
        None,
        LOOK,
        "progressive resizing: 0.5:24 shows the first half of the steps at 24 pixels, which costs "
        "less",
    )
    image_size: int | None = setting(
        None,
        LOOK,
        "side of the network's input, pixels",
        at_least=16,
        below=513,
        own="resnet18 160, or 192 where most are that large",
    )
    fit: str = setting(
        "crop",
        LOOK,
        "how a picture becomes a square: its middle, all of it with a border, or all of it "
        "stretched",
        choices=("crop", "pad", "squash"),
    )
    val_fraction: float = setting(
        None, LOOK, "share of the training images kept aside to validate on", at_least=0, below=1
    )

    data_dir: Path = setting(Path("data"), FILES, "where CIFAR-10 is kept", affects_result=False)
    checkpoint_dir: Path = setting(
        Path("checkpoints"), FILES, "where weights go", affects_result=False
    )
    results_dir: Path = setting(
        Path("results"), FILES, "where numbers and pictures go", affects_result=False
    )
    save_every: float = setting(
        5.0, FILES, "minutes between saved states, at most", at_least=1e-4, affects_result=False
    )

    weights: str | None = setting(
        None, RARE, "begin from a checkpoint of this project or a file of weights"
    )
    precision: str = setting(
        "auto", RARE, "number format; auto takes the faster one", choices=("auto", "fp32", "bf16")
    )
    compile: bool = setting(False, RARE, "use torch.compile (slow to start)")

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                _check(entry, value)
        if self.run_name is not None and (fault := name_fault(self.run_name)):
            raise UnusableInput(
                f"--run-name {printable(self.run_name)}: {fault}; folders go in --checkpoint-dir "
                "and --results-dir"
            )
        sizes(self.small_first)
        if self.labels and not self.pictures:
            raise UnusableInput(
                f"--labels {printable(self.labels)}: they are of pictures of your own; say with "
                "--pictures where those are"
            )
        if self.fit != "crop" and not self.pictures:
            raise UnusableInput(
                f"--fit {self.fit}: CIFAR-10's images are squares; leave it out, or name pictures "
                "of your own with --pictures"
            )

    def plain(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class CustomSettings(Settings):
    """What `train_custom.py` can be told."""

    recipe: str = setting(
        "modern",
        DAILY,
        "a named set of defaults",
        choices=("classic", "modern", "speedrun", "best"),
    )
    network: str = setting(
        None,
        FIT,
        "shape of the nine layers",
        choices=("tutorial", "slim", "wide", "wider", "widest"),
    )
    optimizer: str = setting(
        None,
        FIT,
        "how gradients become steps; another than the recipe's brings the defaults below",
        choices=("adam", "adamw", "sgd", "muon"),
    )
    schedule: str = setting(None, FIT, "how the learning rate falls", choices=("cosine", "linear"))
    bias_lr_scale: float = setting(
        None, FIT, "learning rate of biases, times --lr", at_least=0, below=1e4
    )
    muon_lr: float = setting(
        None, FIT, "muon: how far a step turns a layer's weights", at_least=0, below=1
    )
    batchnorm_momentum: float = setting(
        None, FIT, "share of the newest batch in BatchNorm's memory", at_least=1e-3, below=1.001
    )


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings(Settings):
    """What `finetune.py` can be told."""

    arch: str = setting(
        "resnet18",
        DAILY,
        "the network",
        choices=("vgg19", "resnet18", "resnet50", "mobilenet_v3_small"),
    )
    weights: str = setting(
        "imagenet", DAILY, "begin from imagenet, none (random), a file of weights or a checkpoint"
    )
    unfreeze: str = setting(
        None,
        FIT,
        "which part trains; the rest stays",
        choices=("head", "last", "most", "all"),
    )
    # Not Muon: it sets the norms of the layers, and pretrained ones are to keep theirs.
    optimizer: str = setting("adamw", FIT, "how gradients become steps", choices=("adam", "adamw"))
    average: float = setting(
        None,
        FIT,
        "share of the steps, the last ones, whose weights are averaged; the learning rate then "
        "does not fall",
        at_least=0,
        below=1.001,
        own=f"resnet18 {NUMBER}",
    )
    rounds: int = setting(
        None,
        FIT,
        "trainings from the same weights, one after the other; all their averaged weights count",
        at_least=1,
        below=100,
        own=f"resnet18 {NUMBER}",
    )
    stage_lr_scale: float = setting(
        None, FIT, "learning rate of each stage, times that of the next", at_least=0, below=2
    )
    dropout: float = setting(
        None, FIT, "share of the classifier's inputs left out at random", at_least=0, below=1
    )
    cache: bool = setting(
        True,
        RARE,
        "keep the output of the frozen part; of most only on a CPU, in --rounds, of few images",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds is None or self.rounds == 1:
            return
        fault = ""
        if self.average == 0:
            fault = "what they learn is averaged; add --average 0.6"
        elif self.epochs is not None and self.epochs % self.rounds:
            fault = f"they must divide the {self.epochs} epochs; take other --epochs"
        elif self.small_first:
            fault = "the first ones would not come to full size; leave --small-first out"
        if fault:
            raise UnusableInput(f"--rounds {self.rounds}: {fault}, or leave --rounds out")

    @property
    def cached(self) -> bool:
        """Whether the frozen part's output is kept whatever the images; see `features.keeps`."""
        return self.cache and self.unfreeze in ("head", "last")  # outputs of fewer layers are large


# How the code behaved before a setting existed, for runs that were made without it.
ABSENT = {
    "small_first": "",
    "schedule": "cosine",
    "batchnorm_momentum": 0.1,
    "muon_lr": 0.0,
    "pictures": None,
    "image_size": None,
    "weights": None,
    "fit": "crop",
    "labels": None,
    "balance": False,
    "average": 0.0,
    "rounds": 1,
}
# Settings that say where and how often files are written, not what is computed.
WITHOUT_EFFECT = {
    entry.name for entry in dataclasses.fields(Settings) if not entry.metadata["affects_result"]
}


def _check(entry: dataclasses.Field, value: Any) -> None:
    """Refuses a value that breaks its setting's rule."""
    rules = entry.metadata
    low = rules["at_least"]
    high = rules["below"]
    if low is not None and not low <= value < high:
        bounds = f"at least {low}"
        if high < math.inf:
            bounds += f" and below {high}"
        raise UnusableInput(f"{flag(entry.name)} {value}: must be {bounds} ({rules['help']})")
    if rules["choices"] and value not in rules["choices"]:
        raise UnusableInput(
            f"{flag(entry.name)} {printable(value)}: choose from {', '.join(rules['choices'])}"
        )


def sizes(text: str) -> tuple[tuple[float, int], ...]:
    """Reads `--small-first`: "0.3:16,0.6:24" gives ((0.3, 16), (0.6, 24))."""
    try:
        plan = []
        for part in text.split(",") if text else []:
            share, side = part.split(":")
            plan.append((float(share), int(side)))
    except ValueError:
        plan = None
    if plan is None or not _fits(plan):
        raise UnusableInput(
            f"--small-first {printable(text)}: must be shares of the steps, rising, each with a "
            "side of at least 16 pixels, like 0.3:16,0.6:24; or empty"
        )
    return tuple(plan)


def _fits(plan: list[tuple[float, int]]) -> bool:
    shares = [share for share, _ in plan]
    rising = shares == sorted(set(shares))
    return rising and all(0 < share < 1 and 16 <= side < 513 for share, side in plan)


def name_fault(name: str) -> str:
    """Why a run's name makes no file names of its own on every system; empty where it does."""
    lower = name.lower()
    if not re.fullmatch(r"\w[\w.+-]*", name) or lower.endswith("."):
        return "must be a plain name of letters, digits and ._+-"
    if len(name.encode()) > 90:  # the next free one is longer
        return "must be at most 90 bytes long"
    if re.search(r"\.pt|\.(resume|md|html)$|^(reference|benchmarks)$", lower):
        return "must not look like another file of a run"
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", lower):
        return "is a device on Windows; take another"
    return ""


def typed(name: str, value: Any) -> str:
    """A setting as a user types it."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"no {flag(name)}" if value is None else f"{flag(name)} {value}"


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
