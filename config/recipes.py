"""Every recipe and every pretrained network with its whole set of defaults, a column each."""

import math
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from config.settings import WITHOUT_EFFECT, CustomSettings, FineTuneSettings, Settings, flag
from errors import UnusableInput, printable

# A flag that is given replaces the default.
# A column is a recipe: the formatter would put each value on a line of its own.
_RECIPES: dict[str, tuple] = {
    "recipe":             ("classic",   "modern",      "speedrun", "best"),
    "network":            ("tutorial",  "wide",        "slim",     "wide"),
    "epochs":             (30,          20,            10,         31),
    "batch_size":         (128,         512,           1000,       1000),
    "optimizer":          ("adam",      "adamw",       "muon",     "muon"),
    "lr":                 (1e-3,        8e-3,          0.01,       0.01),
    "muon_lr":            (0.0,         0.0,           0.17,       0.17),
    "schedule":           ("cosine",    "cosine",      "linear",   "linear"),
    "warmup":             (0.0,         0.2,           0.0,        0.0),
    # BatchNorm makes the convolutions scale-free, so that decay sets their effective step: the
    # norm settles where a step turns the weights by sqrt(2 lr decay), here 9 %.
    "weight_decay":       (0.01,        0.5,           0.2,        0.2),
    "bias_lr_scale":      (1.0,         20.0,          5000.0,     9000.0),
    "batchnorm_momentum": (0.1,         0.1,           0.4,        0.2),
    "label_smoothing":    (0.0,         0.2,           0.2,        0.2),
    "flip":               ("random",    "alternating", "alternating", "alternating"),
    "translate":          (0,           4,             2,          4),
    "cutout":             (0,           8,             0,          10),
    "small_first":        ("",          "0.5:24",      "0.5:24",   "0.5:24"),
    "val_fraction":       (0.04,        0.02,          0.02,       0.02),
}  # fmt: skip

# What an optimiser needs: defaults that come with `--optimizer` where it is not the recipe's own.
# A recipe's own rates were found for its optimiser and network; these also suit the other networks.
BY_OPTIMIZER: dict[str, dict[str, float]] = {
    "adam": {"lr": 1e-3, "warmup": 0.0, "weight_decay": 0.01, "bias_lr_scale": 1.0},
    "adamw": {"lr": 8e-3, "warmup": 0.2, "weight_decay": 0.5, "bias_lr_scale": 20.0},
    "sgd": {"lr": 0.1, "warmup": 0.2, "weight_decay": 5e-4, "bias_lr_scale": 1.0},
    "muon": {
        "lr": 0.01,
        "muon_lr": 0.17,
        "warmup": 0.0,
        "weight_decay": 0.2,
        "bias_lr_scale": 10.0,
    },
}

BY_RECIPE = {
    name: {key: row[column] for key, row in _RECIPES.items() if key != "recipe"}
    for column, name in enumerate(_RECIPES["recipe"])
}

# What is fine-tuned. The learning rate is the new classifier's; earlier stages get less, for their
# filters are to be adapted, not unlearned.
_FINE_TUNING: dict[str, Any] = {
    "unfreeze": "last",
    "image_size": 80,
    "small_first": "",
    "epochs": 5,
    "batch_size": 128,
    "lr": 1e-3,
    "stage_lr_scale": 0.6,
    "warmup": 0.1,
    "weight_decay": 0.05,
    "dropout": 0.2,
    "average": 0.0,
    "rounds": 1,
    "label_smoothing": 0.1,
    "flip": "alternating",
    "translate": 0,
    "cutout": 0,
    "val_fraction": 0.04,
}
# What changes with the part that trains. With head and last the frozen part's output is kept: the
# images stay in place.
BY_PART: dict[str, dict[str, Any]] = {
    "head": {"epochs": 10, "lr": 1e-3, "translate": 0},
    "last": {"epochs": 5, "lr": 1e-3, "translate": 0},
    "most": {"epochs": 10, "translate": 2},
    "all": {"epochs": 10, "translate": 2},
}
BY_NETWORK = {
    "vgg19": {**_FINE_TUNING, "epochs": 4},
    "resnet18": {
        **_FINE_TUNING,
        "unfreeze": "most",
        "image_size": 128,
        "epochs": 4,
        "translate": 2,
    },
    "resnet50": {
        **_FINE_TUNING,
        "unfreeze": "all",
        "image_size": 96,
        "epochs": 3,
        "lr": 6e-4,
        "translate": 2,
    },
    # What it begins from need not be an ImageNet classifier: all of it wants to move.
    "mobilenet_v3_small": {
        **_FINE_TUNING,
        "unfreeze": "all",
        "image_size": 96,
        "epochs": 7,
        "lr": 3e-3,
        "stage_lr_scale": 1.0,
        "translate": 2,
    },
}
# Of one's own pictures there are few, mostly, and most are larger than CIFAR-10's 32 pixels.
OWN_PICTURES: dict[str, dict[str, Any]] = {"resnet18": {"image_size": 160}}
# Few are soon known by heart: several short trainings from the same weights are better averaged.
# Rounds where there are fewer training images than so many; more than all of these take one.
ROUNDS = {1000: 4, 5000: 2}
AVERAGE = 0.6  # of the steps of a round
AVERAGED = {"resnet18"}  # the networks that were found to gain by it
LARGE_SIDE = {"resnet18": 192}  # of the input for pictures that are that large
# Nothing to keep, more to learn.
FROM_SCRATCH: dict[str, Any] = {"unfreeze": "all", "stage_lr_scale": 1.0, "epochs": 10}
# These change what the frozen part is shown, and are refused where its output is kept.
CHANGE_INPUT = ("translate", "cutout", "small_first")

