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
from types import FrameType
from typing import Any, TextIO, get_args

from config.settings import GROUPS, flag
from errors import AlreadyFinished, Stopped, UnusableInput, printable
from runtime import signals

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes one talks to the user


def exit_code(script: Callable[[], None]) -> int:
    """Runs a script and turns what ends it into one line on stderr and an exit code.

    A mistake in the code is none of these: it shows its traceback.

    Returns:
        0 when it is done; 2 for input that cannot be used; 130 after Ctrl-C, 143 after SIGTERM and
        likewise after other signals; 1 when the run itself failed (disk, memory, numbers that are
        not finite).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        spec = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(spec, "_initializing", False):  # its import swallows what is raised now and then
            print(Stopped(number), file=sys.stderr, flush=True)
            os._exit(128 + number)
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.exc_info()[1]:
            return  # one process has failed, so torchrun ends all: what this one says comes first
        raise Stopped(number)

    with _lasting_streams(), signals.handled(stop):
        try:
            script()
            return 0
        except AlreadyFinished as done:
            print(done)
            return 0
        except UnusableInput as error:
            return _fail(error, 2)
        except Stopped as stopped:
            print(stopped, file=sys.stderr, flush=True)
            return 128 + stopped.number
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
            return 130
        except (OSError, MemoryError, FloatingPointError) as error:
            return _fail(error, 1)
        except RuntimeError as error:  # torch has an own type for this on GPUs only
            if not re.search("out of memory|allocate", str(error)):
                raise
            reason = str(error).split("\n")[0]
            return _fail(f"out of memory ({reason}): {OUT_OF_MEMORY}", 1)


OUT_OF_MEMORY = (
    "try a smaller --batch-size, when fine-tuning a smaller --image-size, and --no-cache if it "
    "happened while features were computed"
)


def _fail(reason: BaseException | str, code: int) -> int:
    text = printable(reason if str(reason) else type(reason).__name__)
    stream = sys.stderr
    if not FIRST and code == 2:
        # torchrun ends all when one has ended: the first is to speak before
        with signals.handled(lambda *_: os._exit(code)):
            time.sleep(10)
    elif not FIRST:
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
    streams = (sys.stdout, sys.stderr) if FIRST else (None, None)
    with open(os.devnull, "w") as null:
        out, err = (LastingStream(null if s is None else s) for s in streams)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                yield
            finally:
                out.flush()


def typed(script: str, argv: list[str] | None) -> list[str]:
    """The command a person would type for this run, where they stand, as its words."""
    python, path = Path(sys.executable), Path(__file__).parent.parent / script
    words = []
    for whole, usual in ((python, "python"), (path, script)):
        try:  # the environment of `make train` need not be the active one
            words.append(str(whole.relative_to(Path.cwd())))
        except ValueError:
            found = shutil.which(usual) if whole is python else None
            words.append(usual if found == str(whole) else str(whole))
    return [*words, *(sys.argv[1:] if argv is None else argv)]


def quoted(words: list[str]) -> str:
    """A command as the system's shell takes it; cmd and PowerShell know no single quotes."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command(script: str, argv: list[str] | None) -> str:
    """What starts this training again, torchrun included; where machines meet is not known."""
    python, *rest = typed(script, argv)
    total, here = (int(os.environ.get(f"{of}WORLD_SIZE", 1)) for of in ("", "LOCAL_"))
    if total > 1:
        meet = f"--nnodes {total // here} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        where = "--standalone" if total == here else meet
        rest = [*f"-m torch.distributed.run {where} --nproc-per-node {here}".split(), *rest]
    return quoted([python, *rest])


class Parser(argparse.ArgumentParser):
    """Reports every unusable command line in one line and exit code 2, as all other input."""

    def __init__(self, script: str, description: str, epilog: str):
        kind = argparse.RawDescriptionHelpFormatter
        text = textwrap.fill(description, 79)
        super().__init__(script, None, text, epilog, formatter_class=kind)

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
    names = sorted(tables, key=lambda name: name != usual)
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for entry in dataclasses.fields(kind):
        known = {of: tables[of][entry.name] for of in names if entry.name in tables[of]}
        text = entry.metadata["help"] + _default(entry, known)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if entry.type is bool:
            options["action"] = argparse.BooleanOptionalAction
            if entry.name == "resume":
                options["action"] = "store_true"
        else:
            options["type"] = next(iter(get_args(entry.type)), entry.type)
            options["metavar"] = entry.name.rsplit("_", 1)[-1].upper()
        if choices := entry.metadata.get("choices"):
            options["metavar"] = "{" + ",".join(choices) + "}"
        groups[entry.metadata["group"]].add_argument(flag(entry.name), **options)


def _default(entry: dataclasses.Field, by_table: dict[str, Any]) -> str:
    """What `--help` says of a default, and of those that differ by recipe or network."""

    def text(value: Any) -> str:
        if value in (None, ""):
            return entry.metadata.get("shown", "none")
        return f"{value:g}" if isinstance(value, float) else str(value)

    if entry.type is bool:
        return f" (default: {'yes' if entry.default else 'no'})"
    if not by_table:
        return f" (default: {text(entry.default)})"
    usual, *others = by_table.items()
    different = [f"{of} {text(value)}" for of, value in others if value != usual[1]]
    return f" (default: {', '.join([text(usual[1]), *different])})"
