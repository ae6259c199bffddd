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


def write(
    folder: Path, images: np.ndarray, labels: np.ndarray, photographs: int | None = None
) -> int:
    """Writes images (N, 32, 32, 3) as numbered files in a folder per class; returns their bytes.

    `photographs` are so many large JPEGs made of them, instead of a PNG of each.
    """

    def one(number: int) -> int:
        index = number % len(images)
        image, path = Image.fromarray(images[index]), folder / CLASSES[labels[index]]
        path.mkdir(parents=True, exist_ok=True)
        if photographs:  # grain, without which an enlarged picture would take too few bytes
            noise = np.random.default_rng(number).integers(-12, 13, (480, 640, 1), np.int16)
            values = np.asarray(image.resize((640, 480), Image.Resampling.BICUBIC)) + noise
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        path /= f"{number:05}.{'jpg' if photographs else 'png'}"
        image.save(path, quality=90)
        return path.stat().st_size

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(one, range(photographs or len(images))))


def few(folder: Path, flags: str) -> dict[str, Any]:
    """Fine-tunes on the pictures of a folder; returns seconds and accuracies."""
    places = f"--checkpoint-dir {folder}/c --results-dir {folder}/r --run-name few"
    begin = time.perf_counter()
    code = finetune.main(f"--pictures {folder}/few {places} {flags}".split())
    if code:
        raise SystemExit(code)
    seconds = time.perf_counter() - begin
    found = json.loads((folder / "r/few/test.json").read_text(encoding="utf-8"))
    return {"seconds": round(seconds, 1)} | {key: found[key] for key in ("top1", "top1_tta")}


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__)
    parser.add_argument("--many", type=int, default=20_000, help="photographs; 0 leaves them out")
    parser.add_argument("--few", type=int, default=300, help="small pictures; 0 leaves them out")
    parser.add_argument("--flags", default="--arch resnet18", help="of finetune.py, for both")
    args = parser.parse_args()
    data, figures = cifar10(args.data_dir), {"flags": args.flags}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.many:
            size = write(folder / "many", data.train_images, data.train_labels, args.many)
            job = f"finetune.py {args.flags} --limit 2000 --pictures {folder}/many"
            found = memory.run(job, args.data_dir.resolve())
            figures["many"] = {"pictures": args.many, "bytes": size, **found}
        if args.few:
            chosen = [np.flatnonzero(data.train_labels == c)[: args.few // 10] for c in range(10)]
            images, labels = (a[np.sort(np.concatenate(chosen))] for a in data[1:3])
            write(folder / "few" / "train", images, labels)
            write(folder / "few" / "test", data.test_images[:1000], data.test_labels[:1000])
            figures["few"] = {"pictures": len(labels), **few(folder, args.flags)}
    print(figures)
    common.write(args, figures)


if __name__ == "__main__":
    main()
