"""Several processes that torchrun starts, against one; they run this file with a worker's name."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    PICTURES,
    ROOT,
    SAMPLE,
    WARNINGS,
    digest,
    outcome,
    rows,
    use_sample,
)
from torch import nn

import data
import engine
import evaluate
import models
import train_custom
from optimizers import make_optimizer, parameter_groups
from reports import evaluation
from runs import features
from runtime import launch, processes
from sources import cifar10
from storage import checkpoint

CPU = torch.device("cpu")
MINUTES = 2  # after which what hangs fails
TINY = {"widths": (8,) * 6, "hidden": (16, 16)}
EPOCHS, STEPS = 3, 6  # of the training below, and of its epochs
TRAIN = (
    *("--recipe", "classic", "--batch-size", "61", "--epochs", str(EPOCHS), "--device", "cpu"),
    *("--precision", "fp32", "--optimizer", "sgd", "--lr", "0.01"),
)


def torchrun(worker, *arguments, cwd, ranks=2, options=("--standalone",)):
    """Starts processes that run a worker of this file."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            *options,
            "--no-python",
            sys.executable,
            *WARNINGS,
            __file__,
            worker,
            *[str(argument) for argument in arguments],
        ],
        cwd=cwd,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Exit code and output of what `torchrun` started."""
    try:
        out, err = process.communicate(timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends the others
        raise
    return process.returncode, out, err


# What the processes do. -----------------------------------------------------------------------


class Doubles:
    """Batches in float64, in which rounding hides nothing."""

    def __init__(self, batches):
        self.batches = batches
        self.num_images, self.num_steps = batches.num_images, batches.num_steps

    def epoch(self, epoch, first_step=0):
        for x, labels in self.batches.epoch(epoch, first_step):
            yield x.double(), labels


def flat(model):
    """Parameters and BatchNorm's statistics as one vector."""
    tensors = model.state_dict().values()
    return torch.cat([t.flatten() for t in tensors if t.is_floating_point()]).clone()


def learn(model, trained, batches, optimizer, class_weights=None):
    """Trains in float64; every process must hold the same numbers after every step."""
    groups = parameter_groups(
        trained,
        optimizer=optimizer,
        classifier=model.classifier,
        weight_decay=0.1,
        muon_lr_scale=30,
    )
    optimizer = make_optimizer(groups, optimizer, 3e-3, "fp32")
    optimizer.dtype = torch.float64  # Muon's
    network = processes.shared(trained)
    steps = engine.train(
        network,
        optimizer,
        Doubles(batches),
        epochs=2,
        lr=3e-3,
        warmup=0.2,
        class_weights=class_weights,
    )
    for _ in steps:
        assert len(set(processes.from_all(digest(flat(model))))) == 1
    return flat(model)


def sample_split(count):
    with np.load(SAMPLE) as arrays:
        images, labels = arrays["train_images"][:count], arrays["train_labels"][:count]
    split = data.Split(torch.from_numpy(images), torch.from_numpy(labels).long())
    return split, data.channel_stats(images)


def part():
    return {"part": (launch.RANK, launch.WORLD_SIZE), "num_epochs": 2}


def custom_cnn(optimizer, class_weights=None):
    split, stats = sample_split(320)
    torch.manual_seed(0)
    arguments = models.NETWORKS["slim"] | {"widths": (8, 8, 16, 16, 16, 16), "hidden": (16, 16)}
    model = models.create_model("custom_cnn", arguments, 10)
    models.begin_from_images(model, data.normalize(split.images, stats))
    model.double()
    moved = data.Augmentation("alternating", translate=2, cutout=4)
    batches = data.TrainBatches(split, stats, 61, augmentation=moved, side=16, **part())
    return learn(model, model, batches, optimizer, class_weights)


def fine_tuned(unfreeze, cached, num_images, batch_size):
    from pretrained import freeze, parts  # torchvision takes seconds, and not every worker needs it

    split, stats = sample_split(num_images)
    torch.manual_seed(0)
    model = models.create_model("mobilenet_v3_small", {"image_size": 32}, 10).double()
    freeze(model, unfreeze)
    backbone, tail = parts(model, unfreeze)
    augmentation = data.Augmentation("alternating", translate=4 if unfreeze == "most" else 0)
    batches = data.TrainBatches(split, stats, batch_size, augmentation=augmentation, **part())
    if not cached:
        return learn(model, model, batches, "adamw")
    mine = split.images[launch.RANK :: launch.WORLD_SIZE]
    kept = features.compute_features(backbone, mine, stats, 32, "fp32", Path("unused"))
    return learn(model, tail, features.FeatureBatches(batches, kept), "adamw")


