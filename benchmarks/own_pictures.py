"""Pictures of one's own: what a few are enough for, and how soon a training on many of them starts.

Few: folders written out of CIFAR-10, as many pictures of a class as the case says, and test
images in a folder of their own; or folders that are given. Measured is `finetune.py`, the whole
command without flags that fit it to the case, and after it, with `--fastai`, fastai on the same
folder. Many: photographs of 640x480 pixels made of CIFAR-10, about 100 KB as JPEG; measured from
the command to the first step. More than memory holds: JPEGs of 128x128 pixels; measured is how fast
a training on them learns, and what it leaves when it is stopped. Where Linux has a control group
with a limit, `--memory-group` trains once more in it.
"""

import json
import os
import resource
import signal
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
from storage import checkpoint
from storage.history import HEADER


class Case(NamedTuple):
    """A set of pictures out of CIFAR-10.

    Seed s takes the s-th so many training images of each class, counted from 0: what few pictures
    are worth depends much on which they are. The test images are the first of each class.
    """

    counts: dict[str, int]  # training images of a class
    num_test: int  # of each class
    side: int = 32  # pixels
    ending: str = ".png"


CASES = {
    "30 a class": Case(dict.fromkeys(CLASSES, 30), 100),
    "200 a class, 96 pixels": Case(dict.fromkeys(CLASSES, 200), 200, side=96),
    "cats and dogs, 100 each, JPEG of 240 pixels": Case({"cat": 100, "dog": 100}, 500, 240, ".jpg"),
    "cats and dogs, 200 and 10": Case({"cat": 200, "dog": 10}, 500),
}


def write_case(folder: Path, case: Case, seed: int, data: Arrays) -> None:
    """Writes `train/` and `test/` of a case, numbered files in a folder per class."""
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
                image.save(place / f"{number:05}{case.ending}")


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


def write_small(folder: Path, images: np.ndarray, labels: np.ndarray, count: int) -> None:
    """Writes so many JPEGs of 128x128 pixels in a folder per class: the images, then parts of them.

    More than 25 of an image would be copies.
    """

    def one(number: int) -> None:
        turn, index = divmod(number, len(images))
        down, right = divmod(turn, 5)
        part = images[index, down : down + 28, right : right + 28] if turn else images[index]
        path = folder / CLASSES[labels[index]] / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(part).resize((128, 128), Image.Resampling.BICUBIC).save(path)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, range(count)))


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


def stopped_after(
    seconds: float, pictures: Path, flags: str, memory_group: Path | None
) -> dict[str, Any]:
    """Fine-tunes on the pictures of a folder for a while and stops as Ctrl-C does.

    Args:
        seconds: from the first step.
        pictures: the folder.
        flags: of finetune.py.
        memory_group: a control group of Linux to train in; None for this process's own.

    Returns:
        Seconds to the first step, images/s from there, bytes held at most, whether the pictures
        lay in a file, and the names of what was left beside the state.
    """
    job = f"{memory.ROOT}/finetune.py --pictures {pictures} --run-name many {flags}"
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        joins = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', _procs(memory_group)]
        process = subprocess.Popen(
            [*joins, sys.executable, *job.split()],
            cwd=place,
            stdout=subprocess.PIPE,
            text=True,
        )
        in_file = False
        for line in process.stdout:
            in_file |= "in a file" in line
            if line.rstrip("\n") == HEADER:  # which the first step follows
                break
        else:
            raise SystemExit(f"{job}: no first step, exit code {process.wait()}")
        first_step = time.perf_counter() - begin
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGTERM)
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) != 128 + signal.SIGTERM:
            raise SystemExit(f"{job}: ended by itself")
        folder = Path(place) / "checkpoints"
        state, _ = checkpoint.load_state(folder / "many.resume.pt")
        return {
            "memory_limit": limit_of(memory_group),
            "startup_seconds": round(first_step, 1),
            "images_per_second": round(
                state["step"] * state["config"]["batch_size"] / state["spent"]["epoch"], 1
            ),
            "seconds": round(state["spent"]["epoch"], 1),
            "peak_bytes": 1024 * usage.ru_maxrss,
            "in_file": in_file,
            "left": sorted(path.name for path in folder.iterdir()),
        }


def _procs(memory_group: Path | None) -> str:
    """The file that takes the number of a process that is to be in the group."""
    return str(memory_group / "cgroup.procs") if memory_group else "/dev/null"


def limit_of(memory_group: Path | None) -> int | None:
    """Bytes that a group may take (control groups of version 1 and 2)."""
    if memory_group is None:
        return None
    names = ("memory.max", "memory.limit_in_bytes")
    return next(int((memory_group / n).read_text()) for n in names if (memory_group / n).exists())


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
    parser.add_argument("--small", type=int, default=0, help="pictures of 128 pixels")
    parser.add_argument("--small-flags", default="--image-size 128", help="for these")
    parser.add_argument("--stop-after", type=float, default=180.0, help="seconds of training")
    parser.add_argument("--memory-group", type=Path, help="control group with a memory limit")
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
    if args.small:
        rows = figures["small"] = []
        with tempfile.TemporaryDirectory() as place:
            write_small(Path(place), data.train_images, data.train_labels, args.small)
            flags = f"{args.flags} {args.small_flags}"
            for group in [None, args.memory_group] if args.memory_group else [None]:
                row = stopped_after(args.stop_after, Path(place), flags, group)
                rows.append({"pictures": args.small, "flags": flags, **row})
                print(rows[-1], flush=True)
    common.write(args, figures)


if __name__ == "__main__":
    main()
