"""Pictures of one's own: what a few are enough for, and how soon a training on many of them starts.

Few: folders written out of CIFAR-10, PNG files, as many of a class as the case says, and test
images in a folder of their own; or folders that are given. Measured is `finetune.py`, the whole
command without flags that fit it to the case, and after it, with `--fastai`, fastai on the same
folder. Many: photographs of 640x480 pixels made of CIFAR-10, about 100 KB as JPEG; measured from
the command to the first step.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

from benchmarks import common, memory
from data import Arrays
from sources.cifar10 import CLASSES, cifar10


class Case(NamedTuple):
    """A set of pictures out of CIFAR-10.

    Seed s takes the s-th so many training images of each class, counted from 0: what few pictures
    are worth depends much on which they are. The test images are the first of each class.
    """

    counts: dict[str, int]  # training images of a class
    num_test: int  # of each class
    side: int = 32  # pixels


CASES = {
    "30 a class": Case(dict.fromkeys(CLASSES, 30), 100),
    "200 a class, 96 pixels": Case(dict.fromkeys(CLASSES, 200), 200, side=96),
    "cats and dogs, 100 each": Case({"cat": 100, "dog": 100}, 500),
    "cats and dogs, 200 and 10": Case({"cat": 200, "dog": 10}, 500),
}


def write_case(folder: Path, case: Case, seed: int, data: Arrays) -> None:
    """Writes `train/` and `test/` of a case, numbered PNG files in a folder per class."""
    for name, count in case.counts.items():
        label = CLASSES.index(name)
        train = data.train_images[data.train_labels == label][seed * count :][:count]
        test = data.test_images[data.test_labels == label][: case.num_test]
        for split, images in (("train", train), ("test", test)):
            place = folder / split / name
            place.mkdir(parents=True)
            for number, values in enumerate(images):
                image = Image.fromarray(values)
                if case.side != 32:
                    image = image.resize((case.side, case.side), Image.Resampling.BICUBIC)
                image.save(place / f"{number:05}.png")


def write_photographs(folder: Path, images: np.ndarray, labels: np.ndarray, count: int) -> int:
    """Writes so many large JPEGs made of the images in a folder per class; returns their bytes."""

    def one(number: int) -> int:
        index = number % len(images)
        large = Image.fromarray(images[index]).resize((640, 480), Image.Resampling.BICUBIC)
        # Grain, without which an enlarged picture would take too few bytes.
        grain = np.random.default_rng(number).integers(-12, 13, (480, 640, 1), np.int16)
        values = (np.asarray(large) + grain).clip(0, 255).astype(np.uint8)
        path = folder / CLASSES[labels[index]] / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path, quality=90)
        return path.stat().st_size

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(one, range(count)))


class Command(NamedTuple):
    """What a command took, in seconds that passed and of computing, and what it printed."""

    seconds: float
    cpu_seconds: float
    output: str


def timed(command: list[str]) -> Command:
    """Runs a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Command(round(seconds, 1), round(computing, 1), done.stdout)


def fine_tune(pictures: Path, folder: Path, flags: str, seed: int) -> dict[str, Any]:
    """Fine-tunes on the pictures of a folder.

    Args:
        pictures: the folder.
        folder: gets what the run leaves.
        flags: of finetune.py.
        seed: of the run.

    Returns:
        Seconds of the whole command, what was chosen, accuracies.
    """
    places = f"--checkpoint-dir {folder}/c --results-dir {folder}/r --run-name s{seed}"
    job = f"{memory.ROOT}/finetune.py --pictures {pictures} {places} --seed {seed} {flags}"
    took = timed([sys.executable, *job.split()])
    results = folder / "r" / f"s{seed}"
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    found = json.loads((results / "test.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "flags": flags,
        "epochs": config["config"]["epochs"],
        "batch_size": config["config"]["batch_size"],
        "image_size": config["config"]["image_size"],
        "precision": config["precision"],
        "training_images": config["splits"]["train"],
        "seconds": took.seconds,
        "cpu_seconds": took.cpu_seconds,
        "top1": found["top1"],
        "top1_tta": found["top1_tta"],
        "macro_f1": found["macro"]["f1"],
    }


def with_fastai(
    python: str, weights: Path, pictures: Path, seed: int, sizes: list[int]
) -> list[dict[str, Any]]:
    """Trains fastai's network on the pictures of a folder, at each side of the input."""
    rows = []
    for size in sizes:
        script = str(memory.ROOT / "benchmarks" / "fastai_baseline.py")
        flags = f"--weights {weights} --seed {seed} --size {size}"
        took = timed([python, "-W", "ignore", script, str(pictures), *flags.split()])
        found = json.loads(took.output.splitlines()[-1])
        rows.append(
            {"seed": seed, "seconds": took.seconds, "cpu_seconds": took.cpu_seconds, **found}
        )
    return rows


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="each another case")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each case")
    parser.add_argument("--many", type=int, default=20_000, help="photographs; 0 leaves them out")
    parser.add_argument("--flags", default="--arch resnet18", help="of finetune.py, for all")
    parser.add_argument("--fastai", help="the Python of an environment with fastai")
    parser.add_argument("--fastai-weights", type=Path, help="torchvision's file of ResNet-18")
    parser.add_argument("--fastai-sizes", type=int, nargs="+", default=[128, 224])
    args = parser.parse_args()
    data = cifar10(args.data_dir)
    figures: dict[str, Any] = {"flags": args.flags, "cases": {}, "fastai": {}}
    for name in (*args.cases, *args.folders):
        rows = figures["cases"][Path(name).name] = []
        others = figures["fastai"][Path(name).name] = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as place:
                pictures = name
                if name in CASES:
                    pictures = Path(place) / "pictures"
                    write_case(pictures, CASES[name], seed, data)
                rows.append(fine_tune(pictures, Path(place), args.flags, seed))
                common.write(args, figures)
                if args.fastai:
                    others += with_fastai(
                        args.fastai, args.fastai_weights, pictures, seed, args.fastai_sizes
                    )
                    common.write(args, figures)
        accuracy = common.mean_and_spread([100 * row["top1"] for row in rows])
        print(f"{name}: {accuracy} %", flush=True)
    if args.many:
        with tempfile.TemporaryDirectory() as place:
            images = data.train_images
            size = write_photographs(Path(place), images, data.train_labels, args.many)
            job = f"finetune.py {args.flags} --limit 2000 --pictures {place}"
            found = memory.run(job, args.data_dir.resolve())
        figures["many"] = {"pictures": args.many, "bytes": size, **found}
    common.write(args, figures)


if __name__ == "__main__":
    main()
