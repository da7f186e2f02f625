"""The parser, as literal tables. A first letter, or a first capital, is not an answer."""

import time

import pytest

from rewards.answer import answer_text, answers_given, choice_letter, choice_letters

COLOURS = ("red", "blue", "green", "white")
LABELLED = ("A. red", "B) blue", "(C) green", "D: white")
RUNNING = ("A dog barks.", "A man is running", "Apple", "B")

LETTERS = [  # text, options, letter
    ("A", (), "A"),
    ("b", (), "B"),
    ("J", (), "J"),
    ("K", (), None),
    ("A.", (), "A"),
    ("A:", (), "A"),
    ("(A)", (), "A"),
    ("(b)", (), "B"),
    ("[C]", (), "C"),
    ("d)", (), "D"),
    ("(A).", (), "A"),
    (" B \n", (), "B"),
    ("**B**", (), "B"),
    ("**(B)**", (), "B"),
    ("`C`", (), "C"),
    ('"D"', (), "D"),
    ("'D'", (), "D"),
    ("$B$", (), "B"),
    ("\\boxed{B}", (), "B"),
    ("\\boxed{\\text{C}}", (), "C"),
    ("\uff22", (), "B"),
    ("\uff08\uff23\uff09", (), "C"),
    ("\u24b9", (), "D"),
    ("A) red", (), "A"),
    ("(A) red", (), "A"),
    ("B. red", (), "B"),
    ("b) red", (), "B"),
    ("C: red", (), "C"),
    ("D - red", (), "D"),
    ("B\nred", (), "B"),
    ("B.\n\nBecause it is red.", (), "B"),
    ("B. A man", (), "B"),
    ("Answer: C", (), "C"),
    ("answer: C", (), "C"),
    ("Answer C", (), "C"),
    ("**Answer:** C", (), "C"),
    ("Answer: (c)", (), "C"),
    ("The answer is (D).", (), "D"),
    ("The answer is D", (), "D"),
    ("The correct answer is: B.", (), "B"),
    ("The answer is A.", (), "A"),
    ("The answer is option B.", (), "B"),
    ("The correct option is B", (), "B"),
    ("The answer is B because it moves left", (), "B"),
    ("Final answer: B) red", (), "B"),
    ("Option B", (), "B"),
    ("Option (B)", (), "B"),
    ("Choice: D", (), "D"),
    ("I choose C.", (), "C"),
    ("B is correct", (), "B"),
    ("B is the correct answer", (), "B"),
    ("Based on the video, the answer is C.", (), "C"),
    # none
    ("", (), None),
    ("   \n ", (), None),
    ("...", (), None),
    ("Apple", (), None),
    ("Based on the video, the man runs", (), None),
    ("Based on the video, \u2026", (), None),
    ("A man is running", (), None),
    ("The answer is A man", (), None),
    ("the answer is a man", (), None),
    ("Because", (), None),
    ("BAD", (), None),
    ("AB", (), None),
    ("B-roll", (), None),
    ("vitamin C", (), None),
    ("not B", (), None),
    ("The answer is not B", (), None),
    ("The answer isn't B", (), None),
    ("B is wrong", (), None),
    ("Is the answer B?", (), None),
    ("e.g. a dog", (), None),
    ("i.e. a dog", (), None),
    ("A.M.", (), None),
    ("none of the above", (), None),
    ("1", (), None),
    ("\u0410", (), None),  # a Cyrillic A
    ("\u7b54\u6848", (), None),
    ("\U0001f600", (), None),
    # several
    ("A or B", (), None),
    ("A, B", (), None),
    ("A/B", (), None),
    ("A and B", (), None),
    ("B or C", (), None),
    ("A. or B.", (), None),
    ("(A) (B)", (), None),
    ("The answer is A or B", (), None),
    ("The answer is B, not C", (), None),
    ("Both A and B", (), None),
    ("Neither A nor B is correct", (), None),
    ("A. red B. blue", (), None),
    ("Answer: B. Answer: C.", (), None),
    ("A B C D", (), None),
    # the options known
    ("D", COLOURS, "D"),
    ("E", COLOURS, None),
    ("F. red", COLOURS, None),
    ("red", COLOURS, "A"),
    ("Red.", COLOURS, "A"),
    ("GREEN", COLOURS, "C"),
    ("reddish", COLOURS, None),
    ("red or blue", COLOURS, None),
    ("pink", COLOURS, None),
    ("B) blue", COLOURS, "B"),
    ("B) red", COLOURS, None),
    ("B) navy", COLOURS, "B"),
    ("The answer is E", COLOURS, None),
    ("red", LABELLED, "A"),
    ("blue", LABELLED, "B"),
    ("green", LABELLED, "C"),
    ("white", LABELLED, "D"),
    ("B) blue", LABELLED, "B"),
    ("B. blue", LABELLED, "B"),
    ("(C) green", LABELLED, "C"),
    ("A. blue", LABELLED, None),
    ("A man is running", RUNNING, "B"),
    ("A man is running.", RUNNING, "B"),
    ("Apple", RUNNING, "C"),
    ("A dog barks", RUNNING, "A"),
    ("B", RUNNING, "B"),
    ("A man", RUNNING, None),
    ("D. B", RUNNING, "D"),
    ("red", ("red", "red"), None),
    ("-5", ("5", "-5"), "B"),
    ("0.5", ("0.5", "5"), "A"),
    ("yes", ("Yes", "No"), "A"),
]

