"""A program's terminal: Ctrl-C before the program is ready, and a reader of its output who leaves."""

import io
import os
import signal
import sys


class _Lasting(io.FileIO):
    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_terminal() -> None:
    """To be called before the slow imports, by the script that is run.

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
