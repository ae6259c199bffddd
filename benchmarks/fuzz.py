"""Feeds damaged and hostile checkpoints, data sets, weights and pictures to what opens them.

Each must give one clear error (UnusableInput, OSError) or the correct result; never another
exception, a hang, an execution, or a wrong answer.
"""

import collections
import contextlib
import gzip
import io
import pickle
import random
import signal
import struct
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common
from benchmarks.mutations import Code, compressed, damaged, hostile_npz, rewritten, saved
from data import ChannelStats, Split
from errors import UnusableInput
from models import create_model
from reports import evaluation
from runs import loading
from sources import cifar10, pictures
from storage import checkpoint, tensorfile
from storage.files import sha256

SAMPLE = Path(__file__).parent.parent / "tests" / "sample.npz"
SECONDS = 20  # after which a loader counts as hanging


class Case:
    """A kind of file.

    `mutate` damages it, `load` opens it. The result must be that of the whole file, `expected`;
    any will do where the content was changed on purpose (`changed`), so that it has its own.
    """

    def __init__(self, folder: Path, chance: random.Random):
        self.folder, self.path, self.chance = folder, folder / "it.pt", chance
        self.trace, self.changed = folder / "executed", False  # what hostile files would leave
        with np.load(SAMPLE) as arrays:
            self.arrays = {name: arrays[name] for name in cifar10.SHA256}
        torch.manual_seed(0)
        self.prepare()
        self.expected = self.load()


class Checkpoints(Case):
    """A small trained-looking checkpoint, by the logits of some images."""

    def prepare(self) -> None:
        """Writes it."""
        surgery = {"widths": (8, 8, 8, 8, 8, 8), "hidden": (8, 8)}
        model = create_model("custom_cnn", surgery, 10)
        images = torch.from_numpy(self.arrays["test_images"][:8])
        self.split = Split(images, torch.zeros(8, dtype=torch.int64))
        self.content = {
            **{"format": checkpoint.FORMAT, "name": "it", "arch": "custom_cnn", "surgery": surgery},
            **{"classes": list(cifar10.CLASSES), "mean": [0.5] * 3, "std": [0.25] * 3},
            **{"config": {"limit": None}, "metrics": {"temperature": 1.5}, "environment": {}},
            "state_dict": dict(model.state_dict()),
        }
        checkpoint.save(self.path, self.content)
        self.whole = self.path.read_bytes()

    def mutate(self) -> None:
        """Damages the bytes, or changes the content and signs it again."""
        kind, self.changed = self.chance.random(), False
        if kind < 0.6:
            self.path.write_bytes(damaged(self.whole, self.chance))
        elif kind < 0.95:
            content = rewritten(self.content, self.chance, self.trace)
            with contextlib.suppress(ValueError, TypeError):  # what is refused needs no signature
                tensorfile._check(content, len(self.whole))
                content["sha256"] = checkpoint.digest(content)
                self.changed = True
            self.path.write_bytes(saved(content))
        else:
            hostile = (saved(Code(self.trace)), pickle.dumps(Code(self.trace)))
            self.path.write_bytes(self.chance.choice((*hostile, compressed(self.whole))))

    def load(self) -> str:
        """Predicts as evaluate.py does."""
        model, saved = checkpoint.load_model(self.path)
        stats, side = ChannelStats(saved["mean"], saved["std"]), saved.get("image_size", 32)
        return checkpoint.digest(evaluation.predict_split(model, self.split, stats, side)[0])


class Weights(Case):
    """A state dict of MobileNetV3-small as a user would name it with --weights."""

    def prepare(self) -> None:
        """Writes it, and makes the network that it goes into."""
        self.content = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
        self.whole = saved(self.content)
        self.path.write_bytes(self.whole)
        self.model = create_model("mobilenet_v3_small", {"image_size": 32}, 10)

    def mutate(self) -> None:
        """Damages the bytes, or changes the content."""
        self.changed = self.chance.random() < 0.4
        content = rewritten(self.content, self.chance, self.trace) if self.changed else None
        content = saved(content) if content else damaged(self.whole, self.chance)
        self.path.write_bytes(content)

    def load(self) -> str:
        """Begins as finetune.py does."""
        loading.start_weights(self.model, str(self.path), "mobilenet_v3_small", cifar10.CLASSES)
        return checkpoint.digest(dict(self.model.state_dict()))


