"""Ends of a run before its last step: signals, a lost process, too little memory, updates that keep failing."""

import signal
import time
from contextlib import contextmanager

import torch.distributed as dist

PATIENCE = 3  # seconds; torchrun and a terminal may each deliver the same Ctrl-C


class Stopped(Exception):
    """Raised in every process alike, before `step`, once any of them was asked to stop."""

    def __init__(self, step):
        super().__init__(f"stopped before step {step}")
        self.step = step


class RunError(RuntimeError):
    """A run that cannot go on; one line with the mend."""


@contextmanager
def listening():
    """Yields a function that says whether SIGTERM or SIGINT has come. A second one, later, ends the run without saving.

    torchrun passes a signal on and kills after 30 s; where a step and a save take longer (two, where one is being
    written), give it --shutdown_timeout.
    """
    times = []

    def note(number, _):
        if times and time.monotonic() - times[0] > PATIENCE:
            raise KeyboardInterrupt
        times.append(time.monotonic())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(times)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lost_process(error):
    """Whether a RuntimeError says that another process of the group is gone: its own message says why."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(w in str(error) for w in words)


def memory_message(prompts, config, error):
    """What went out of memory, in samples and tokens, and the flags that help."""
    samples = ", ".join(f"{p.sample.key} ({len(p.input_ids)} tokens)" for p in prompts) or "weights or an evaluation"
    mends = ["--max_frames", "--max_pixels", "--max_new_tokens", "--group_size"]
    crowded = ("prompts_per_forward", "prompts_per_rollout") if prompts else ("eval_batch",)
    mends += [f"--{name}" for name in crowded if getattr(config, name) > 1]
    mends += [] if prompts else ["for weights take more processes, or set --lora_rank"]
    mends += [] if config.gradient_checkpointing else ["or set --gradient_checkpointing"]
    mends += [] if config.freeze_vision else ["or set --freeze_vision"]
    return f"out of memory on {samples}: lower {', '.join(mends)}; see --plan ({str(error).splitlines()[0]})"


def count_bad(in_a_row, metrics, config, step):
    """How many steps in a row, this one included, left an update out. Raises RunError at config.max_bad_updates."""
    in_a_row = in_a_row + 1 if metrics["updates_skipped"] else 0
    if in_a_row == config.max_bad_updates:
        raise RunError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, up to step {step}: lower --learning_rate "
            "or raise --kl_coef, and go on from the last checkpoint; --max_bad_updates allows more"
        )
    return in_a_row
