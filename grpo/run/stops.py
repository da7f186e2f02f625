"""Ends of a run before its last step: signals, a lost rank, too little memory, updates that keep failing."""

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from grpo.errors import ConfigError, ModelError, RunError
from video.formats import DataError, printable
from video.pool import WorkersDoNotStart

NAMED = 3  # samples in a message about memory
STOPPING = "\ntrain.py: stopping: saves after this step or evaluation; a second Ctrl-C ends at once, without saving\n"
PATIENCE = 3  # seconds; torchrun and a terminal may each deliver the same Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def listening():
    """Yields a function that returns the number of the first SIGTERM, SIGINT or SIGHUP that has come, 0 if none has. A
    second signal, later, ends the run without saving.

    torchrun passes a signal on and kills after 30 s; where a step and a save take longer (two, where one is being
    written), give it --shutdown_timeout.
    """
    got = []

    def note(number, _):
        if got and time.monotonic() - got[0][1] > PATIENCE:
            raise KeyboardInterrupt
        if not got and not int(os.environ.get("RANK", 0)):
            with suppress(OSError):  # the terminal is closed
                os.write(2, STOPPING.encode())  # print must not be called while it is at work
        got.append((number, time.monotonic()))

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: got[0][0] if got else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(program, error):
    """Prints the one line that tells a user of an error; returns the exit code: 3 if another process is gone, else 2.
    To be called in `except`: it raises again an error that nobody foresaw."""
    line, code = " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename or 'the system'}: {error.strerror}; once that is mended, the same command goes on"
    if out_of_memory(error):
        line = f"out of memory: lower --max_frames, --max_pixels or --eval_batch ({line or type(error).__name__})"
    elif "can't start new thread" in line:
        line = "the system starts no more threads: lower --workers, or raise the limit (ulimit -u, pids of a container)"
    elif not isinstance(
        error, (ConfigError, DataError, FloatingPointError, ModelError, OSError, RunError, WorkersDoNotStart)
    ):
        if not lost_process(error):
            raise
        line, code = f"another process is gone, see its message: {str(error).splitlines()[0]}", 3
    print(f"{program}: error: {printable(line)}", file=sys.stderr)
    return code


def out_of_memory(error):
    """Whether memory ran out. On a CPU torch raises a plain RuntimeError, which its words alone tell from others."""
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "Storage size calculation overflowed")
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or type(error) is RuntimeError and any(w in str(error) for w in words)


def lost_process(error):
    """Whether a RuntimeError says that another process of the group is gone: its own message says why."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(w in str(error) for w in words)


def memory_message(prompts, config, error):
    """What went out of memory, the longest three samples by name, and the flags that help."""
    longest = sorted(prompts, key=lambda p: len(p.input_ids), reverse=True)[:NAMED]
    samples = ", ".join(f"{p.sample.key} ({len(p.input_ids)} tokens)" for p in longest) or "weights or an evaluation"
    samples += f" and {len(prompts) - NAMED} more" if len(prompts) > NAMED else ""
    mends = ["--max_frames", "--max_pixels", "--max_new_tokens", "--group_size"]
    crowded = ("prompts_per_forward", "prompts_per_rollout") if prompts else ("eval_batch",)
    mends += [f"--{name}" for name in crowded if getattr(config, name) > 1]
    mends += [] if prompts else ["for weights take more processes, or set --lora_rank"]
    mends += [] if config.activation_checkpointing == "full" else ["or set --activation_checkpointing full"]
    mends += [] if config.freeze_vision else ["or set --freeze_vision"]
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"out of memory on {samples}: lower {', '.join(mends)}; see --plan ({reason})"


def count_bad(in_a_row, metrics, config, step):
    """How many steps in a row, this one included, left an update out. Raises RunError at config.max_bad_updates."""
    in_a_row = in_a_row + 1 if metrics["updates_skipped"] else 0
    if in_a_row == config.max_bad_updates:
        raise RunError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, up to step {step}: lower --learning_rate "
            "or raise --kl_coef, and go on from the last checkpoint; --max_bad_updates allows more"
        )
    return in_a_row
