"""Pictures of one's own: how soon a training on many of them starts, and what a few are enough for.

Both folders are written out of CIFAR-10 first. Many: photographs of 640x480 pixels, about 100 KB as
JPEG; measured from the command to the first step. Few: PNG files of 32x32, as many of each class;
measured is the whole command, and the accuracy on 1,000 test images in a folder of their own.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

import finetune
from benchmarks import common, memory
from sources.cifar10 import CLASSES, cifar10


def write_small(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes each of the images (N, 32, 32, 3) as a numbered PNG in a folder per class."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / CLASSES[label] / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


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


def few(folder: Path, flags: str) -> dict[str, Any]:
    """Fine-tunes on the pictures of a folder; returns seconds and accuracies."""
    places = f"--checkpoint-dir {folder}/c --results-dir {folder}/r --run-name few"
    begin = time.perf_counter()
    code = finetune.main(f"--pictures {folder}/few {places} {flags}".split())
    if code:
        raise SystemExit(code)
    seconds = time.perf_counter() - begin
    found = json.loads((folder / "r/few/test.json").read_text(encoding="utf-8"))
    return {"seconds": round(seconds, 1), "top1": found["top1"], "top1_tta": found["top1_tta"]}


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--many", type=int, default=20_000, help="photographs; 0 leaves them out")
    parser.add_argument("--few", type=int, default=300, help="small pictures; 0 leaves them out")
    parser.add_argument("--flags", default="--arch resnet18", help="of finetune.py, for both")
    args = parser.parse_args()
    data = cifar10(args.data_dir)
    figures: dict[str, Any] = {"flags": args.flags}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.many:
            place = folder / "many"
            size = write_photographs(place, data.train_images, data.train_labels, args.many)
            job = f"finetune.py {args.flags} --limit 2000 --pictures {place}"
            found = memory.run(job, args.data_dir.resolve())
            figures["many"] = {"pictures": args.many, "bytes": size, **found}
        if args.few:
            first = [np.flatnonzero(data.train_labels == c)[: args.few // 10] for c in range(10)]
            chosen = np.concatenate(first)
            place = folder / "few"
            write_small(place / "train", data.train_images[chosen], data.train_labels[chosen])
            write_small(place / "test", data.test_images[:1000], data.test_labels[:1000])
            figures["few"] = {"pictures": len(chosen), **few(folder, args.flags)}
    print(figures)
    common.write(args, figures)


if __name__ == "__main__":
    main()
