"""Multiple choice."""

from rewards.answer import choice_letter


def choice(prediction: str, sample) -> float:
    """1.0 where the prediction chooses the letter of the ground truth, else 0.0.

    The ground truth is a letter in any dress or the text of an option. The reference implementations compare the first
    letter (Open-R1-Video: "Apple" and "A or B" are right) or the exact string (Video-R1: "A." is wrong).
    """
    answer = choice_letter(sample.answer, sample.options)
    if answer is None:
        raise ValueError(f"the answer {sample.answer!r} names none, or several, of the options {list(sample.options)}")
    return float(choice_letter(prediction, sample.options) == answer)
