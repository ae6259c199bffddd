"""A whole training on one page: data, network, optimiser, loop, test accuracy."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the parts lie beside this folder

import torch

import engine
from data import Augmentation, TrainBatches, inputs, make_splits, normalize
from metrics import top1
from models import NETWORKS, CustomCNN, begin_from_images
from optimizers import make_optimizer, parameter_groups
from runtime.amx import as_products
from runtime.device import choose_precision, prepare, select_device
from sources.cifar10 import cifar10

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
parser.add_argument("--limit", type=int, help="use the first N images of each split")
parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is kept")
args = parser.parse_args()
device = select_device("auto")  # a GPU where there is one
torch.manual_seed(0)

# Data: 49,000 images to learn from, 1,000 to validate on, 10,000 to test on
arrays = cifar10(args.data_dir)
splits = make_splits(arrays, val_fraction=0.02, limit=args.limit, seed=0, device=device)
look = {"augmentation": Augmentation(flip="alternating", translate=2), "resizing": ((0.5, 24),)}
batches = TrainBatches(splits.train, splits.stats, 512, num_epochs=args.epochs, **look)
prepare()  # from here on freed memory is kept: that saves time

# Network: that of `--recipe speedrun`; it begins from the images, see models.py
model = CustomCNN(**NETWORKS["slim"], momentum=0.4)
begin_from_images(model, normalize(splits.train.images[:5000].cpu(), splits.stats))
model = model.to(device, memory_format=torch.channels_last)
precision, _ = choose_precision("auto", model, next(batches.epoch(0)), device)
as_products(model, precision, device)  # what CPUs with AMX compute faster so

# Optimiser: Muon turns the hidden layers; the biases move much further than the classifier
rates = {"weight_decay": 0.2, "bias_lr_scale": 5000, "muon_lr_scale": 17}
groups = parameter_groups(model, optimizer="muon", classifier=model.classifier, **rates)
optimizer = make_optimizer(groups, "muon", 0.01, precision)

# Training: `train` yields after each step and, with step 0, at the end of each epoch
options = {"epochs": args.epochs, "lr": 0.01, "schedule": "linear", "label_smoothing": 0.2}
for at in engine.train(model, optimizer, batches, precision=precision, **options):
    if at.step == 0:
        validation = inputs(splits.val.images, splits.stats, side=32)
        loss, accuracy = engine.evaluate(model, validation, splits.val.labels, precision)
        print(f"epoch {at.epoch}: validation loss {loss:.3f}, accuracy {accuracy:.1%}")

# Test
test = inputs(splits.test.images, splits.stats, side=32)
logits, _ = engine.predict(model, test, precision=precision)
print(f"test accuracy {top1(logits, splits.test.labels.cpu()):.2%}")