TRAININGS = {
    "CNN, Muon": (custom_cnn, "muon"),
    "CNN, AdamW, classes weighted": (custom_cnn, "adamw", torch.linspace(0.1, 1.9, 10)),
    "mobilenet": (fine_tuned, "last", False, 40, 13),
    # Of four images a batch, some processes' share is none.
    "mobilenet, cached": (fine_tuned, "last", True, 22, 4),
    "mobilenet, cached maps that move": (fine_tuned, "most", True, 10, 5),
}


def exact(model, x, precision):
    return model(x.to(next(model.parameters()).dtype))


def all_trainings():
    with patch.object(engine, "forward", exact), patch.object(features, "forward", exact):
        return {name: function(*rest) for name, (function, *rest) in TRAININGS.items()}


class Corner(nn.Flatten):
    """Gives ten pixels of an image as its logits."""

    def forward(self, x):
        return super().forward(x)[:, :10]


COUNTS = 1, 2, 5, 77  # of images to evaluate


def all_predictions():
    split, stats = sample_split(max(COUNTS))
    inputs = {n: data.inputs(processes.own_part(split.images[:n]), stats, 32, 9) for n in COUNTS}
    return {n: engine.predict(Corner(), x, tta="flip") for n, x in inputs.items()}


def compute():
    """Leaves what the trainings and evaluations above give."""
    with processes.joined(CPU):
        results = {"trained": all_trainings(), "predicted": all_predictions()}
        results["random"] = processes.from_all(torch.rand(3))
    if not launch.RANK:
        torch.save(results, "computed.pt")


def call(record, main, *argv, fault=lambda step: None):
    """Runs a script in the working folder; leaves in a file what this process did there."""
    rank, here = launch.RANK, Path.cwd()
    use_sample(here / "data" / str(rank))
    did = {"draws": [], "saves": 0, "written": []}
    step, save, create = engine.train_step, checkpoint.save_state, models.create_model

    def counted(*arguments, **options):
        did["draws"].append(torch.rand(1).item())  # as dropout would
        fault(len(did["draws"]))
        return step(*arguments, **options)

    def saved(*arguments):
        did["saves"] += 1
        save(*arguments)

    def note(event, about):
        if event != "open" or isinstance(about[0], int):
            return
        if about[2] & (os.O_WRONLY | os.O_RDWR) and here in Path(about[0]).absolute().parents:
            did["written"].append(str(about[0]))

    sys.addaudithook(note)
    with (
        patch.object(engine, "train_step", counted),
        patch.object(checkpoint, "save_state", saved),
        patch.dict(models.NETWORKS, tutorial=TINY),
        patch.object(models, "create_model", lambda *about: create(*about).double()),
        patch.object(engine, "forward", exact),
    ):
        try:
            did["code"] = main([*argv, "--data-dir", f"data/{rank}"])
        except SystemExit as end:
            did["code"] = end.code
    (here / f"{record}-{rank}.json").write_text(json.dumps(did))
    return did["code"]


def did(folder, record, rank):
    return json.loads((folder / f"{record}-{rank}.json").read_text())


def worker_all():
    """Computes, trains, evaluates, is given what it cannot use, is stopped in another training."""
    compute()
    assert call("train", train_custom.main, *TRAIN) == 0
    given = "checkpoints/custom_cnn.pt", "--results-dir", "evaluated"
    assert call("evaluate", evaluate.main, *given) == 0
    with patch.object(time, "sleep", lambda seconds: None):  # torchrun is to end none of them
        assert call("refuse", train_custom.main, *TRAIN, "--batch-size", "5000") == 2
    os.makedirs("interrupted", exist_ok=True)
    os.chdir("interrupted")
    sys.exit(call("train", train_custom.main, *TRAIN, fault=stop_all))


def stop_all(step):
    """The second process asks torchrun to stop, and is asked itself."""
    if launch.RANK == 1 and step == 9:
        heard, before = [], signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *about: (heard.append(1), before(*about)))
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getppid(), signal.SIGTERM)
        while not heard:
            time.sleep(0.01)


def worker_train(*folders):
    """Trains in folders, one after the other; goes on where something is unfinished."""
    for folder in folders:
        os.chdir(folder)
        if code := call("train", train_custom.main, *TRAIN, "--resume"):
            sys.exit(code)


