"""Kills trainings at random moments, resumes them, and compares what comes out bit for bit.

Every round trains a small network, is killed with SIGKILL again and again (half of the times on
purpose while a file is being written, which an injected delay makes likely), is resumed, and must
end in exactly the checkpoint and history of the run that nobody disturbed. The rounds take turns
at a plain training, one with Muon and growing images, one on cached features with dropout, and one
that begins three times and averages its weights.
"""

import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import finetune
import train_custom
from benchmarks import common
from display import pages  # noqa: F401  before the fork: no child spends time on these
from errors import UnusableInput
from reports import evaluation  # noqa: F401
from storage import (
    checkpoint,
    files,
    history,
)

# Some steps an epoch on a few hundred real images, some epochs.
SMALL = (
    "--limit 256 --batch-size 32 --epochs 3 --precision fp32 --device cpu --save-every 0.001 "
    "--run-name custom_cnn --resume"
)
JOBS = (
    (train_custom.main, "--recipe classic"),
    (train_custom.main, "--recipe speedrun --network tutorial"),
    (
        finetune.main,
        "--arch mobilenet_v3_small --unfreeze last --weights none --image-size 32",
    ),
    (
        finetune.main,
        "--arch mobilenet_v3_small --unfreeze most --weights none --image-size 32 --average 0.6 "
        "--rounds 3",
    ),
)


def outcome(folder: Path) -> tuple[dict[str, bytes], dict[str, Any], list[dict[str, Any]]]:
    """The final weights, metrics and history without its timings, to be compared bit for bit."""
    saved = checkpoint.load(folder / "checkpoints" / "custom_cnn.pt")
    weights = {name: value.numpy().tobytes() for name, value in saved["state_dict"].items()}
    rows = [
        {key: value for key, value in row.items() if key not in history.TIMINGS}
        for row in history.read(folder / "results" / "custom_cnn" / "history.csv")
    ]
    return weights, saved["metrics"], rows


class Trial:
    """A training in a folder of its own, in a child process that can be killed.

    Args:
        job: the index of one of `JOBS`.
        folder: an empty one.
        data_dir: where CIFAR-10 is kept.
    """

    def __init__(self, job: int, folder: Path, data_dir: Path):
        self.main, self.arguments = JOBS[job]
        self.folder, self.data_dir = folder, data_dir
        self.writing = mmap.mmap(-1, 1)  # holds 1 while the child is inside a write
        folder.mkdir()

    def start(self, delay: float) -> int:
        """Forks a training (resumed where it has begun) and returns its process id.

        `delay` seconds are added around each write.
        """
        self.writing[0] = 0
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            if delay:
                slow_down_writes(self.writing, delay)
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = os.fdopen(1, "w", 1)
            sys.stderr = os.fdopen(2, "w", 1)
            os.chdir(self.folder)
            arguments = f"{self.arguments} {SMALL}".split()
            status = self.main([*arguments, "--data-dir", str(self.data_dir)])
        finally:
            os._exit(status)

    def kill(self, chance: random.Random, longest: float) -> str:
        """Starts the training, waits for a random moment and kills it.

        Returns:
            "done" if it had ended by itself, "write" if it died inside a write, else "elsewhere".
        """
        pid = self.start(delay=0.01)
        on_purpose = chance.random() < 0.5
        until = time.monotonic() + chance.uniform(0, longest)
        while time.monotonic() < until or (on_purpose and not self.writing[0]):
            if self.ended(pid, os.WNOHANG):
                return "done"
            time.sleep(0.0005)
        died = "write" if self.writing[0] else "elsewhere"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return died

    def ended(self, pid: int, options: int = 0) -> bool:
        """Waits for a child, unless the options say not to; a failure of its own ends us too."""
        ended, status = os.waitpid(pid, options)
        if not ended:
            return False
        code = os.waitstatus_to_exitcode(status)
        if code:
            raise SystemExit(f"exit code {code}:\n{(self.folder / 'log.txt').read_text()[-2000:]}")
        return True

    def progress(self) -> tuple[int, int]:
        """Epoch and step of the saved state; beyond all where the run is through.

        Raises:
            UnusableInput: a state is not whole.
        """
        path = self.folder / "checkpoints" / "custom_cnn.pt"
        state, problems = checkpoint.load_state(path.with_suffix(".resume.pt"))
        if problems:
            raise UnusableInput(problems[0])
        if state is None:
            return (sys.maxsize, 0) if path.exists() else (0, 0)
        return state["epoch"], state["step"]


def slow_down_writes(writing: mmap.mmap, delay: float) -> None:
    """Makes every fsync and replace of `files.write_atomically` take a little longer."""
    write = files.write_atomically

    def slow(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            time.sleep(delay)
            function(*arguments)
            time.sleep(delay)

        return call

    def marked(path: Path, content: Any) -> None:
        writing[0] = 1
        try:
            write(path, content)
        finally:
            writing[0] = 0

    os.fsync = slow(os.fsync)
    os.replace = slow(os.replace)
    for module in (checkpoint, history, files):
        module.write_atomically = marked


def torture(
    rounds: int, kills: int, data_dir: Path, seed: int, report: bool = True
) -> dict[str, int]:
    """Runs the rounds and returns the counts.

    Args:
        rounds: trainings to disturb.
        kills: SIGKILLs a round; then the training is left alone to finish.
        data_dir: where CIFAR-10 is kept.
        seed: of the moments of the kills.
        report: print a line a round.

    Returns:
        rounds, kills, how many of them fell inside a write, results that differ from the
        undisturbed run's, unreadable states, and states older than one seen before.
    """
    torch.set_num_threads(1)  # a process with OpenMP's threads must not fork
    chance = random.Random(seed)
    keys = ("rounds", "kills", "inside_a_write", "differences", "unreadable", "lost")
    counts = dict.fromkeys(keys, 0)
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = []  # a third of its seconds and its outcome, for each job
        for job in range(min(rounds, len(JOBS))):
            begin = time.monotonic()
            trial = Trial(job, Path(scratch, f"whole{job}"), data_dir)
            trial.ended(trial.start(delay=0))
            # So that a run is killed several times before it is through.
            undisturbed.append(((time.monotonic() - begin) / 3, outcome(trial.folder)))
        for number in range(rounds):
            job = number % len(JOBS)
            longest, expected = undisturbed[job]
            trial = Trial(job, Path(scratch, str(number)), data_dir)
            reached = (0, 0)
            for _ in range(kills):
                died = trial.kill(chance, longest)
                if died == "done":
                    break
                counts["kills"] += 1
                counts["inside_a_write"] += died == "write"
                before = reached
                try:
                    reached = trial.progress()
                except UnusableInput:
                    counts["unreadable"] += 1
                counts["lost"] += reached < before
            trial.ended(trial.start(delay=0))
            counts["rounds"] += 1
            counts["differences"] += outcome(trial.folder) != expected
            if report:
                print(", ".join(f"{key} {value}" for key, value in counts.items()), flush=True)
    return counts


def main() -> None:
    """The command line."""
    parser = common.parser(__file__, __doc__, "cpu")
    parser.add_argument("--rounds", type=int, default=40, help="trainings to disturb")
    parser.add_argument("--kills", type=int, default=12, help="SIGKILLs at most in each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    counts = torture(args.rounds, args.kills, args.data_dir.resolve(), args.seed)
    common.write(args, counts)
    sys.exit(bool(counts["differences"] or counts["unreadable"] or counts["lost"]))


if __name__ == "__main__":
    main()
