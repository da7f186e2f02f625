"""A program's terminal: Ctrl-C, a reader of its output who leaves, and mistakes that are answered in one line."""

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches

from video.formats import printable
from video.pool import WorkersDoNotStart


class _Lasting(io.FileIO):
    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_terminal() -> None:
    """Prepares the terminal for a script, which calls this before its slow imports.

    Until the program installs its own handler, Ctrl-C ends it at once, without a traceback. Output that can no longer
    be written (`| head` has read enough, the terminal is closed) is lost, and the program goes on: a run must not die
    of a progress bar. A character that the terminal cannot show becomes its escape.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name, number in (("stdout", 1), ("stderr", 2)):
        encoding = "utf-8"
        if stream := getattr(sys, name):
            encoding = stream.encoding
        else:  # closed from the start
            number = os.open(os.devnull, os.O_WRONLY)
        buffer = io.BufferedWriter(_Lasting(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True))


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the flags that a misspelt flag may mean. A description keeps
    its line breaks, unless another formatter_class is given.

    synonyms: {flag that this program has not: flags that it stands for elsewhere}.
    """

    def __init__(self, *given, synonyms: dict[str, list[str]] | None = None, **named):
        super().__init__(*given, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **named})
        self.synonyms = synonyms or {}

    def error(self, message):
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = re.findall(r"(?<!\S)--\w+", message) if message.startswith("unrecognized") else []
        matches = [match for flag in wrong for match in meant(flag, flags, self.synonyms)]
        hint = f"did you mean {' '.join(matches)}?" if matches else "see --help"
        print(f"{self.prog}: error: {message} ({hint})", file=sys.stderr)
        raise SystemExit(2)


def meant(wrong: str, flags: list[str], synonyms: dict[str, list[str]]) -> list[str]:
    """Those of the flags that a wrong one may mean: the spelling of the nearest flag or synonym decides."""
    known = {old: own for old, new in synonyms.items() if (own := [flag for flag in new if flag in flags])}
    known |= {flag: [flag] for flag in flags}
    return [flag for near in get_close_matches(wrong, known, 1, 0.7) for flag in known[near]]


def exit_code(name: str, error: Exception) -> int:
    """Prints the one line that tells a user of a mistake: a ValueError, an OSError or WorkersDoNotStart. Returns the
    exit code. To be called in `except`: it raises any other error again."""
    if not isinstance(error, (ValueError, OSError, WorkersDoNotStart)):
        raise
    print(f"{name}: error: {printable(error)}", file=sys.stderr)
    return 2


def run_program(name: str, work: Callable, stopped: str = "stopped", exit_code: Callable = exit_code) -> int:
    """Calls `work` and returns the program's exit code: 0, or after one line on stderr 130 for Ctrl-C, and what
    `exit_code` returns for an error. `stopped` is what the line says after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    except Exception as error:
        return exit_code(name, error)
    return 0
