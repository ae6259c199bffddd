"""`engine.py` and `data.py` in a project of your own, with a network and an optimiser of torch.

cp engine.py data.py examples/lifted.py YOUR_PROJECT && cd YOUR_PROJECT && python lifted.py
"""

import numpy as np
import torch
from torch import nn

import data
import engine

# Pictures of your own, (N, H, W, 3) uint8, and labels (N,): here stripes, lying or upright
noise = np.random.default_rng(0)
labels = np.arange(600) % 2
images = noise.integers(0, 200, (600, 32, 32, 3), np.uint8)
for image, label in zip(images, labels, strict=True):
    stripes = image if label == 0 else image.swapaxes(0, 1)
    stripes[::4] += 55

arrays = data.Arrays(("lying", "upright"), images[:500], labels[:500], images[500:], labels[500:])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
splits = data.make_splits(arrays, val_fraction=0.2, limit=None, seed=0, device=device)
changes = data.Augmentation(flip="random", translate=2)
batches = data.TrainBatches(splits.train, splits.stats, batch_size=50, augmentation=changes)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(16, 2),
).to(device)  # fmt: skip
groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]  # the engine sets their rate
optimizer = torch.optim.AdamW(groups, fused=True, capturable=device.type == "cuda")

for at in engine.train(model, optimizer, batches, epochs=5, lr=0.01, warmup=0.1):
    if at.step == 0:  # an epoch has ended; after each step the number of the step stands here
        validation = data.inputs(splits.val.images, splits.stats, side=32)
        loss, accuracy = engine.evaluate(model, validation, splits.val.labels)
        print(f"epoch {at.epoch}: validation loss {loss:.3f}, accuracy {accuracy:.0%}")

test = data.inputs(splits.test.images, splits.stats, side=32)
loss, accuracy = engine.evaluate(model, test, splits.test.labels)
print(f"test accuracy {accuracy:.0%}")