# Settings whose default follows from the number of training images where these are one's own.
BY_NUMBER = ("epochs", "batch_size", "average", "rounds")
# Likewise from their sides.
BY_SIDE = {"image_size"}


class _LeastWork(NamedTuple):
    """What a training takes, however few its images are."""

    num_steps: int  # of the whole training
    batch_size: int  # BatchNorm's mean and variance over fewer images are rough


FINE_TUNED = _LeastWork(num_steps=100, batch_size=32)
UNTRAINED = _LeastWork(num_steps=1000, batch_size=32)  # a guess: it was not searched
STEPS_OF_A_ROUND = 30  # at least, where there are several
STEPS_OF_AN_EPOCH = 60  # about so many are aimed at, between the least batch and the usual one

AnySettings = TypeVar("AnySettings", bound=Settings)


def custom(given: dict[str, Any]) -> CustomSettings:
    """The settings of a training from scratch: what was given, over the defaults.

    Those are the recipe's; where another optimiser is given than its own, what that one needs
    replaces what belongs to the recipe's. Of one's own pictures see `by_number`.

    Raises:
        UnusableInput: see `Settings`; or a rate of Muon is given to another optimiser.
    """
    chosen = CustomSettings(**_unsettled(_custom_defaults(given), given) | given)
    if "muon_lr" in given and chosen.optimizer != "muon":
        raise UnusableInput(
            f"--muon-lr {chosen.muon_lr}: {chosen.optimizer} has no such rate; add --optimizer "
            "muon, or leave it out"
        )
    return chosen


def _custom_defaults(given: dict[str, Any]) -> dict[str, Any]:
    defaults = _named(BY_RECIPE, given.get("recipe", CustomSettings.recipe))
    optimizer = given.get("optimizer", defaults["optimizer"])
    if optimizer != defaults["optimizer"]:  # an unknown one is refused by the settings
        defaults |= BY_OPTIMIZER.get(optimizer, {})
    if given.get("image_size", 32) != 32:  # the small sides are for that one
        defaults["small_first"] = ""
    return defaults


def help_on_optimizers() -> str:
    """What `--help` says of the defaults that come with an optimiser."""
    lines = ["defaults that come with --optimizer where the recipe has another one:"]
    for name, defaults in BY_OPTIMIZER.items():
        flags = ", ".join(f"{flag(key)[2:]} {value:g}" for key, value in defaults.items())
        lines.append(f"  {name:5} {flags}")
    return "\n".join(lines)


def finetune(given: dict[str, Any]) -> FineTuneSettings:
    """The settings of a fine-tuning: what was given, over the network's defaults.

    Of one's own pictures see `by_number`.

    Raises:
        UnusableInput: see `Settings`; or images are to be moved whose output is to be kept; or
            rates are given to stages that do not train.
    """
    chosen = FineTuneSettings(**_unsettled(_finetune_defaults(given), given) | given)
    changes_input = any(getattr(chosen, name) for name in CHANGE_INPUT)
    if chosen.cached and changes_input:
        raise UnusableInput(
            "--translate, --cutout and --small-first change the input of the frozen part, whose "
            "output is kept: add --no-cache, or leave them out"
        )
    if "stage_lr_scale" in given and chosen.unfreeze == "head":
        raise UnusableInput(
            f"--stage-lr-scale {chosen.stage_lr_scale:g}: with --unfreeze head no stage trains; "
            "leave it out, or take another part"
        )
    return chosen