def worker_die():
    """Computes; then the second process is killed in the second epoch of a training."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0":
        compute()

    def fault(step):
        if (attempt, launch.RANK, step) == ("0", 1, 9):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.exit(call(f"attempt{attempt}", train_custom.main, *TRAIN, "--resume", fault=fault))


def worker_hang(patience, *folders):
    """Trains in folders; in a last training the second process is halted."""
    worker_train(*folders)

    def fault(step):
        if launch.RANK == 1 and step == 3:
            # Torchrun kills what is still halted 30 s after it was told to end; that is its own.
            wake = f"sleep {2 * float(patience)}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", wake], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    processes.PATIENCE = timedelta(seconds=float(patience))
    sys.exit(call("hang", train_custom.main, *TRAIN, "--run-name", "other", fault=fault))


# What must come of it. ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What does not need the outcome of something else, two launches at a time."""

    def launch(worker, **options):
        folder = tmp_path_factory.mktemp(worker)
        return pool.submit(lambda: (folder, *ended(torchrun(worker, cwd=folder, **options))))

    with ThreadPoolExecutor(2) as pool:
        yield {
            2: launch("all"),
            3: launch("die", ranks=3, options=("--standalone", "--max-restarts", "1")),
            "machines": pool.submit(two_agents, tmp_path_factory.mktemp("agents")),
        }


