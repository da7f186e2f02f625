"""Accuracy on held-out questions: the same code for eval.py, for evaluation while training, and for the controls.

A control changes the video and asks the same questions: a model that uses the order of frames must fail on shuffled
ones, name the opposite direction on reversed ones, and guess on a blank video, or with none in the prompt.
"""

import math
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby

import torch
from tqdm import tqdm

from grpo.data import batched
from grpo.distributed import gathered
from grpo.policy import features_of
from grpo.sampler import SamplingSettings, prompt_seed, sample
from rewards import score_prediction
from rewards.answer import answer_text, choice_letter
from video.formats import Sample, printable
from video.frames import SampleError
from video.prompt import FRAME_CONTROLS, Skipped

NO_VIDEO = "no video"
CONTROLS = (*FRAME_CONTROLS, NO_VIDEO)


def predict(policy, loader, samples, tokenizer, processes, max_new_tokens, batch, temperature=0.0, control=None,
            done=None, report=None):  # fmt: skip
    """Returns one record for each sample, in their order, on every process.

    A record holds key, kind, completion, prediction (None where no answer could be parsed), score in [0, 1], opposite
    (whether the prediction is the row's `opposite`), or `skipped` with the reason where the video could not be read.
    Batches are planned over all samples and then shared out whole, so what decodes together, and with it every bit of
    an answer, depends neither on the number of processes nor on an interruption.

    done: {key: record} of an earlier part; batches that it covers are not made again. report: called with the records
    of each batch as it is finished.
    """
    done = done or {}
    asked = [_without_media(s) for s in samples] if control == NO_VIDEO else samples
    left = [group for group in plan(asked, loader.encoder, batch) if any(s.key not in done for s in group)]
    own = left[processes.rank :: processes.world]
    settings = SamplingSettings(temperature=temperature, max_new_tokens=max_new_tokens)
    made = {}
    with gathered(policy) as plain:
        for encoded in encode(loader, own, control if control in FRAME_CONTROLS else None):
            prompts = [p for p in encoded if not isinstance(p, Skipped)]
            seeds = [prompt_seed(0, control or "", p.sample.key) for p in prompts]
            features = shared_features(plain, prompts)
            rollouts = sample(plain, prompts, 1, settings, seeds, tokenizer, features) if prompts else []
            texts = iter([r.texts[0] for r in rollouts])
            records = [_skip(p) if isinstance(p, Skipped) else _record(p.sample, next(texts)) for p in encoded]
            made |= {record["key"]: record for record in records}
            if report:
                report(records)
    for share in processes.gather(made):
        done = done | share
    return [done[s.key] for s in samples]


