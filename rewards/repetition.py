"""A penalty on loops."""


def repetition(completion: str, sample, n: int = 3) -> float:
    """-(1 - distinct n-grams / n-grams) over lower-cased words: 0 for no repeat, towards -1 for a loop.

    Yeo et al. 2025 (arXiv 2502.03373, appendix C.2), maximal penalty 1: give it a positive weight. A completion of
    fewer than n words scores 0.
    """
    words = completion.lower().split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0
