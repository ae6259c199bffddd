"""What ends a run through no mistake of the code; the scripts turn each into an exit code."""

import signal


class UnusableInput(Exception):
    """What the user gave cannot be used; the message says the value, the rule and the remedy."""


class AlreadyFinished(UnusableInput):
    """`--resume` names a run that needs nothing more."""


class Stopped(BaseException):  # no `except Exception` may swallow a signal
    """A signal asked the run to stop; the message says what was kept and how to go on."""

    def __init__(self, number: int, message: str = ""):
        if not message:
            message = f"stopped by {signal.Signals(number).name}"
        super().__init__(message)
        self.number = number


def printable(text: object) -> str:
    """Text from outside on one line, its control characters and broken bytes as escapes."""
    line = " ".join(str(text).split())
    if not line:  # nothing but white space
        return repr(str(text))
    characters = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in line]
    return "".join(characters)
