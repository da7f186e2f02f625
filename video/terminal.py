"""A program's terminal: Ctrl-C, a reader of its output who leaves, and mistakes that are answered in one line."""

import io
import os
import signal
import sys
from collections.abc import Callable

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


def run_program(name: str, work: Callable[[], None], stopped: str = "stopped") -> int:
    """Calls `work` and returns the program's exit code: 0, or after one line on stderr 2 for a mistake, 130 for Ctrl-C.

    A mistake is a ValueError, an OSError or WorkersDoNotStart. `stopped` is what the line says after Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    except (ValueError, OSError, WorkersDoNotStart) as error:
        print(f"{name}: error: {printable(error)}", file=sys.stderr)
        return 2
    return 0
