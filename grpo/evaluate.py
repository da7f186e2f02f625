"""Accuracy on held-out questions: the same code for eval.py, for evaluation while training, and for the controls.

A control changes the video and asks the same questions: a model that uses the order of frames must fail on shuffled
ones, name the opposite direction on reversed ones, and guess on a blank video.
"""

from collections import defaultdict

from grpo.data import chunks
from grpo.distributed import gathered
from grpo.sampler import SamplingSettings, prompt_seed, sample
from rewards import answer_text, choice_letter, score_prediction
from video.prompt import Skipped

CONTROLS = ("shuffle", "reverse", "blank")


def predict(policy, loader, samples, tokenizer, processes, max_new_tokens, batch, temperature=0.0, seed=0, control=None):
    """Returns one record for each sample, in their order, on every process; samples are split over processes.

    A record holds key, kind, completion, prediction (None where no answer could be parsed), score in [0, 1], opposite
    (whether the prediction is the row's `opposite`), or `skipped` with the reason where the video could not be read.
    """
    own = samples[processes.rank :: processes.world]
    settings = SamplingSettings(temperature=temperature, max_new_tokens=max_new_tokens)
    records = []
    with gathered(policy):
        for encoded in loader.batches(chunks(own, batch), control):
            prompts = [p for p in encoded if not isinstance(p, Skipped)]
            seeds = [prompt_seed(seed, control or "", p.sample.key) for p in prompts]
            rollouts = sample(policy, prompts, 1, settings, seeds, tokenizer) if prompts else []
            texts = iter([r.texts[0] for r in rollouts])
            records += [
                {"key": p.key, "skipped": f"{p.path}: {p.reason}"} if isinstance(p, Skipped) else _record(p.sample, next(texts))
                for p in encoded
            ]
    shares = processes.gather(records)
    return [shares[i % processes.world][i // processes.world] for i in range(len(samples))]


def _record(sample, completion):
    prediction = answer_text(completion, strict=False)
    letter = choice_letter(prediction or "", sample.options)
    opposite = sample.meta.get("opposite")
    return {
        "key": sample.key,
        "kind": sample.meta.get("kind", sample.problem_type),
        "completion": completion,
        "prediction": prediction,
        "score": score_prediction(prediction, sample),
        "opposite": None if opposite is None else letter == opposite,
    }


def summarise(records):
    """{"overall": share, "kinds": {kind: share}, "opposite": share or None, "unparsed": share, "count", "skipped"}.

    Shares are of the readable samples; an answer that could not be parsed counts as wrong.
    """
    read = [r for r in records if "skipped" not in r]
    kinds = defaultdict(list)
    for record in read:
        kinds[record["kind"]].append(record["score"])
    opposites = [r["opposite"] for r in read if r["opposite"] is not None]
    return {
        "overall": mean([r["score"] for r in read]),
        "kinds": {kind: mean(scores) for kind, scores in sorted(kinds.items())},
        "opposite": mean(opposites) if opposites else None,
        "unparsed": mean([r["prediction"] is None for r in read]),
        "count": len(read),
        "skipped": len(records) - len(read),
    }


def mean(values):
    """Mean as a float; 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0