def two_agents(folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{found.getsockname()[1]}"
    meet = *("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place), "--node-rank"
    agents = [
        torchrun("train", folder, cwd=folder, ranks=1, options=(*meet, str(number)))
        for number in (0, 1)
    ]
    return folder, [ended(agent) for agent in agents]


@pytest.fixture(scope="module")
def alone():
    return {"trained": all_trainings(), "predicted": all_predictions()}


@pytest.fixture(scope="module", params=[2, 3])
def together(request, launched):
    folder, _, _, err = launched[request.param].result()
    assert (folder / "computed.pt").exists(), err
    return torch.load(folder / "computed.pt")


@pytest.fixture(scope="module")
def reference(launched):
    """Folder and output of a run of two processes that nothing interrupts, and what followed."""
    folder, _, out, err = launched[2].result()
    assert (folder / "refuse-0.json").exists(), err
    return folder, out, err


@pytest.fixture(scope="module")
def interrupted(launched):
    """The same run, which torchrun was asked to stop in its ninth step."""
    folder, code, _, err = launched[2].result()
    assert code, err
    return folder / "interrupted", err


@pytest.mark.parametrize("name", TRAININGS)
def test_processes_train_as_one_does(alone, together, name):
    difference = (together["trained"][name] - alone["trained"][name]).abs().max()
    assert difference < (1e-4 if "cached" in name else 1e-6)  # features are kept in float32


@pytest.mark.parametrize("count", COUNTS)
def test_evaluation_counts_every_image_once_and_in_order(alone, together, count):
    for theirs, ours in zip(together["predicted"][count], alone["predicted"][count], strict=True):
        assert len(ours) == count
        assert torch.equal(theirs, ours)


def test_every_process_draws_random_numbers_of_its_own(together):
    assert len({tuple(drawn.tolist()) for drawn in together["random"]}) == len(together["random"])


def test_only_the_first_process_prints_and_writes(reference):
    folder, out, _ = reference
    assert out.count("test accuracy") == 1
    assert len(rows(folder / "results/custom_cnn")) == EPOCHS
    for record in ("train", "evaluate"):
        assert did(folder, record, 0)["written"]
        assert did(folder, record, 1)["written"] == []


def test_unusable_input_is_said_once_and_ends_all_with_exit_code_2(reference):
    folder, _, err = reference
    assert [did(folder, "refuse", rank)["code"] for rank in (0, 1)] == [2, 2]
    said = "error: --batch-size 5000: there are 308 training images; take at most 308\n"
    assert err.startswith(said)
    assert err.count(said) == 1


# What torchrun sets; the rank of each process comes to it.
LAUNCHED = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}


def test_unusable_command_line_is_said_by_the_first_process_and_the_second_waits_for_it():
    code = """
import os, sys, time, train_custom
time.sleep = lambda seconds: os.write(1, b"waits")
sys.exit(train_custom.main())
"""
    launched = [
        subprocess.run(
            [sys.executable, "-c", code, "--lr", "-1"],
            cwd=ROOT,
            env=ENVIRONMENT | LAUNCHED | {"RANK": rank, "LOCAL_RANK": rank},
            capture_output=True,
            text=True,
        )
        for rank in "01"
    ]
    assert [process.returncode for process in launched] == [2, 2]
    assert [process.stdout for process in launched] == ["", "waits"]
    assert [process.stderr.count("error: --lr -1.0") for process in launched] == [1, 0]


@pytest.mark.parametrize(
    "exported", [{"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "", "RANK": ""}]
)
def test_what_a_job_system_exports_makes_no_second_process(exported):
    code = "from runtime import launch; print(launch.RANK, launch.WORLD_SIZE)"
    told = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT | exported, text=True
    )
    assert told == "0 1\n"


def test_evaluation_by_two_processes_gives_the_same_report(reference, workplace):
    folder, out, _ = reference
    assert out.count("top-1 accuracy") == 1
    given = str(folder / "checkpoints/custom_cnn.pt"), "--results-dir", "results"
    assert evaluate.main([*given]) == 0
    theirs, ours = (
        json.loads((path / "custom_cnn/test.json").read_text())
        for path in (folder / "evaluated", workplace / "results")
    )
    for moody in ("seconds", "date"):
        theirs.pop(moody)
        ours.pop(moody)
    assert theirs == nearly(ours)


def nearly(content):
    """Equal but for rounding, however deep the numbers lie."""
    if isinstance(content, dict):
        return {key: nearly(value) for key, value in content.items()}
    if isinstance(content, list):
        return [nearly(value) for value in content]
    return pytest.approx(content, rel=1e-4) if isinstance(content, float) else content


def test_two_agents_train_as_two_machines_do(reference, launched):
    folder, agents = launched["machines"].result()
    assert [code for code, _, _ in agents] == [0, 0], agents
    described = json.loads((folder / "results/custom_cnn/config.json").read_text())
    assert [described["environment"][key] for key in ("processes", "machines")] == [2, 2]
    assert outcome(folder) == outcome(reference[0])


def test_sigterm_stops_all_processes_at_one_step_with_the_state_saved_once(interrupted):
    folder, err = interrupted
    records = [did(folder, "train", rank) for rank in (0, 1)]
    assert [(record["code"], len(record["draws"])) for record in records] == [(143, 9)] * 2
    assert [record["saves"] for record in records] == [2, 0]  # after the first epoch, and now
    assert err.count("state saved; continue with") == 1
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 " in err
    state, problems = checkpoint.load_state(folder / "checkpoints/custom_cnn.resume.pt")
    assert (state["epoch"], state["step"], problems) == (1, 3, [])


def test_killed_process_ends_all_in_one_message_and_a_restart_finishes_the_run(launched):
    folder, code, _, err = launched[3].result()
    assert code == 0, err
    assert err.count("another of the 3 processes has ended") == 1
    assert "the training's state is kept" in err
    assert [did(folder, "attempt0", rank)["code"] for rank in (0, 2)] == [1, 1]
    again = did(folder, "attempt1", 1)
    assert (again["code"], len(again["draws"])) == (0, (EPOCHS - 1) * STEPS)
    assert len(rows(folder / "results/custom_cnn")) == EPOCHS


@pytest.fixture(scope="module")
def resumed(interrupted, tmp_path_factory):
    """Two copies of the interrupted run that two processes finish; and one that hangs."""
    folder = tmp_path_factory.mktemp("resumed")
    same, mixed = folder / "same", folder / "mixed"
    for copy in (same, mixed):
        shutil.copytree(interrupted[0], copy)

    def stop(step):  # one process goes on with the second for a while
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(mixed)
        monkeypatch.setattr(cifar10, "SHA256", cifar10.SHA256)
        assert call("alone", train_custom.main, *TRAIN, "--resume", fault=stop) == 143
    patience = 6
    begin = time.monotonic()
    process = torchrun("hang", patience, same, mixed, cwd=folder)
    return same, mixed, ended(process), time.monotonic() - begin


def test_resumed_by_as_many_processes_a_run_repeats_every_bit(resumed, reference):
    same, _, (_, _, err), _ = resumed
    assert outcome(same) == outcome(reference[0]), err
    for rank in (0, 1):
        draws = did(reference[0], "train", rank)["draws"]
        assert did(same, "train", rank)["draws"] == draws[9:]


def test_resumed_by_one_process_and_by_two_again_a_run_ends_nearly_the_same(resumed, reference):
    _, mixed, (_, _, err), _ = resumed
    steps = [len(did(mixed, record, 0)["draws"]) for record in ("alone", "train")]
    assert steps == [5, EPOCHS * STEPS - 9 - 5], err
    theirs, ours = (
        checkpoint.load(folder / "checkpoints/custom_cnn.pt")["state_dict"]
        for folder in (mixed, reference[0])
    )
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-8)


def test_halted_process_ends_the_run_within_the_stated_time(resumed):
    _, mixed, (code, _, err), seconds = resumed
    assert (bool(code), did(mixed, "hang", 0)["code"]) == (True, 1), err
    assert err.count("or was silent for 0.1 minutes") == 1
    assert seconds < 60


if __name__ == "__main__":
    vars(evaluation).update(dict.fromkeys(PICTURES, lambda *_: None))
    # Optimisers and torchvision import it for a decorator; it takes as long as all the rest.
    dynamo = Mock(disable=lambda function, *_, **__: function)
    sys.modules |= {"torch._dynamo": dynamo, "torch._dynamo.utils": dynamo}
    torch._dynamo = dynamo
    globals()[f"worker_{sys.argv[1]}"](*sys.argv[2:])