class Datasets(Case):
    """CIFAR-10's cache and the official archive, made of the sample, in a folder without network.

    What does not have the published hash is refused unopened; a cache and a tar have none.
    """

    def prepare(self) -> None:
        """Makes whole ones, and hashes of theirs in the place of the published ones."""
        self.cache, buffer, md5 = self.folder / cifar10.CACHE, io.BytesIO(), {}
        np.savez(self.cache, **self.arrays)
        self.whole = self.cache.read_bytes()
        images, labels = (
            [*np.split(self.arrays[f"train_{kind}"], 5), self.arrays[f"test_{kind}"]]
            for kind in ("images", "labels")
        )
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, some, of in zip(cifar10.BATCH_MD5, images, labels, strict=True):
                planes = some.transpose(0, 3, 1, 2).reshape(len(some), -1)
                content = pickle.dumps({"data": planes, "labels": of.tolist()}, protocol=2)
                md5[name], member = cifar10._md5(content), tarfile.TarInfo(f"folder/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        self.tar = buffer.getvalue()
        hashes = {name: sha256(array.tobytes()) for name, array in self.arrays.items()}
        self.published = {"SHA256": hashes, "BATCH_MD5": md5}

    def mutate(self) -> None:
        """Damages the cache and the archive, or puts hostile ones there."""
        kind = self.chance.random()
        self.cache.unlink(missing_ok=True)
        if kind < 0.6:
            self.cache.write_bytes(damaged(self.whole, self.chance))
        elif kind < 0.8:
            self.cache.write_bytes(hostile_npz(self.arrays, self.chance, self.trace))
        tar = self.tar if self.chance.random() < 0.2 else damaged(self.tar, self.chance)
        (self.folder / cifar10.UNPACKED).write_bytes(tar)
        (self.folder / cifar10.ARCHIVE).write_bytes(gzip.compress(tar, 1))

    def load(self) -> str:
        """Opens the four arrays from what lies in the folder."""
        with (
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.multiple(cifar10, **self.published),
        ):
            arrays = cifar10.cifar10(self.folder, cifar10.LOCAL)
        return sha256(b"".join(getattr(arrays, name).tobytes() for name in self.arrays))


# A sound header that promises a billion pixels.
HEADER = b"IHDR" + struct.pack(">IIBBBBB", 32_000, 32_000, 1, 0, 0, 0, 0)
CHECKSUM = struct.pack(">I", zlib.crc32(HEADER))
HUGE_PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + HEADER + CHECKSUM


class Pictures(Case):
    """A photograph in many formats, by shape and type: damaged pixels nothing can know."""

    def prepare(self) -> None:
        """Writes it in each format."""
        image = Image.fromarray(self.arrays["test_images"][0]).resize((61, 47))
        self.whole = [HUGE_PNG]
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA"):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            self.whole.append(buffer.getvalue())
        self.path.write_bytes(self.whole[-1])

    def mutate(self) -> None:
        """Damages one of the formats."""
        self.path.write_bytes(damaged(self.chance.choice(self.whole), self.chance))

    def load(self) -> str:
        """Reads as evaluate.py does."""
        picture = pictures.load(self.path)
        return f"{picture.shape} {picture.dtype}"


class Hang(BaseException):
    """Raised by the alarm; no loader can take it for a damaged file."""


def attempt(case: Case) -> str:
    """Loads a mutated file and says what came of it."""

    def hang(number: int, frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        outcome = "correct" if case.load() == case.expected or case.changed else "wrong answer"
    except Hang:
        outcome = "hang"
    except (UnusableInput, OSError) as error:
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
    for kind in (Checkpoints, Weights, Datasets, Pictures):
        with tempfile.TemporaryDirectory() as folder:
            case = kind(Path(folder), random.Random(seed))
            outcomes: collections.Counter[str] = collections.Counter()
            for _ in range(count):
                case.mutate()
                outcomes[attempt(case)] += 1
        results[kind.__name__.lower()] = dict(sorted(outcomes.items()))
    return results


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--count", type=int, default=1000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = fuzz(args.count, args.seed)
    for kind, outcomes in results.items():
        print(f"{kind}: " + ", ".join(f"{name} {n}" for name, n in outcomes.items()))
    common.write(args, results)
    fine = {"clear error", "correct"}
    sys.exit(any(n for found in results.values() for name, n in found.items() if name not in fine))


if __name__ == "__main__":
    main()
