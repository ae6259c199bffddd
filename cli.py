"""The command line that the scripts share: flags out of a dataclass, exit codes out of errors."""

import argparse
import dataclasses
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from config import flag

# What a path or value that cannot be used raises.
UNUSABLE = (
    *(ValueError, FileNotFoundError, FileExistsError),
    *(PermissionError, NotADirectoryError, IsADirectoryError),
)


def exit_code(script: Callable[[], None]) -> int:
    """Runs a script and turns its errors into one line on stderr and an exit code.

    Returns:
        0 when it is done; 2 for input that cannot be used; 130 after Ctrl-C and 143 after SIGTERM;
        1 when the run itself failed (disk, memory, numbers that are not finite).
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        script()
        sys.stdout.flush()
        return 0
    except UNUSABLE as error:
        return _fail(error, 2)
    except Stopped as stop:
        print(stop, file=sys.stderr, flush=True)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, FloatingPointError) as error:
        return _fail(error, 1)
    except RuntimeError as error:  # torch has an own type for this on GPUs only
        if not re.search("out of memory|allocate", str(error)):
            raise
        reason = str(error).split("\n")[0]
        return _fail(f"out of memory, try a smaller --batch-size ({reason})", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


class Stopped(BaseException):  # no `except Exception` may swallow a signal
    """A signal asked the run to stop; the message says what was kept and how to go on."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number


def _fail(reason: object, code: int) -> int:
    text = " ".join(str(reason).split("\n")) if code == 2 else str(reason)
    print(f"error: {text or type(reason).__name__}", file=sys.stderr, flush=True)
    return code


def command_line(script: str, argv: list[str] | None) -> str:
    """The command a person would type for this run."""
    python = "python"
    with suppress(ValueError):  # the environment of `make train` need not be the active one
        inside = Path(sys.executable).relative_to(Path.cwd())
        python = str(inside)
    return shlex.join([python, script, *(sys.argv[1:] if argv is None else argv)])


class Parser(argparse.ArgumentParser):
    """Reports every unusable command line in one line and exit code 2, as the checks below do."""

    def error(self, message: str) -> None:
        """Raises instead of printing the usage over several lines."""
        raise ValueError(f"{message}; see --help")


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds a flag for each setting of a config dataclass; absent flags stay out of the result."""
    for entry in dataclasses.fields(kind):
        if entry.metadata.get("internal"):
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": entry.metadata["help"]}
        if entry.type is bool:
            options["action"] = argparse.BooleanOptionalAction
            if entry.name == "resume":
                options["action"] = "store_true"
        else:
            options["type"] = next(iter(get_args(entry.type)), entry.type)
            options["metavar"] = entry.name.rsplit("_", 1)[-1].upper()
        if choices := entry.metadata.get("choices"):
            options.update(choices=choices, metavar=None)
        parser.add_argument(flag(entry.name), **options)
