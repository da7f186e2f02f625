"""Which questions a step takes: a function of seed and step, so that the step number is the whole data position."""

import hashlib
import math
import os
from functools import lru_cache

import torch


@lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def epoch_order(count, seed, epoch):
    """A permutation of range(count), another one each epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())


def steps_of(epochs, count, prompts_per_step):
    """The steps of `epochs` passes over `count` samples; the last may begin the next pass, so that none is left out."""
    return math.ceil(epochs * count / prompts_per_step)


def step_samples(samples, step, prompts_per_step, seed):
    """The samples of `step` (0-based), over all processes: the next prompts_per_step of an endless run of epochs.

    No sample is left out or repeated within an epoch, whatever the remainder and the number of processes.
    """
    start, count = step * prompts_per_step, len(samples)
    slots = (divmod(slot, count) for slot in range(start, start + prompts_per_step))
    return [samples[epoch_order(count, seed, epoch)[place]] for epoch, place in slots]


def draw(samples, count):
    """`count` of the samples, in their order; all if there are no more. The same ones in every run and evaluation, so
    that their numbers compare; fewer are a part of more."""
    kept = set(epoch_order(len(samples), 0, 10**6)[:count])
    return [sample for number, sample in enumerate(samples) if number in kept]


def hold_out(samples, count, seed):
    """(training samples, `count` held-out ones) of one file. No video or image is on both sides: a training sample that
    shares one with a held-out sample is left out of both."""
    rows = list({sample.key: sample for sample in samples}.values())  # a weight repeats rows
    held = [rows[i] for i in epoch_order(len(rows), seed, 10**6)[:count]]
    media = {m for sample in held for m in (sample.key, *sample.media)}
    train = [s for s in samples if media.isdisjoint((s.key, *s.media))]
    return train, held


def digest(samples):
    """ "COUNT rows, digest HEX" of all that the rows say, with the names of their files but not the folders: a data set
    that was moved is the same."""
    total = hashlib.sha256()
    for s in samples:
        names = [os.path.basename(path) for path in (*s.videos, "", *s.images)]
        row = (s.key, s.problem, s.answer, s.problem_type, s.options, s.completions, names, s.clips, s.meta)
        total.update(repr(row).encode())  # of what UTF-8 cannot hold, repr gives the escape
    return f"{len(samples)} rows, digest {total.hexdigest()[:12]}"


def batched(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]
