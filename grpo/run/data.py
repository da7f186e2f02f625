"""Which questions a run has, and which of them a step takes: a function of seed and step, so the step number is the
whole position in the data."""

import hashlib
import math
import os
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial

import torch

from rewards import check_sample
from rewards.grounding import timestamp_iou
from rewards.judge import JUDGED
from video.dataset import leave_out, read_mixture, read_samples, read_skip_list
from video.formats import DataError, each_row, printable


@lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def epoch_order(count, seed, epoch):
    """A permutation of range(count), another one each epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())


def steps_of(epochs, count, prompts_per_step):
    """The steps of `epochs` passes over `count` samples. The last step may begin the next pass: none is left out."""
    return math.ceil(epochs * count / prompts_per_step)


def draw_samples(samples, position, count, seed):
    """The next `count` samples from `position` of an endless run of epochs, over all ranks; `slot` numbers them.

    No sample is left out or repeated within an epoch, whatever the remainder and the world size. A sample that comes
    again within a draw gets a key of its own ("train.jsonl:3#2"), and with it random numbers of its own.
    """
    seen, drawn = Counter(), []
    for slot in range(count):
        epoch, place = divmod(position + slot, len(samples))
        sample = samples[epoch_order(len(samples), seed, epoch)[place]]
        seen[sample.key] += 1
        key = f"{sample.key}#{seen[sample.key]}" if seen[sample.key] > 1 else sample.key
        drawn.append(replace(sample, key=key, slot=slot))
    return drawn


def draw(samples, count):
    """`count` of the samples, in their order; all samples if there are no more. Every run and evaluation draws the same
    ones, so that their numbers compare; a smaller draw is a part of a larger one."""
    kept = set(epoch_order(len(samples), 0, 10**6)[:count])
    return [sample for number, sample in enumerate(samples) if number in kept]


def hold_out(samples, count, seed):
    """(training samples, `count` held-out samples) of one file. No video or image is on both sides: a training sample
    that shares one with a held-out sample is dropped."""
    rows = list({sample.key: sample for sample in samples}.values())  # a weight repeats rows
    held = [rows[i] for i in epoch_order(len(rows), seed, 10**6)[:count]]
    media = {m for sample in held for m in (sample.key, *sample.media)}
    train = [s for s in samples if media.isdisjoint((s.key, *s.media))]
    return train, held


def digest(samples):
    """Returns "COUNT rows, digest HEX": of all fields of the rows, and of the names of their files without the folders,
    so that a data set that was moved has the same digest."""
    total = hashlib.sha256()
    for s in samples:
        names = [os.path.basename(path) for path in (*s.videos, "", *s.images)]
        row = (s.key, s.problem, s.answer, s.problem_type, s.options, s.completions, names, s.clips, s.meta)
        total.update(repr(row).encode())  # repr escapes what UTF-8 cannot hold
    return f"{len(samples)} rows, digest {total.hexdigest()[:12]}"


def read_questions(config, say):
    """(training samples, held-out samples, samples of the supervised pass), each checked against its reward.

    say: takes a line for the user, such as how many rows --skip_list left out. Raises DataError.
    """
    train, held_out = split_data(config, say)
    if not train:
        raise DataError("--data: no row is left to train on; lower --eval_samples, or look at --skip_list")
    sft = []
    if config.sft_steps:
        sft = read_samples(config.sft_data, config.video_root, flag="--sft_data", text_only=config.text_only)
    each_row(sft, check_completions)
    rewards = {spec.split(":")[0] for spec in config.reward}
    check_answers([*train, *held_out] if "accuracy" in rewards else held_out)
    if "timestamp_iou" in rewards:
        check_answers(train, partial(timestamp_iou, ""))
    for name, samples in (("to train on", train), ("held out", held_out), ("of --sft_data", sft)):
        say_text_only(samples, name, say)
    say_free_text([*(train if "accuracy" in rewards else []), *held_out], "to score", config, say)
    return train, held_out, sft


def split_data(config, say):
    """(training samples, held-out samples): the latter from --eval_data, else held out of --data."""
    train = read_mixture(config.data, config.video_root, config.text_only)
    if config.skip_list:
        train, left_out = leave_out(train, read_skip_list(config.skip_list))
        say(f"--skip_list {config.skip_list}: {len(left_out)} of {len(train) + len(left_out)} rows left out")
    if not config.eval_samples:
        return train, []
    if config.eval_data:
        held_out = read_samples(config.eval_data, config.video_root, flag="--eval_data", text_only=config.text_only)
        return train, draw(held_out, config.eval_samples)
    return hold_out(train, config.eval_samples, config.seed)


def check_answers(samples, check=check_sample):
    """Raises DataError, naming the rows, if `check`, which stands for a reward, raises for some samples."""

    def checked(sample):
        try:
            check(sample)
        except (ValueError, ImportError) as error:
            raise DataError(printable(error, 300)) from error

    each_row({sample.key: sample for sample in samples}.values(), checked)  # a weight repeats rows


def check_completions(sample):
    if not sample.completions:
        raise DataError(f"{sample.key}: --sft_data rows need `completions`, a list of target texts")


def say_text_only(samples, name, say):
    """Says how many of the questions `name` have no video or image, if any: a misspelt field may be why."""
    if without := [sample.key for sample in samples if not sample.media]:
        count = f"{len(without)} of {len(samples)} questions {name}"
        say(f"{count} have no video or image, the first {without[0]}: they are asked as text alone")


def say_free_text(samples, name, config, say):
    """Says who scores the questions that are answered in free text, if there are any."""
    if count := sum(sample.problem_type in JUDGED for sample in samples):
        who = f"{config.judge_model} scores" if config.judge_url else "ROUGE scores; --judge_url has a model do it"
        say(f"{count} of {len(samples)} questions {name} are answered in free text, which {who}")
