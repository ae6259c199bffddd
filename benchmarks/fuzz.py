"""Feeds damaged and hostile checkpoints, data sets, weights and pictures to the loaders.

Each must give one clear error (ValueError, FileNotFoundError, OSError) or the correct result; never
another exception, a hang, an execution, or a wrong answer.
"""

import argparse
import collections
import contextlib
import io
import pickle
import random
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import downloads
import files
import models
import pictures
import records
import tensorfile
import weights
from benchmarks.mutations import Code, compressed, damaged, rewritten, saved
from compute import predict

SAMPLE = Path(__file__).parent.parent / "tests" / "sample.npz"
SECONDS = 20  # after which a loader counts as hanging


class Checkpoints:
    """A small trained-looking checkpoint; a correct result gives the same logits."""

    def __init__(self, folder: Path, chance: random.Random):
        self.path, self.chance, self.trace = folder / "it.pt", chance, folder / "executed"
        surgery = {"widths": (8, 8, 8, 8, 8, 8), "hidden": (8, 8)}
        torch.manual_seed(0)
        model = models.create_model("custom_cnn", surgery)
        with np.load(SAMPLE) as arrays:
            self.images = torch.from_numpy(arrays["test_images"][:8])
        self.content = {
            **{"format": checkpoint.FORMAT, "name": "it", "arch": "custom_cnn", "surgery": surgery},
            **{"classes": list(downloads.CLASSES), "mean": [0.5] * 3, "std": [0.25] * 3},
            **{"config": {"limit": None}, "metrics": {"temperature": 1.5}, "environment": {}},
            "state_dict": dict(model.state_dict()),
        }
        checkpoint.save(self.path, self.content)
        self.whole = self.path.read_bytes()
        self.expected = self.load()

    def mutate(self) -> None:
        """Damages the bytes, or changes the content and signs it again."""
        kind, self.signed = self.chance.random(), False
        if kind < 0.6:
            self.path.write_bytes(damaged(self.whole, self.chance))
        elif kind < 0.95:
            content = rewritten(self.content, self.chance, self.trace)
            with contextlib.suppress(ValueError):  # what is refused unread needs no signature
                tensorfile._check(content, len(self.whole))
                with contextlib.suppress(TypeError):  # it holds what has no digest
                    content["sha256"] = checkpoint.digest(content)
                    self.signed = True
            self.path.write_bytes(saved(content))
        else:
            hostile = (saved(Code(self.trace)), pickle.dumps(Code(self.trace)))
            self.path.write_bytes(self.chance.choice((*hostile, compressed(self.whole))))

    def load(self) -> torch.Tensor:
        """The logits of some images."""
        model, content = checkpoint.load_model(self.path)
        return predict(model, self.images, content["mean"], content["std"])[0]

    def correct(self, result: torch.Tensor) -> bool:
        """A signed change of the content is a checkpoint of its own; damage must not pass."""
        return torch.equal(result, self.expected) or self.signed


class Weights:
    """A state dict of MobileNetV3-small as a user would name it with --weights."""

    def __init__(self, folder: Path, chance: random.Random):
        self.path, self.chance, self.trace = folder / "w.pth", chance, folder / "executed"
        torch.manual_seed(0)
        self.content = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
        self.whole = saved(self.content)
        self.model = models.OperatedNetwork("mobilenet_v3_small", image_size=32)

    def mutate(self) -> None:
        """Damages the bytes, or changes the content."""
        if self.chance.random() < 0.6:
            self.path.write_bytes(damaged(self.whole, self.chance))
        else:
            self.path.write_bytes(saved(rewritten(self.content, self.chance, self.trace)))

    def load(self) -> dict[str, torch.Tensor]:
        """The trunk's tensors after loading."""
        state, _ = weights.weights_from_file(self.path)
        self.model.load_pretrained(state)
        return {k: v.clone() for k, v in self.model.network.state_dict().items()}

    def correct(self, result: dict[str, torch.Tensor]) -> bool:
        """What was loaded is what the file holds, and damage was not taken for weights."""
        given = torch.load(self.path, weights_only=True)
        trunk = [k for k in result if not k.startswith("classifier.3") and k in given]
        return all(torch.equal(result[k], given[k].to(result[k].dtype)) for k in trunk) and all(
            torch.equal(given[k], self.content[k]) or given[k].dtype != self.content[k].dtype
            for k in trunk
            if self.content[k].ndim > 1
        )


