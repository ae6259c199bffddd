"""What the scripts share towards the user: flags out of settings, exit codes out of errors."""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO, get_args

from config.settings import GROUPS, flag
from errors import AlreadyFinished, Stopped, UnusableInput, printable
from runtime import launch, signals

OUT_OF_MEMORY = (
    "try a smaller --batch-size, when fine-tuning a smaller --image-size, and --no-cache if it "
    "happened while features were computed"
)


def before_torch(parse: Callable[[None], Any]) -> None:
    """Answers what needs no torch while the script has not imported it, which takes seconds.

    `--help` and a command line that cannot be used end the script here. From here on Ctrl-C ends
    it in one line (raised while torch is being imported, an exception may get lost), and so does
    an installation that cannot be used.

    Args:
        parse: of the script; reads `sys.argv`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        print(Stopped(number), file=sys.stderr, flush=True)
        os._exit(128 + number)

    def say(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if isinstance(error, UnusableInput):
            os._exit(_fail(error, 2))
        sys.__excepthook__(kind, error, where)

    code = exit_code(lambda: parse(None))
    if code > 0:
        sys.exit(code)
    signals.install(stop)
    sys.excepthook = say


def exit_code(script: Callable[[], Any]) -> int:
    """Runs a script and turns what ends it into one line on stderr and an exit code.

    A mistake in the code is none of these: it shows its traceback.

    Returns:
        0 when it is done; 2 for input that cannot be used; 130 after Ctrl-C, 143 after SIGTERM and
        likewise after other signals; 1 when the run itself failed (disk, memory, numbers that are
        not finite, a GPU that torch cannot use).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        failed = sys.exc_info()[1] is not None
        if failed and "TORCHELASTIC_RUN_ID" in os.environ:
            return  # one process has failed, so torchrun ends all: what this one says comes first
        raise Stopped(number)

    with _lasting_streams(), signals.handled(stop):
        try:
            script()
        except AlreadyFinished as done:
            print(done)
        except UnusableInput as error:
            return _fail(error, 2)
        except Stopped as stopped:
            print(stopped, file=sys.stderr, flush=True)
            return 128 + stopped.number
        except (OSError, MemoryError, FloatingPointError) as error:
            return _fail(error, 1)
        except RuntimeError as error:  # torch has few types of its own for these
            reason = str(error).split("\n")[0]
            if re.search("out of memory|allocate", str(error)):
                return _fail(f"out of memory ({reason}): {OUT_OF_MEMORY}", 1)
            if "no kernel image is available" in str(error):
                remedy = "install the torch that pytorch.org names for it, or take --device cpu"
                return _fail(f"this torch was not built for this GPU ({reason}): {remedy}", 1)
            raise
    return 0


def _fail(reason: BaseException | str, code: int) -> int:
    text = printable(reason)
    if not str(reason):
        text = type(reason).__name__
    stream = sys.stderr
    if launch.RANK > 0 and code == 2:
        # torchrun ends all processes when one has ended: the first is to speak before.
        with signals.handled(lambda number, frame: os._exit(code)):
            time.sleep(10)
    elif launch.RANK > 0:
        stream = sys.__stderr__
    print(f"error: {text}", file=stream, flush=True)
    return code


