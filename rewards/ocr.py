"""Transcription."""

from rewards.text import edit_distance


def ocr(prediction: str, sample) -> float:
    """1 - word error rate, floored at 0: in [0, 1]. As Video-R1: words split at whitespace; case and points count."""
    want, got = sample.answer.split(), prediction.split()
    if not want:
        raise ValueError(f"the answer {sample.answer!r} holds no word to compare with")
    return max(0.0, 1.0 - edit_distance(want, got) / len(want))