class Datasets:
    """CIFAR-10's cache and official folder, made of the sample."""

    def __init__(self, folder: Path, chance: random.Random):
        self.folder, self.chance, self.trace = folder, chance, folder / "executed"
        with np.load(SAMPLE) as arrays:
            self.arrays = dict(arrays)
        downloads.SHA256 = {k: files.sha256(v.tobytes()) for k, v in self.arrays.items()}
        downloads.BATCH_SIZE = 64  # 320 training images in five files
        self.cache = folder / "cifar10.npz"
        np.savez(self.cache, **self.arrays)
        self.whole = self.cache.read_bytes()
        self.batch = pickle.dumps(
            {
                "data": self.arrays["train_images"][:64].transpose(0, 3, 1, 2).reshape(64, -1),
                "labels": self.arrays["train_labels"][:64].tolist(),
            },
            protocol=2,
        )

    def mutate(self) -> None:
        """Damages the cache, or leaves a hostile batch in the official folder."""
        official = self.folder / downloads.FOLDER
        official.mkdir(exist_ok=True)
        self.cache.unlink(missing_ok=True)
        if self.chance.random() < 0.6:
            self.cache.write_bytes(damaged(self.whole, self.chance))
        for name in (*downloads.TRAIN_BATCHES, downloads.TEST_BATCH):
            content = damaged(self.batch, self.chance)
            if self.chance.random() < 0.3:
                content = pickle.dumps({"data": Code(self.trace), "labels": [1]}, protocol=2)
            (official / name).write_bytes(content)

    def load(self) -> downloads.Cifar10:
        """The four arrays; there is no network here, only what lies in the folder."""
        with contextlib.redirect_stderr(io.StringIO()):
            return downloads.cifar10(self.folder, downloads.SOURCES[:2])

    def correct(self, result: downloads.Cifar10) -> bool:
        """Nothing but the very arrays will do."""
        return all(np.array_equal(v, self.arrays[k]) for k, v in result._asdict().items())


def huge_png() -> bytes:
    """A valid header that promises a billion pixels."""
    buffer = io.BytesIO()
    Image.new("1", (4, 4)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (32_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


class Pictures:
    """A photograph in many formats; a correct result is a 32x32 RGB image."""

    def __init__(self, folder: Path, chance: random.Random):
        self.path, self.chance, self.trace = folder / "picture", chance, folder / "executed"
        with np.load(SAMPLE) as arrays:
            image = Image.fromarray(arrays["test_images"][0]).resize((61, 47))
        self.whole = []
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA"):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            self.whole.append(buffer.getvalue())
        self.whole.append(huge_png())

    def mutate(self) -> None:
        """Damages one of the formats."""
        self.path.write_bytes(damaged(self.chance.choice(self.whole), self.chance))

    def load(self) -> np.ndarray:
        """The picture as evaluate.py reads it."""
        return pictures.load(self.path)

    def correct(self, result: np.ndarray) -> bool:
        """Damage within the pixels gives another picture, which nothing can know."""
        return result.shape == (32, 32, 3) and result.dtype == np.uint8


class Hang(BaseException):
    """Raised by the alarm; no loader can take it for a damaged file."""


def attempt(case: Any) -> str:
    """Loads a mutated file and says what came of it."""

    def hang(number: int, frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        result = case.load()
        outcome = "correct" if case.correct(result) else "wrong answer"
    except Hang:
        outcome = "hang"
    except (ValueError, FileNotFoundError, OSError) as error:
        outcome = "clear error" if str(error) else "empty error"
    except Exception as error:
        outcome = f"traceback: {type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.alarm(0)
    if case.trace.exists():
        case.trace.rmdir()
        outcome = "execution"
    return outcome


def fuzz(count: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Mutates `count` files of each kind; returns the outcomes of each."""
    results = {}
    kinds: tuple[Callable[..., Any], ...] = (Checkpoints, Weights, Datasets, Pictures)
    for kind in kinds:
        chance = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            case = kind(Path(folder), chance)
            outcomes: collections.Counter[str] = collections.Counter()
            for _ in range(count):
                case.mutate()
                outcomes[attempt(case)] += 1
        results[kind.__name__.lower()] = dict(sorted(outcomes.items()))
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the counts to this json")
    args = parser.parse_args()
    results = fuzz(args.count, args.seed)
    for kind, outcomes in results.items():
        print(f"{kind}: " + ", ".join(f"{name} {n}" for name, n in outcomes.items()))
    if args.output:
        files.write_json(args.output, records.measured(results))
    sys.exit(any(set(outcomes) - {"clear error", "correct"} for outcomes in results.values()))


if __name__ == "__main__":
    main()
