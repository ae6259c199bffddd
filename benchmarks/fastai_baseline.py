"""fastai's `vision_learner(...).fine_tune` on a folder, for `own_pictures.py --fastai` to compare.

Needs fastai, so it runs in an environment of its own and imports nothing of this repository.
Settings are those of fastai's tutorial: `Resize` to the size, `aug_transforms()`, batches of 64,
one epoch of the head, then four of everything. Prints one line of JSON.
"""

import argparse
import json
from pathlib import Path

import fastai
import torch
import torchvision
from fastai.vision import learner
from fastai.vision.all import (
    ImageDataLoaders,
    Normalize,
    Resize,
    aug_transforms,
    get_image_files,
    imagenet_stats,
    set_seed,
    vision_learner,
)


def macro_f1(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> float:
    """Mean over the classes of the F1 score; 0 for a class that is never predicted."""
    scores = []
    for label in range(num_classes):
        hits = ((predicted == label) & (labels == label)).sum().item()
        claimed = (predicted == label).sum().item()
        present = (labels == label).sum().item()
        scores.append(2 * hits / max(claimed + present, 1))
    return sum(scores) / num_classes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds train/ and test/, a folder for each class")
    parser.add_argument("--weights", type=Path, required=True, help="of torchvision's ResNet-18")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=224, help="side of the input, pixels")
    args = parser.parse_args()
    weights = torch.load(args.weights, weights_only=True)

    def resnet18(**_) -> torch.nn.Module:
        model = torchvision.models.resnet18()
        model.load_state_dict(weights)
        return model

    # Where fastai cuts the body off, and how it groups the layers
    learner.model_meta[resnet18] = learner.model_meta[torchvision.models.resnet18]
    set_seed(args.seed, reproducible=True)
    loaders = ImageDataLoaders.from_folder(
        args.folder / "train",
        valid_pct=0.04,  # as many as finetune.py keeps aside
        seed=args.seed,
        item_tfms=Resize(args.size),
        batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)],
        num_workers=0,
        device=torch.device("cpu"),
    )
    # `pretrained` would fetch weights; these are loaded above, and so freezing is asked for here.
    trained = vision_learner(loaders, resnet18, pretrained=False)
    with trained.no_bar(), trained.no_logging():
        trained.fine_tune(4)
    tests = loaders.test_dl(get_image_files(args.folder / "test"), with_labels=True)
    with trained.no_bar():
        shares, labels = trained.get_preds(dl=tests)
    predicted = shares.argmax(1)
    figures = {
        "size": args.size,
        "top1": (predicted == labels).double().mean().item(),
        "macro_f1": macro_f1(predicted, labels, shares.shape[1]),
        "fastai": fastai.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