ANSWERS = [  # completion, strict answer, lenient answer
    ("", None, None),
    ("B", None, "B"),
    ("(b)", None, "(b)"),
    ("<answer>B</answer>", "B", "B"),
    ("<answer> B.\n</answer>", "B.", "B."),
    ("<think>t</think><answer>B</answer>", "B", "B"),
    ("  <think>t</think>\n<answer>B</answer>\n", "B", "B"),
    ("so <answer>B</answer> it is", "B", "B"),
    ("<answer>B", None, "B"),
    ("<think>t</think><answer>B", None, "B"),
    ("<answer>", None, None),
    ("<answer></answer>", None, None),
    ("<answer> \n </answer>", None, None),
    ("B</answer>", None, None),
    ("</answer>B<answer>", None, None),
    ("<answer>A</answer><answer>B</answer>", None, None),
    ("<answer>B</answer><answer>B</answer>", "B", "B"),
    ("<answer>B</answer> and <answer> B </answer>", "B", "B"),
    ("<answer>B</answer><answer></answer>", "B", "B"),
    ("<answer>A</answer><answer>B", None, None),
    ("<answer>B</answer><answer>B", None, "B"),
    ("<answer><answer>B</answer></answer>", None, "B"),
    ("<answer>A<answer>B</answer></answer>", None, None),
    ("<answer>B</answer></answer>", None, "B"),
    ("<answer>B<answer>", None, "B"),
    ("<answer>A or B</answer>", "A or B", "A or B"),
    ("<answer><b>B</b></answer>", "<b>B</b>", "<b>B</b>"),
    ("<ANSWER>B</ANSWER>", None, "<ANSWER>B</ANSWER>"),
    ("< answer>B</answer>", None, None),
    ("<think>I put it in <answer> tags</think><answer>B</answer>", "B", "B"),
    ("<think>maybe <answer>A</answer></think><answer>B</answer>", "B", "B"),
    ("<think><answer>B</answer></think>", None, None),
    ("<think>cut in the middle of the tho", None, None),
    ("<think>no end <answer>B</answer>", "B", "B"),
    ("<think>t</think>B", None, "B"),
    ("<think>t</think>", None, None),
    ("x <answer>A</answer></think><answer>B</answer>", None, None),
    ("<answer>\u7ea2\u8272</answer>", "\u7ea2\u8272", "\u7ea2\u8272"),
    ("<answer>line\nline</answer>", "line\nline", "line\nline"),
    ("Based on the video, the man runs.", None, "Based on the video, the man runs."),
]


def test_the_tables_are_as_large_as_promised():
    assert len({case[:2] for case in LETTERS}) >= 100, "parser outputs: 60 at least"
    assert len({case[0] for case in ANSWERS}) >= 35


@pytest.mark.parametrize(("text", "options", "letter"), LETTERS)
def test_choice_letter(text, options, letter):
    assert choice_letter(text, options) == letter


@pytest.mark.parametrize(("completion", "strict", "lenient"), ANSWERS)
def test_answer_text(completion, strict, lenient):
    assert answer_text(completion) == strict
    assert answer_text(completion, strict=False) == lenient


def test_several_answers_are_told_from_none():
    assert choice_letters("A or B") == ("A", "B")
    assert choice_letters("Based on the video") == ()
    assert choice_letters("B) red", COLOURS) == ("A", "B")
    assert answers_given("<answer>A</answer><answer>B</answer>") == ("A", "B")
    assert answers_given("<answer>A") == ()


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "\n",
        "A ",
        "(",
        "A or ",
        "B. ",
        "<answer>",
        "</answer>",
        "<answer>B</answer>",
        "<think>",
        "answer is ",
        "answer option ",
        "is correct ",
        "*",
        "\\boxed{",
        "1,",
        "\ufb03",
    ],
)
def test_100_000_characters_take_less_than_50_ms(unit):
    text = (unit * 100_000)[:100_000]

    def milliseconds():
        start = time.thread_time()
        answer_text(text)
        answer_text(text, strict=False)
        choice_letters(text)
        choice_letters(text, COLOURS)
        return 1000 * (time.thread_time() - start) / 4

    assert any(milliseconds() < 50 for _ in range(10))
