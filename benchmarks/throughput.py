"""Training throughput of this repository against the plain loop of PyTorch's CIFAR-10 tutorial.

All sides train the same network at the same batch size in one process, a few steps in turn, so
that a machine that slows down slows both. The plain side is what most repositories do: a dataset of
PIL images, ToTensor, Normalize and RandomHorizontalFlip sample by sample, a DataLoader with two
workers, float32. A third side is this trainer under `torch.compile`, and the seconds that its first
two steps take longer; a training compiles twice, since its batches have two sizes. Images/s are
medians over the turns; FLOP/s count two operations for each multiplication of a convolution or
linear layer, forward and, for the gradients of weights and of inputs, twice more; the first layer's
input needs no gradient.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import engine
import train_custom
from compute import choose_precision, now, select_device, train_mode
from config import TrainConfig
from data import Split, TrainBatches, load_splits
from files import write_json
from models import create_model
from optimizers import make_optimizer, parameter_groups
from records import measured


class Pictures(Dataset):
    """CIFAR-10 as torchvision serves it: one PIL image at a time."""

    def __init__(self, split: Split, transform: Callable):
        self.images, self.labels = split.images.cpu().numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_steps(
    split: Split, mean: list[float], std: list[float], model: nn.Module, batch_size: int, device
) -> Iterator[int]:
    """The tutorial's loop, which trains the model in place; yields the images of each step."""
    transform = transforms.Compose(
        [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while True:
        for x, labels in DataLoader(
            Pictures(split, transform), batch_size, shuffle=True, num_workers=2, drop_last=True
        ):
            x, labels = x.to(device), labels.to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            yield len(labels)


def our_steps(
    batches: TrainBatches, model: nn.Module, config: TrainConfig, precision: str
) -> Iterator[int]:
    """The steps of `engine.fit` without its files; yields the images of each."""
    optimizer = make_optimizer(parameter_groups(model, config), config, precision)
    train_mode(model)
    take_step = engine.stepper(model, optimizer, config, precision)
    epoch = 0
    while True:
        for x, labels in batches.epoch(epoch):
            take_step(x, labels, config.lr)
            yield len(labels)
        epoch += 1


def rate(steps: Iterator[int], number: int, device: torch.device) -> float:
    """Images/s of some steps."""
    begin = now(device)
    images = sum(next(steps) for _ in range(number))
    return images / (now(device) - begin)


def multiplications(model: nn.Module) -> list[int]:
    """Multiplications of each convolution and linear layer for one 32x32 image, in order."""
    counts = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        positions = output[0].numel() // output.shape[1]
        counts.append(positions * module.weight.numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model.eval()(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return counts


def step_flop(model: nn.Module) -> int:
    """Floating-point operations of a training step for each image."""
    first, *others = multiplications(model)
    return 4 * first + 6 * sum(others)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The machine's FLOP/s in a square matrix product, best of five."""
    size = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        begin = now(device)
        a @ b
        times.append(now(device) - begin)
    return 2 * size**3 / min(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures to this json")
    args = parser.parse_args()
    device = select_device(args.device)
    splits = load_splits(args.data_dir, val_fraction=0, limit=None, seed=0, device=device)
    peaks = {
        name: matrix_rate(dtype, device)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    rows = []
    for name in train_custom.RECIPES:
        flags = ["--recipe", name, "--batch-size", str(args.batch_size)]
        config, compiled = (train_custom.parse([*flags, *more]) for more in ([], ["--compile"]))
        model, batches = train_custom.begin(config, splits, device)
        twin, _ = train_custom.begin(config, splits, device)
        precision, _ = choose_precision("auto", model, next(batches.epoch(0)), device)
        flop = step_flop(model)
        plain = create_model("custom_cnn", train_custom.SURGERY[name])
        sides = {
            "plain": plain_steps(
                splits.train, splits.mean, splits.std, plain, args.batch_size, device
            ),
            "ours": our_steps(batches, model, config, precision),
            "compiled": our_steps(batches, twin, compiled, precision),
        }
        starts = {}
        for side, steps in sides.items():
            begin = now(device)
            rate(steps, 2, device)
            starts[side] = now(device) - begin
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.turns):
            for side, steps in sides.items():
                for _ in range(4):  # workers that idled meanwhile have batches in store
                    next(steps)
                rates[side].append(rate(steps, args.steps, device))
                time.sleep(1)  # and refill it now, not beside the other side
        medians = {side: statistics.median(values) for side, values in rates.items()}
        begin = now(device)
        for _, _ in zip(range(20), batches.epoch(1), strict=False):
            pass
        augmenting = (now(device) - begin) / 20
        rows.append(
            {
                "network": name,
                "multiplications": sum(multiplications(model)),
                "precision": precision,
                "plain_images_per_second": round(medians["plain"], 1),
                "our_images_per_second": round(medians["ours"], 1),
                "compiled_images_per_second": round(medians["compiled"], 1),
                "compile_seconds": round(starts["compiled"] - starts["ours"], 1),
                "ratio": round(medians["ours"] / medians["plain"], 2),
                "flop_per_second": round(flop * medians["ours"]),
                "utilisation": round(flop * medians["ours"] / peaks[precision], 3),
                "augmentation_share": round(augmenting * medians["ours"] / args.batch_size, 4),
            }
        )
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.output:
        rounded = {name: round(peak) for name, peak in peaks.items()}
        figures = {"batch_size": args.batch_size, "matrix_product_flop_per_second": rounded}
        write_json(args.output, measured(figures | {"rows": rows}, device))


if __name__ == "__main__":
    main()