class Progress:
    """Takes records as they come: saves them, and shows their running accuracy, and the time that is left, on the first
    process's bar, which stays on the screen if `leave`."""

    def __init__(self, name, total, processes, leave=True, save=lambda records: None):
        self.bar = tqdm(
            desc=name, total=-(-total // processes.world), disable=not processes.is_main, dynamic_ncols=True,
            leave=leave,
        )  # fmt: skip
        self.scores, self.save = [], save

    def __call__(self, records):
        self.save(records)
        self.scores += [r["score"] for r in records if "skipped" not in r]
        self.bar.set_postfix(accuracy=f"{sum(self.scores) / max(1, len(self.scores)):.3f}", refresh=False)
        self.bar.update(len(records))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def plan(samples, encoder, size):
    """Batches of samples: questions about one video together, videos of like length together.

    The longest come first, so that what does not fit into memory shows at once. Lengths come from file headers.
    """
    order = lambda s: (
        -_vision_tokens(encoder, s.videos, s.images, s.clips),
        s.media,
        repr(s.clips),
        len(s.problem),
        s.key,
    )
    ordered = sorted(samples, key=order)
    return batched(ordered, size)


def encode(loader, batches, control):
    """Yields the Prompts or Skips of each batch. Of questions about one video only the shortest goes to the loader; the
    others share its frames. So a shuffled order, too, is one for the video."""
    shared = partial(_shared_media, loader.encoder)
    groups = [[list(group) for _, group in groupby(batch, shared)] for batch in batches]
    firsts = ([group[0] for group in batch] for batch in groups)
    for batch, encoded in zip(groups, loader.batches(firsts, control)):
        yield [_ask(loader.encoder, first, s) for group, first in zip(batch, encoded) for s in group]


def _ask(encoder, first, sample):
    """The Prompt of `sample`, a question about the media of `first` (a Prompt or Skip): own text, same frames."""
    if isinstance(first, Skipped):
        return replace(first, key=sample.key)
    if first.sample.key == sample.key:
        return first
    try:
        ids = encoder.expand(sample, encoder.text_ids(sample), first.image_grid_thw, first.video_grid_thw)
    except SampleError as error:
        return Skipped(sample.key, error.path, error.reason)
    return replace(first, sample=sample, input_ids=ids)


def shared_features(policy, prompts):
    """Vision features of all prompts in the order of their placeholders, from one vision pass for each distinct video;
    None where no two prompts share one."""
    distinct = {_pixels(p): p for p in prompts}
    if len(distinct) == len(prompts):
        return None
    features = dict(zip(distinct, features_of(policy, list(distinct.values()))))
    return torch.cat([features[_pixels(p)] for p in prompts])


def _pixels(prompt):
    """What two prompts have in common where they share their frames. Text alone shares nothing."""
    tensors = (prompt.pixel_values, prompt.pixel_values_videos)
    return tuple(map(id, tensors)) if any(t is not None for t in tensors) else (id(prompt),)


def _shared_media(encoder, sample):
    """What a sample shares with its neighbours: its media, or nothing but itself where it has none, or where its
    question cannot be asked and must not take others down with it."""
    try:
        encoder.text(sample)
    except SampleError:
        return (sample.key,)
    return (sample.videos, sample.images, sample.clips) if sample.media else (sample.key,)


@lru_cache(maxsize=2**16)
def _vision_tokens(encoder, videos, images, clips):
    """Kept, since an evaluation and its controls, or the next one of a training run, ask for the same files again."""
    try:
        return encoder.planned_tokens(Sample("", "", "", videos, images, clips=clips))
    except SampleError:
        return 0  # the loader will say what is wrong with it


def _without_media(sample):
    return replace(sample, videos=(), images=(), clips=())


def _skip(skipped):
    return {"key": skipped.key, "skipped": printable(f"{skipped.path}: {skipped.reason}")}


def kind_of(sample):
    """The kind of question that accuracies are split by: the row's `kind` as a text, else its problem type."""
    kind = sample.meta.get("kind")
    return sample.problem_type if kind is None else printable(kind, 60)


def _record(sample, completion):
    prediction = answer_text(completion, strict=False)
    letter = choice_letter(prediction or "", sample.options)
    opposite = sample.meta.get("opposite")
    return {
        "key": sample.key,
        "kind": kind_of(sample),
        "completion": completion,
        "prediction": prediction,
        "score": score_prediction(prediction, sample),
        "opposite": None if opposite is None else letter == opposite,
    }


def summarise(records, trained=None):
    """{"overall": share, "trained": share, "kinds": {kind: share}, "opposite": share or None, "unparsed": share,
    "count", "skipped", "intervals": {"overall" or kind: 95% Wilson interval}, "counts": {kind: questions}}.

    "trained" is of the kinds that the run trains on, given by name; of all where None is given, or where no question is
    of such a kind. Shares are of the readable samples; an answer that could not be parsed counts as wrong.
    """
    read = [r for r in records if "skipped" not in r]
    kinds = defaultdict(list)
    for record in read:
        kinds[record["kind"]].append(record["score"])
    kinds = dict(sorted(kinds.items()))
    trained = kinds.keys() & (trained or kinds.keys()) or kinds.keys()
    scores = [r["score"] for r in read]
    opposites = [r["opposite"] for r in read if r["opposite"] is not None]
    return {
        "overall": mean(scores),
        "trained": mean([r["score"] for r in read if r["kind"] in trained]),
        "kinds": {kind: mean(own) for kind, own in kinds.items()},
        "opposite": mean(opposites) if opposites else None,
        "unparsed": mean([r["prediction"] is None for r in read]),
        "count": len(read),
        "skipped": len(records) - len(read),
        "intervals": {name: wilson(mean(own), len(own)) for name, own in {"overall": scores, **kinds}.items()},
        "counts": {kind: len(own) for kind, own in kinds.items()},
    }


def wilson(share, count, z=1.959963984540054):
    """[low, high] of the 95% interval of a share of `count` answers (Wilson 1927, without continuity correction).

    For scores between 0 and 1 (MRA, ROUGE) it is too wide rather than too narrow: of all scores with this mean, those
    that are 0 or 1 vary most.
    """
    if not count:
        return [0.0, 1.0]
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mcnemar(better, worse):
    """The exact two-sided p-value that `better` gains and `worse` losses are tosses of one fair coin (McNemar 1947)."""
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def paired(records, others):
    """What records gain over `others`, answers to the same samples: {"difference" of mean scores, "better", "worse",
    "p", "count", "kinds": {kind: the same of it alone}}, over the samples that both could read. With scores between 0
    and 1 it is the exact sign test."""
    other = {r["key"]: r["score"] for r in others if "skipped" not in r}
    gains = [(r["kind"], r["score"] - other[r["key"]]) for r in records if "skipped" not in r and r["key"] in other]
    kinds = sorted({kind for kind, _ in gains})
    return _gain([g for _, g in gains]) | {"kinds": {kind: _gain([g for k, g in gains if k == kind]) for kind in kinds}}


def _gain(gains):
    better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    p = mcnemar(better, worse)
    return {"difference": mean(gains), "better": better, "worse": worse, "p": p, "count": len(gains)}


def mean(values):
    """Mean as a float; 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0
