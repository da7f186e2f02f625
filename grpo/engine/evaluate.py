"""Accuracy on held-out questions: the same code for eval.py, for evaluation while training, and for the controls.

A control changes the video and asks the same questions: a model that uses the order of frames must fail on shuffled
ones, name the opposite direction on reversed ones, and guess on a blank video, or with none in the prompt.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from grpo import sequence
from grpo.batch import chunked
from grpo.engine.distributed import data_rank, data_size, gather, is_main, unsharded
from grpo.policy import Policy, features_of
from grpo.sampler import SamplingSettings, generate, prompt_seed
from rewards import score_predictions
from rewards.answer import answer_text, choice_letter
from rewards.grounding import OVERLAPS, overlaps
from rewards.judge import Judge
from video.formats import Sample, printable
from video.frames import SampleError
from video.loader import PromptLoader
from video.prompt import FRAME_CONTROLS, Prompt, PromptEncoder, Skipped

NO_VIDEO = "no video"
CONTROLS = (*FRAME_CONTROLS, NO_VIDEO)
GAPS = {"blind_gap": NO_VIDEO, "order_gap": "shuffled"}  # metric: the control that accuracy is compared with
RECALL_AT = (0.3, 0.5, 0.7)  # overlaps from which an answer counts as found


@dataclass(frozen=True)
class EvalSettings:
    """How questions are asked; frames, pixels and the prompt's template are the loader's."""

    sampling: SamplingSettings
    batch: int  # prompts decoded together
    control: str | None = None  # one of CONTROLS; None: the video as it is
    judge: Judge | None = None  # who scores free text; None: ROUGE
    group_size: int = 1  # completions of each question


def predict(
    policy: Policy, loader: PromptLoader, samples: list[Sample], tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings, done: dict[str, dict] | None = None, report: Callable[[list[dict]], None] | None = None,
) -> list[dict]:  # fmt: skip
    """Returns one record for each sample, in their order, on every rank.

    A record holds key, category, completion, prediction (None if no answer could be parsed), score in [0, 1] (0, with
    `unjudged`, the reason, if the judge failed), opposite (whether the prediction is the row's `opposite`) and, of
    times and boxes, `overlaps` ({"temporal grounding: tIoU": overlap}); or key and `skipped`, the reason, if the video
    could not be read.
    If settings.group_size is above 1, a record holds key, category, `scores`, one of each completion, and their mean,
    `score`.
    All ranks plan the same batches over all samples, and each rank takes whole batches. So what decodes together, and
    with it every bit of an answer, depends neither on the world size nor on an interruption.

    done: {key: record} of an earlier part, whose batches are not made again. report: is called with the records of each
    batch when it is finished.
    """
    # 1) Plan the batches; take those of this rank that are not done
    done, control = done or {}, settings.control
    asked = [replace(s, videos=(), images=(), clips=()) for s in samples] if control == NO_VIDEO else samples
    left = [group for group in plan(asked, loader.encoder, settings.batch) if any(s.key not in done for s in group)]
    own = left[data_rank() :: data_size()]

    # 2) Answer them
    size, sampling, made = settings.group_size, settings.sampling, {}
    with unsharded(policy) as plain:
        for encoded in map(sequence.agreed, encode(loader, own, control if control in FRAME_CONTROLS else None)):
            prompts = [p for p in encoded if not isinstance(p, Skipped)]
            seeds = [prompt_seed(0, control or "", p.sample.key) for p in prompts]
            features = _shared_features(plain, prompts)
            ask = partial(generate, plain, prompts, size, sampling, seeds, tokenizer, features)
            groups = ask() if prompts else []
            answered = iter(_records([p.sample for p in prompts], [g.texts for g in groups], settings.judge))
            records = [_skip(p) if isinstance(p, Skipped) else next(answered) for p in encoded]
            made |= {record["key"]: record for record in records}
            if report:
                report(records)

    # 3) Put all ranks' records into the order of the samples
    for share in gather(made):
        done = done | share
    return [done[s.key] for s in samples]


@contextmanager
def show_progress(name: str, total: int, leave: bool = True, save: Callable = lambda _: None) -> Iterator[Callable]:
    """Yields a function that takes records as they come: it hands them to `save`, and shows their running accuracy and
    the time that is left on the bar of rank 0, which stays on the screen if `leave`."""
    scores, total = [], -(-total // data_size())
    with tqdm(desc=name, total=total, disable=not is_main(), dynamic_ncols=True, leave=leave) as bar:

        def report(records):
            save(records)
            scores.extend(r["score"] for r in records if "skipped" not in r)
            bar.set_postfix(accuracy=f"{mean(scores):.3f}", refresh=False)
            bar.update(len(records))

        yield report


def plan(samples: list[Sample], encoder: PromptEncoder, size: int) -> list[list[Sample]]:
    """Batches of samples: questions about one video together, videos of similar length together.

    The longest videos come first, so that a lack of memory shows at once. Lengths come from file headers.
    """
    length = lambda s: _vision_tokens(encoder, s.videos, s.images, s.clips)
    return chunked(sorted(samples, key=lambda s: (-length(s), s.media, repr(s.clips), len(s.problem), s.key)), size)


def encode(loader: PromptLoader, batches: list[list[Sample]], control: str | None) -> Iterator[list[Prompt | Skipped]]:
    """Yields the Prompts (or Skipped) of each batch.

    Of neighbouring questions about one video only the first, the shortest, goes to the loader. The others share its
    frames; so "shuffled" shuffles a video once for all its questions.
    """
    groups = [[list(group) for _, group in groupby(batch, partial(_media, loader.encoder))] for batch in batches]
    firsts = ([group[0] for group in batch] for batch in groups)
    for batch, encoded in zip(groups, loader.batches(firsts, control)):
        yield [_ask(loader.encoder, first, s) for group, first in zip(batch, encoded) for s in group]


def _media(encoder, sample):
    """What a sample shares with the other questions about its video. Nothing but its key if it has no media, or if its
    question cannot be asked: then the other questions must not be skipped with it."""
    try:
        encoder.text(sample)
    except SampleError:
        return (sample.key,)
    return (sample.videos, sample.images, sample.clips) if sample.media else (sample.key,)


def _ask(encoder, first, sample):
    """The Prompt of `sample` with the frames of `first`, the Prompt (or Skipped) of a question about the same media."""
    if isinstance(first, Skipped):
        return replace(first, key=sample.key)
    if first.sample.key == sample.key:
        return first
    try:
        ids = encoder.text_ids(encoder.text(sample), first.frame_times)
        ids = encoder.expand(sample, ids, first.image_grid_thw, first.video_grid_thw)
    except SampleError as error:
        return Skipped(sample.key, error.path, error.reason)
    return replace(first, sample=sample, input_ids=ids)


def _shared_features(policy, prompts):
    """(merged tokens, hidden) vision features of all prompts, from one vision pass over the distinct videos; None if no
    two prompts share their frames."""
    grids = [p.image_grid_thw if p.video_grid_thw is None else p.video_grid_thw for p in prompts]  # on any rank
    names = [id(p if grid is None else grid) for p, grid in zip(prompts, grids)]  # text alone shares nothing
    distinct = dict(zip(names, prompts))
    if len(distinct) == len(prompts):
        return None
    features = dict(zip(distinct, features_of(policy, list(distinct.values()))))
    return torch.cat([features[name] for name in names])


@lru_cache(maxsize=2**16)
def _vision_tokens(encoder, videos, images, clips):
    """Cached: the controls of an evaluation, and the next evaluation of a training run, ask for the same files."""
    try:
        return encoder.planned_tokens(Sample("", "", "", videos, images, clips=clips))
    except SampleError:
        return 0  # the loader says what is wrong with the file


def _skip(skipped):
    return {"key": skipped.key, "skipped": printable(f"{skipped.path}: {skipped.reason}")}


def category_of(sample: Sample) -> str:
    """The category that accuracies are split by: the row's `category` as a text, else its problem type."""
    category = sample.meta.get("category")
    return sample.problem_type if category is None else printable(category, 60)


def _records(samples, texts, judge):
    """The record of each sample; texts: its completions."""
    every = [(sample, text) for sample, own in zip(samples, texts) for text in own]
    predictions = [answer_text(text, strict=False) for _, text in every]
    outcomes = score_predictions(predictions, [sample for sample, _ in every], judge)
    if len(every) > len(samples):
        groups = chunked(outcomes, len(every) // len(samples))
        return [_scores(sample, own) for sample, own in zip(samples, groups)]
    return [_record(*one, prediction, outcome) for one, prediction, outcome in zip(every, predictions, outcomes)]


def _scores(sample, outcomes):
    scores, failed = [score for score, *_ in outcomes], [failure for *_, failure in outcomes if failure]
    unjudged = {"unjudged": failed[0]} if failed else {}
    return {"key": sample.key, "category": category_of(sample), "scores": scores, "score": mean(scores), **unjudged}


def _record(sample, completion, prediction, outcome):
    score, _, failure = outcome
    letter = choice_letter(prediction or "", sample.options)
    opposite = sample.meta.get("opposite")
    located = overlaps(prediction or "", sample) if sample.problem_type in OVERLAPS else {}
    return {
        "key": sample.key,
        "category": category_of(sample),
        "completion": completion,
        "prediction": prediction,
        "score": score,
        "opposite": None if opposite is None else letter == opposite,
        **({"overlaps": {f"{sample.problem_type}: {name}": o for name, o in located.items()}} if located else {}),
        **({"unjudged": failure} if failure else {}),
    }


def summarise(records: list[dict], trained: Collection[str] | None = None) -> dict:
    """{"overall": share, "trained": share, "trained_interval": its `wilson` interval, "categories": {category: share},
    "opposite": share or None, "unparsed": share, "count", "skipped"}; "grounding", the `recalls`, if answers are
    times or boxes; and "unjudged", how many answers the judge failed to score, if there are any.

    "trained" is over the questions of the categories `trained`, those that the run trains on; over all questions if
    `trained` is None or no question is of these. Shares are of the readable samples; an answer that could not be parsed
    counts as wrong.
    """
    read = [r for r in records if "skipped" not in r]
    categories = scores_by_category(read)
    trained = categories.keys() & (trained or categories.keys()) or categories.keys()
    asked = [r["score"] for r in read if r["category"] in trained]
    opposites = [r["opposite"] for r in read if r["opposite"] is not None]
    return {
        "overall": mean([r["score"] for r in read]),
        "trained": mean(asked),
        "trained_interval": wilson(mean(asked), len(asked)),
        "categories": {category: mean(scores) for category, scores in categories.items()},
        "opposite": mean(opposites) if opposites else None,
        "unparsed": mean([r["prediction"] is None for r in read]),
        "count": len(read),
        "skipped": len(records) - len(read),
        **({"grounding": found} if (found := recalls(read)) else {}),
        **({"unjudged": failed} if (failed := sum("unjudged" in r for r in read)) else {}),
    }


def gaps(summary: dict, controls: dict[str, dict]) -> dict[str, float]:
    """{"blind_gap": accuracy less that with no video, "order_gap": less that with shuffled frames}, of the categories
    trained on; only of the controls in `controls`, {control: summary}. Near 0, the model does not use the video, or the
    order of its frames."""
    return {n: summary["trained"] - controls[control]["trained"] for n, control in GAPS.items() if control in controls}


def recalls(records: list[dict]) -> dict[str, dict[str, float]]:
    """{"temporal grounding: tIoU": {"mIoU": mean overlap, "R@0.3": share of overlaps of 0.3 or more, "R@0.5", "R@0.7"}}
    of the readable records that have `overlaps`.

    VideoChat-R1 (src_eval/evaluate_grounding.py) and OneThinker (eval_bench.py) count an overlap of exactly 0.3 too;
    Time-R1 (eval_all.py) wants more than 0.3.
    """
    columns = defaultdict(list)
    for record in records:
        for name, overlap in record.get("overlaps", {}).items():
            columns[name].append(overlap)
    at = lambda values: {f"R@{least}": mean([value >= least for value in values]) for least in RECALL_AT}
    return {name: {"mIoU": mean(values), **at(values)} for name, values in columns.items()}


def scores_by_category(records: list[dict]) -> dict[str, list[float]]:
    """{category: scores} of readable records, in the order of the names."""
    categories = defaultdict(list)
    for record in records:
        categories[record["category"]].append(record["score"])
    return dict(sorted(categories.items()))


def mean(values: Sequence[float]) -> float:
    """The mean; 0.0 of no values."""
    return sum(values) / len(values) if values else 0.0


def wilson(share: float, count: int, z: float = 1.959963984540054) -> list[float]:
    """[low, high] of the 95% interval of a share of `count` answers (Wilson 1927, without continuity correction).

    For scores between 0 and 1 (MRA, ROUGE) it is too wide rather than too narrow: of all scores with this mean, those
    that are 0 or 1 vary most.
    """
    if not count:
        return [0.0, 1.0]
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(0.0, centre - half), min(1.0, centre + half)]
