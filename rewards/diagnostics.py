"""What a step's completions answer, and how often k of them have a right one, for the log."""

import math
from collections import Counter

from rewards.answer import answers_given, choice_letters
from video.formats import Sample


def answer_stats(completions: list[str], samples: list[Sample]) -> dict:
    """`{"letters": {letter: count}, "no_answer": share, "several_answers": share}` of completions[i] to samples[i].

    letters: what the completions of multiple-choice samples chose. no_answer: no answer tag, or its text names no
    option. several_answers: different answer tags, or a text that names several options. The shares are of all
    completions, and 0.0 if there are no completions.
    """
    letters, none, several = Counter(), 0, 0
    for completion, sample in zip(completions, samples, strict=True):
        given = answers_given(completion)
        if len(given) == 1 and sample.problem_type == "multiple choice":
            given = choice_letters(given[0], sample.options)
            letters.update(given if len(given) == 1 else ())
        none += not given
        several += len(given) > 1
    n = max(1, len(completions))
    return {"letters": dict(sorted(letters.items())), "no_answer": none / n, "several_answers": several / n}


def pass_at_k(accuracies: list[float], k: int) -> float:
    """The mean, over all draws of k of a prompt's n completions, of the best accuracy among the k.

    If an accuracy is 0 or 1, this is the unbiased estimator of pass@k of Chen et al. 2021 (arXiv 2107.03374, eq. 1):
    1 - C(n - c, k) / C(n, k), if c of the n are right. Sorted upwards and numbered from 0, completion i is the best of
    C(i, k - 1) of the C(n, k) draws.
    """
    draws = math.comb(len(accuracies), k)
    return sum(math.comb(i, k - 1) * best for i, best in enumerate(sorted(accuracies))) / draws