def _finetune_defaults(given: dict[str, Any]) -> dict[str, Any]:
    arch = given.get("arch", FineTuneSettings.arch)
    defaults = _named(BY_NETWORK, arch)
    usual = defaults["unfreeze"]
    if given.get("pictures"):
        defaults |= OWN_PICTURES.get(arch, {})
    if given.get("weights") == "none":
        defaults |= FROM_SCRATCH
    part = given.get("unfreeze", defaults["unfreeze"])
    if part != usual:
        defaults |= BY_PART.get(part, {})
    return defaults


def by_side(given: dict[str, Any], median_side: int) -> dict[str, Any]:
    """What was given of a fine-tuning, with the side of the input that suits one's own pictures.

    Args:
        given: the flags, by name; a side among them stays.
        median_side: of the pictures' shorter sides, pixels.
    """
    large = LARGE_SIDE.get(given.get("arch", FineTuneSettings.arch))
    if large and median_side >= large:
        return {"image_size": large} | given
    return given


def _unsettled(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Defaults without those that are not known before one's own pictures are counted."""
    if not given.get("pictures"):
        return defaults
    names = ["epochs", "batch_size"]
    is_pretrained = given.get("weights") != "none"
    grows = given.get("small_first")  # the first rounds would end at a smaller size than the others
    if given.get("arch", FineTuneSettings.arch) in AVERAGED and is_pretrained and not grows:
        names += ["average", "rounds"]
    return defaults | {name: None for name in names if name in defaults}


def by_number(settings: AnySettings, num_images: int) -> AnySettings:
    """Settles what follows from the number of training images, where no flag gave it.

    Few images need smaller batches, or an epoch would have few steps, and more epochs, until the
    training has the steps that learning takes. Neither is ever less work than on CIFAR-10: the
    epochs are the recipe's or network's at least, the batches at most.

    Args:
        settings: of one's own pictures; others have nothing to be settled.
        num_images: of the training split.
    """
    given = settings.plain()
    names = [name for name in BY_NUMBER if name in given]
    if all(given[name] is not None for name in names):
        return settings
    if isinstance(settings, CustomSettings):
        usual = _custom_defaults(given)
        least = UNTRAINED
    else:
        usual = _finetune_defaults(given)
        least = UNTRAINED if settings.weights == "none" else FINE_TUNED
    chosen = {name: given[name] for name in names}
    if chosen["batch_size"] is None:
        fitting = 2 ** round(math.log2(num_images / STEPS_OF_AN_EPOCH))
        most = max(min(usual["batch_size"], num_images), 4)  # four is the least there may be
        chosen["batch_size"] = min(max(fitting, least.batch_size), most)
    num_steps = math.ceil(num_images / chosen["batch_size"])

    rounds = chosen.get("rounds", 1)
    if rounds is None:
        rounds = 1
        if settings.average != 0 and num_images < max(ROUNDS):
            rounds = next(number for below, number in ROUNDS.items() if num_images < below)
        epochs = chosen["epochs"]
        if epochs is not None:  # they divide them, and average a step each
            average = AVERAGE if settings.average is None else settings.average
            while epochs % rounds or (rounds > 1 and average * (epochs // rounds) * num_steps < 1):
                rounds -= 1
        chosen["rounds"] = rounds
    if "average" in chosen and chosen["average"] is None:
        chosen["average"] = AVERAGE if rounds > 1 else 0.0
    if chosen["epochs"] is None:
        of_a_round = math.ceil(usual["epochs"] / rounds)
        if rounds > 1:
            of_a_round = max(of_a_round, math.ceil(STEPS_OF_A_ROUND / num_steps))
        else:
            of_a_round = max(of_a_round, math.ceil(least.num_steps / num_steps))
        chosen["epochs"] = rounds * of_a_round
    return replace(settings, **chosen)


def _named(table: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in table:
        raise UnusableInput(f"{printable(name)} is unknown: choose from {', '.join(table)}")
    return dict(table[name])


def without_flags(settings: AnySettings) -> AnySettings:
    """The settings of the same recipe or network, and of the same pictures, without other flags."""
    given: dict[str, Any] = {"pictures": settings.pictures}
    if isinstance(settings, CustomSettings):
        return custom(given | {"recipe": settings.recipe})
    given["arch"] = settings.arch
    if settings.pictures and settings.image_size == LARGE_SIDE.get(settings.arch):
        given["image_size"] = settings.image_size  # it follows from the pictures
    return finetune(given)


def changed(settings: Settings, num_images: int) -> dict[str, Any]:
    """What differs from the recipe's or network's defaults, files and names aside.

    Args:
        settings: of a run.
        num_images: of its training split, from which defaults may follow.
    """
    defaults = by_number(without_flags(settings), num_images).plain()
    defaults["pictures"] = None
    ignored = {"run_name", "seed", "device", *WITHOUT_EFFECT}
    return {
        name: value
        for name, value in settings.plain().items()
        if name not in ignored and value != defaults[name]
    }