class LastingStream:
    """Standard output or error that never ends a training.

    Its reader may go away (`| head`, a closed terminal), its disk may fill, it may be unable to
    encode a file's name, or be absent: what cannot be written is dropped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        with suppress(AttributeError, ValueError, OSError):  # a notebook's stream cannot
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what can be written."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError):
            # What is left in the buffer would fail once more when Python ends.
            with suppress(OSError, ValueError, AttributeError):
                number = self._stream.fileno()
                with open(os.devnull, "wb") as null:
                    os.dup2(null.fileno(), number)


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """Standard output and error that last; only the first of several processes has them."""
    with open(os.devnull, "w") as null:
        out = LastingStream(null)
        err = LastingStream(null)
        if launch.RANK == 0 and sys.stdout is not None:
            out = LastingStream(sys.stdout)
        if launch.RANK == 0 and sys.stderr is not None:
            err = LastingStream(sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                yield
            finally:
                out.flush()


def command_words(script: str, argv: list[str] | None) -> list[str]:
    """The command a person would type for this run, where they stand, as its words."""
    python = Path(sys.executable)
    on_path = shutil.which("python")
    if python.is_relative_to(Path.cwd()):  # as `make train` runs it
        python_word = str(python.relative_to(Path.cwd()))
    elif on_path == str(python):
        python_word = "python"
    else:  # the environment need not be the active one
        python_word = str(python)

    path = Path(__file__).parent.parent / script
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    arguments = sys.argv[1:] if argv is None else argv
    return [python_word, str(path), *arguments]


def quoted(words: list[str]) -> str:
    """A command as the system's shell takes it; cmd and PowerShell know no single quotes."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command(script: str, argv: list[str] | None) -> str:
    """What starts this training again, torchrun included; where machines meet is not known."""
    python, *rest = command_words(script, argv)
    if launch.WORLD_SIZE == 1:
        return quoted([python, *rest])
    meeting = ["--standalone"]
    if launch.NUM_MACHINES > 1:
        machines = str(launch.NUM_MACHINES)
        meeting = ["--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
    here = ["--nproc-per-node", str(launch.LOCAL_WORLD_SIZE)]
    return quoted([python, "-m", "torch.distributed.run", *meeting, *here, *rest])


class Parser(argparse.ArgumentParser):
    """Reports every unusable command line in one line and exit code 2, as all other input."""

    def __init__(self, script: str, description: str, epilog: str):
        super().__init__(
            prog=script,
            description=textwrap.fill(description, 79),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a flag cut short may be a mistyped one
        )

    def error(self, message: str) -> None:
        """Raises instead of printing the usage over several lines."""
        raise UnusableInput(f"{printable(message)}; see --help")


def add_flags(
    parser: argparse.ArgumentParser, kind: type, tables: dict[str, dict[str, Any]], usual: str
) -> None:
    """Adds a flag for each setting, in groups; absent flags stay out of the result.

    Args:
        parser: gets the flags.
        kind: the dataclass of settings.
        tables: defaults by recipe or network.
        usual: the one that is taken where none is named.
    """
    names = sorted(tables, key=lambda name: name != usual)  # the usual one first
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for entry in dataclasses.fields(kind):
        by_table = {name: tables[name][entry.name] for name in names if entry.name in tables[name]}
        text = entry.metadata["help"] + _default(entry, by_table)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if entry.name == "resume":
            options["action"] = "store_true"
        elif entry.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _value_type(entry.type)
            options["metavar"] = entry.name.rsplit("_", 1)[-1].upper()
        if choices := entry.metadata.get("choices"):
            options["metavar"] = "{" + ",".join(choices) + "}"
        groups[entry.metadata["group"]].add_argument(flag(entry.name), **options)


def _value_type(annotation: Any) -> Any:
    """The type of a flag's value: `int` of `int` and of `int | None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if kinds else annotation


def _default(entry: dataclasses.Field, by_table: dict[str, Any]) -> str:
    """What `--help` says of a default, and of those that differ by recipe or network.

    Args:
        entry: the setting.
        by_table: its defaults by recipe or network, the usual one first; empty for other settings.
    """

    def text(value: Any) -> str:
        if value in (None, ""):
            return entry.metadata.get("shown", "none")
        return f"{value:g}" if isinstance(value, float) else str(value)

    if entry.type is bool:
        return " (default: yes)" if entry.default else " (default: no)"
    if not by_table:
        return f" (default: {text(entry.default)})"
    usual = next(iter(by_table.values()))
    different = [f"{name} {text(value)}" for name, value in by_table.items() if value != usual]
    if entry.metadata["own"]:
        different.append(f"with --pictures {entry.metadata['own']}")
    return f" (default: {', '.join([text(usual), *different])})"
