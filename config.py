"""The settings of a training run, declared once: name, type, default, help and rule of each."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def setting(default: Any, help: str, at_least: float | None = None, **metadata: Any) -> Any:
    """One setting; `at_least` and `below` bound it, `harmless` ones cannot change a result."""
    return field(default=default, metadata={"help": help, "at_least": at_least, **metadata})


_DATA, _CHECKPOINTS, _RESULTS = Path("data"), Path("checkpoints"), Path("results")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; `--name` on the command line is `name` here.

    Raises:
        ValueError: a value breaks its rule; the message gives value, rule and remedy.
    """

    epochs: int = setting(30, "passes over the training images", 1)
    batch_size: int = setting(256, "images per optimiser step (BatchNorm needs a few)", 4)
    lr: float = setting(1e-3, "peak learning rate", 1e-9, below=100)
    weight_decay: float = setting(0.01, "weight decay", 0, below=100)
    muon_lr: float = setting(0.05, "Muon's learning rate, a share of a layer's norm", 0, below=1)
    label_smoothing: float = setting(0.0, "mass spread over the other classes", 0, below=1)
    optimizer: str = setting(
        "adamw",
        "adam couples decay to the loss; muon steps the convolutions",
        choices=("adam", "adamw", "muon"),
    )
    warmup: float = setting(0.0, "share of the steps the learning rate rises in", 0, below=1)
    bias_lr_scale: float = setting(1.0, "learning rate of biases, relative to --lr", 0, below=1e4)
    flip: str = setting("random", "mirroring", choices=("none", "random", "alternating"))
    translate: int = setting(0, "shift by up to this many pixels", 0, below=17)
    cutout: int = setting(0, "side of a blanked square, pixels", 0, below=33)
    seed: int = setting(0, "fixes weights, order and augmentation", 0, below=2**31)
    val_fraction: float = setting(0.04, "share of the training set to validate on", 0, below=1)
    limit: int | None = setting(None, "use the first N images of each split (smoke run)", 4)
    data_dir: Path = setting(_DATA, "where CIFAR-10 is kept", harmless=True)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "auto measures both", choices=("auto", "fp32", "bf16"))
    compile: bool = setting(False, "use torch.compile")
    run_name: str | None = setting(None, "name of the files (default: the network's)")
    checkpoint_dir: Path = setting(_CHECKPOINTS, "where weights go", harmless=True)
    results_dir: Path = setting(_RESULTS, "where numbers and pictures go", harmless=True)
    resume: bool = setting(False, "continue the unfinished run of this name", harmless=True)
    save_every: float = setting(5.0, "minutes between saved states", 1e-4, harmless=True)
    recipe: str | None = setting(None, "named set of defaults", internal=True)

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value, low = getattr(self, entry.name), entry.metadata["at_least"]
            high = entry.metadata.get("below", math.inf)
            if low is not None and value is not None and not low <= value < high:
                bounds = f"at least {low}" + (f" and below {high}" if high < math.inf else "")
                raise ValueError(
                    f"{flag(entry.name)} {value}: must be {bounds} ({entry.metadata['help']})"
                )
            choices = entry.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{flag(entry.name)} {value}: choose from {', '.join(choices)}")
        name = self.run_name
        if name is not None and not is_file_name(name):
            raise ValueError(
                f"--run-name {name!r}: must be a plain name of letters, digits and ._+-; folders "
                "go in --checkpoint-dir and --results-dir"
            )

    def plain(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def binding(self) -> dict[str, Any]:
        """The settings that can change a result, or where it is looked for: a resume keeps them."""
        return {key: value for key, value in self.plain().items() if key not in HARMLESS}


# Settings that say where and how often files are written, not what is computed.
HARMLESS = {e.name for e in dataclasses.fields(TrainConfig) if e.metadata.get("harmless")}


def is_file_name(name: str) -> bool:
    """Whether a run's name makes file names of its own on every system."""
    taken = ".pt" in name.lower() or name.lower().endswith((".resume", ".md", "."))
    return bool(re.fullmatch(r"\w[\w.+-]{0,99}", name)) and not taken


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
