"""Kills a training at random moments, resumes it, and compares what comes out bit for bit.

Every round trains a small network, is killed with SIGKILL again and again (half of the times on
purpose while a file is being written, which an injected delay makes likely), is resumed, and must
end in exactly the checkpoint and history of the run that nobody disturbed.
"""

import argparse
import csv
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import files
import history
import records
import reports  # noqa: F401  imported before the fork, so that no child spends time on it
import train_custom

# The classic network on a few hundred real images: some steps an epoch, some epochs.
ARGUMENTS = (
    *("--recipe", "classic", "--limit", "256", "--batch-size", "32", "--precision", "fp32"),
    *("--device", "cpu", "--epochs", "3", "--save-every", "0.001"),
)


def outcome(folder: Path) -> str:
    """One hash over the final weights, metrics and history without its timings."""
    saved = checkpoint.load(folder / "checkpoints" / "custom_cnn.pt")
    with open(folder / "results" / "custom_cnn" / "history.csv", newline="") as file:
        rows = [
            {key: value for key, value in row.items() if key not in history.TIMINGS}
            for row in csv.DictReader(file)
        ]
    return checkpoint.digest([dict(saved["state_dict"]), saved["metrics"], rows])


def train_in_child(folder: Path, data_dir: Path, writing: mmap.mmap, delay: float) -> int:
    """Forks a training (resumed where there is a state) and returns its process id.

    `writing[0]` is 1 while the child is inside a write; `delay` seconds are added to each.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        if delay:
            slow_down_writes(writing, delay)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        os.chdir(folder)
        state = folder / "checkpoints" / "custom_cnn.resume.pt"
        exists = state.exists() or checkpoint.previous(state).exists()
        resume = ["--resume"] if exists else []
        status = train_custom.main([*ARGUMENTS, *resume, "--data-dir", str(data_dir)])
    finally:
        os._exit(status)


def slow_down_writes(writing: mmap.mmap, delay: float) -> None:
    """Makes every fsync and replace of `files.write_atomically` take a little longer."""
    fsync, replace, write = os.fsync, os.replace, files.write_atomically

    def slow(function, *arguments):
        time.sleep(delay)
        function(*arguments)
        time.sleep(delay)

    def marked(path, content):
        writing[0] = 1
        try:
            write(path, content)
        finally:
            writing[0] = 0

    os.fsync = lambda *arguments: slow(fsync, *arguments)
    os.replace = lambda *arguments: slow(replace, *arguments)
    for module in (checkpoint, history, files):
        module.write_atomically = marked


def kill(pid: int, writing: mmap.mmap, chance: random.Random, longest: float) -> str:
    """Waits for a random moment and kills the child.

    Returns:
        "done" if it had ended by itself, "write" if it died inside a write, else "elsewhere".
    """
    on_purpose = chance.random() < 0.5
    until = time.monotonic() + chance.uniform(0, longest)
    while time.monotonic() < until or (on_purpose and not writing[0]):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"the run failed with {os.waitstatus_to_exitcode(status)}")
            return "done"
        time.sleep(0.0005)
    inside = bool(writing[0])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "write" if inside else "elsewhere"


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
    chance, writing = random.Random(seed), mmap.mmap(-1, 1)
    counts = dict.fromkeys(
        ("rounds", "kills", "inside_a_write", "differences", "unreadable", "lost"), 0
    )
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        begin = time.monotonic()
        finish_undisturbed(whole, data_dir, writing)
        # A third of a run at most, so that a run is killed several times before it is through.
        longest, expected = (time.monotonic() - begin) / 3, in_child(outcome, whole)
        for number in range(1, rounds + 1):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            reached = (0, 0)
            for _ in range(kills):
                if progress_is_final(folder):  # killed after its last step, or through
                    break
                writing[0] = 0
                pid = train_in_child(folder, data_dir, writing, delay=0.01)
                died = kill(pid, writing, chance, longest)
                if died == "done":
                    break
                counts["kills"] += 1
                counts["inside_a_write"] += died == "write"
                try:
                    before, reached = reached, in_child(progress, folder, reached)
                    counts["lost"] += reached < before
                except ValueError:
                    counts["unreadable"] += 1
            else:
                finish_undisturbed(folder, data_dir, writing)
            counts["rounds"] += 1
            counts["differences"] += in_child(outcome, folder) != expected
            if report:
                print(", ".join(f"{key} {value}" for key, value in counts.items()), flush=True)
    return counts


def progress_is_final(folder: Path) -> bool:
    """Whether the checkpoint stands and no state does: the training has nothing left to do."""
    folder = folder / "checkpoints"
    return (folder / "custom_cnn.pt").exists() and not any(folder.glob("*.resume.pt*"))


def progress(folder: Path, reached: tuple[int, int]) -> tuple[int, int]:
    """Epoch and step of the saved state; what was reached before once the run is through."""
    state, _ = checkpoint.load_state(folder / "checkpoints" / "custom_cnn.resume.pt")
    if state is None:
        done = (folder / "checkpoints" / "custom_cnn.pt").exists()
        return reached if done else (0, 0)
    return state["epoch"], state["step"]


def in_child(function, *arguments):
    """Runs a function in a fork: OpenMP must not start in this process, or later forks hang."""
    reading, sending = multiprocessing.get_context("fork").Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        try:
            sending.send(function(*arguments))
        except ValueError as error:
            sending.send(error)
        finally:
            os._exit(0)
    sending.close()
    result = reading.recv()
    os.waitpid(pid, 0)
    if isinstance(result, ValueError):
        raise result
    return result


def finish_undisturbed(folder: Path, data_dir: Path, writing: mmap.mmap) -> None:
    """Lets a training run to its end."""
    pid = train_in_child(folder, data_dir, writing, delay=0)
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"exit code {code}:\n{(folder / 'log.txt').read_text()[-2000:]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="trainings to disturb")
    parser.add_argument("--kills", type=int, default=12, help="SIGKILLs at most in each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, help="write the counts to this json")
    args = parser.parse_args()
    counts = torture(args.rounds, args.kills, args.data_dir.resolve(), args.seed)
    if args.output:
        files.write_json(args.output, records.measured(counts))
    sys.exit(bool(counts["differences"] or counts["unreadable"] or counts["lost"]))


if __name__ == "__main__":
    main()
