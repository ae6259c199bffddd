"""The files of a run: where they lie, whether its name is free, who holds it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from errors import UnusableInput, printable
from storage.files import holder, locked, previous, unfinished_writes


@dataclass(frozen=True)
class RunFiles:
    """Where the files of one run lie.

    Attributes:
        name: of the run.
        checkpoint_dir: the folder of all runs' checkpoints.
        all_results_dir: the folder that holds a folder for each run.
    """

    name: str
    checkpoint_dir: Path
    all_results_dir: Path

    @property
    def checkpoint_path(self) -> Path:
        """Where the final weights go."""
        return self.checkpoint_dir / f"{self.name}.pt"

    @property
    def state_path(self) -> Path:
        """Where the state of the unfinished run is kept."""
        return self.checkpoint_dir / f"{self.name}.resume.pt"

    @property
    def results_dir(self) -> Path:
        """Where numbers and pictures go."""
        return self.all_results_dir / self.name

    def has_state(self) -> bool:
        """Whether the run was interrupted and its state saved."""
        return has_state(self.state_path)

    def is_finished(self) -> bool:
        """Whether its checkpoint or test result stands, and its state is gone."""
        if self.has_state():
            return False
        return self.checkpoint_path.exists() or (self.results_dir / "test.json").exists()

    def first_unfinished(self) -> "RunFiles":
        """Those of the same name, or of the next of name-2, name-3, ... that has not finished."""
        files = self
        number = 1
        while files.is_finished():
            number += 1
            files = replace(self, name=f"{self.name}-{number}")
        return files

    def sweep(self) -> None:
        """Removes what a kill in the middle of a write has left of this run."""
        left = [
            *unfinished_writes(self.checkpoint_dir, self.checkpoint_path.name),
            *unfinished_writes(self.checkpoint_dir, self.state_path.name),
            *unfinished_writes(self.results_dir),
        ]
        for path in left:
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from training a run of this name while the block runs.

        Raises:
            UnusableInput: another one does; or a person's file lies where the lock is to be.
        """
        with ExitStack() as stack:
            for path in (
                self.checkpoint_dir / f"{self.name}.lock",
                self.all_results_dir / f".{self.name}.lock",
            ):
                stack.enter_context(_held(path, self.name))
            yield


def has_state(state_path: Path) -> bool:
    """Whether a state, or the one before it, was saved there."""
    return state_path.exists() or previous(state_path).exists()


@contextmanager
def _held(path: Path, name: str) -> Iterator[None]:
    text = b""
    with suppress(OSError):  # there is none, or Windows does not let a locked file be read
        text = path.read_bytes()
    if text and not text.isdigit():
        raise UnusableInput(
            f"{printable(path)}: is no lock of a run, and run {name} would replace it; move "
            "it away, or give another --run-name"
        )
    with locked(path, wait=False) as obtained:
        if not obtained:
            process = holder(path)
            which = f" ({process}, perhaps suspended)" if process else ""
            raise UnusableInput(
                f"run {name} is being trained by another process{which}: wait for it, or give "
                "--run-name"
            )
        yield
