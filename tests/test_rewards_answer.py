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

PHRASES = {  # what the texts have in common: (the letter chosen, texts); no options are known
    "other languages": ("B", [
        "答案是B", "选B", "选B。", "B。", "B、", "答案：B", "答案：（B）", "答案为B", "正确答案是B。", "我选择B",
        "应该选B", "所以选B", "故选B", "因此答案是B", "选项B", "B选项", "B是正确的", "B.红色", "【B】", "选b",
        "根据视频，答案是B。", "根据视频答案是B", "答えはBです", "正解はBです", "정답은 B입니다", "정답: B",
        "Réponse : B", "La réponse est B", "La bonne réponse est B.", "C'est B", "Antwort: B",
        "Die richtige Antwort ist B", "La respuesta correcta es B", "Opción B", "La risposta è B", "A resposta é B",
    ]),
    "elimination in other languages": ("B", [
        "A不对，选B", "A错了，所以选B", "A错所以选B", "选B，因为A不对", "选B而不是A", "A是错的，B是对的",
        "不是A，而是B", "Nicht A, sondern B", "Die Antwort ist nicht A, sondern B", "No es A, sino B", "Não é A, é B",
        "Non è A, è B",
    ]),
    "a Portuguese article": ("B", [
        "A resposta correta é a B", "A resposta é a B", "A opção correta é a B",
    ]),
    "one verdict a letter": ("B", [
        "A: incorrect. B: correct.", "A - wrong\nB - right", "A: No\nB: Yes", "A (wrong), B (right)",
        "A: false; B: true", "A) Incorrect.\nB) Correct.\nC) Incorrect - too far.", "- A: wrong\n- B: right",
        "Answer: B\nA: wrong", "B: right", "B: wrong way",
    ]),
    "a letter preferred to another": ("B", [
        "I would pick B over A", "Unlike A, B is correct", "I initially thought A, but the answer is B",
    ]),
    "the letter and a mark": ("B", [
        "B?", "(B)?", "B!", "B...", "<B>", "- B", "(B", "B]", "<b>B</b>", "<strong>(B)</strong>", "<b>",
        "B\u200b", "\ufeffB",
    ]),
    "a small letter after a cue": ("B", [
        "option b", "Option b.", "choice b", "answer: b", "the answer is b",
    ]),
    "the letter A is no article": ("A", [
        "option a", "Option (a)", "(a) dog", "Answer A", "A is correct", "A is right.", "A is the right choice",
        "Option A", "A would be correct", "A it is", "Most likely A", "A person walks. A",
    ]),
    "an article is not the letter A": ("B", [
        "A correct answer is B", "A good answer is B", "A man walks, so B",
    ]),
    "a conclusion": ("B", [
        "So, B.", "Thus B", "Therefore, B.", "It's B", "It is B.", "I think B", "I believe it is B.", "I'd say B",
        "Yes, B", "I would go with B", "I select option B.", "My final answer is B.", "The correct letter is B",
        "Probably B", "It must be B.", "In conclusion, B", "The man moves left; therefore B",
        "The car is blue so the answer is B", "Watching the clip closely the answer is B", "It is blue.\nB",
        "Answer:B", "Answer:\n\nB. blue", "answer = B", "The answer is:\nB", "Explanation: it is blue.\nAnswer: B",
        "Not sure, but B", "B, no doubt", "No, B",
    ]),
    "text after the letter": ("B", [
        "B, because it is blue", "B because it is blue", "B since it is blue", "B (blue)", "Option B: blue",
        "B: A man", "The answer is (B) blue", "The answer is B, which is blue", "I choose B as the answer",
        "B. is correct", "B is correct according to the video", "B. is walking", "B) is not moving", "B.不动",
        "B. Not visible", "Answer: B (not A)", "As the man runs the answer is B",
        "B is the correct answer to the question", "(B) is the answer",
    ]),
    "the others are wrong": ("B", [
        "A is wrong, so B", "A is wrong so B", "A is wrong. B", "A is wrong and B is right",
        "A and C are wrong, so B", "A, C, and D are wrong. The answer is B.", "Not A but B", "Not A. B.",
        "It can't be A, so it must be B", "I rule out A and choose B", "I don't think it is A. I choose B.",
        "B because A is wrong", "B, since C is too far", "B because A and C are wrong", "B rather than A",
        "B instead of A", "Is it A? The answer is B.", "A? No, B.", "Neither A nor C, so B",
        "The answer is B. A is wrong.",
    ]),
    "a choice rejected": (None, [
        "Don't pick A", "Do not pick A", "Don\u2019t choose A", "dont pick A", "I would not choose A", "never A",
        "I reject A", "I wouldn't choose A", "A. is wrong", "A) is wrong", "(A) is wrong", "A isn't right",
        "A is not the answer", "A cannot be right", "Option A is wrong", "The answer A is wrong",
        "Choose anything but A", "All except A", "I doubt that the answer is A", "It is unlikely to be A",
        "It is impossible that the answer is A", "I rule out A", "Neither A nor B", "不选A", "不是A", "答案不是A",
        "A不对", "我不认为答案是A", "La réponse n'est pas A", "Die Antwort ist nicht A", "La respuesta no es A",
        "A: wrong", "A: incorrect", "A - wrong", "A (wrong)", "(A): wrong", "A. Wrong.", "Option A: wrong", "A: No",
        "A. incorrect B. correct",
        "A: 错误", "Keine Antwort A", "My second choice is A",
    ]),
    "a question": (None, [
        "Could it be A?", "Should I choose A?", "Is A correct?", "A or B?", "A? No.",
    ]),
    "a letter in a description": (None, [
        "A is right of the car", "B is right of the car", "A is right there", "A is to the right of B",
        "A is going right", "The best part is A man", "the shirt says B", "The first letter is A",
        "Person A is right", "Plan B", "It was a", "The man chose B", "Option A shows a man",
        "You should turn right at A",
    ]),
    "several choices": (None, [
        "B or C?", "A or maybe B", "A and then B", "A, B and C", "A & B", "A is right, B is right",
        "A, but B is possible", "A is correct. B is also correct.", "The answers are A and C", "选A或B", "选A和B",
        "The answer is A. Answer: B",
    ]),
}  # fmt: skip

DEBATABLE = [  # text, letter, why this reading
    ("The answer is B, not C", "B", "what B is chosen over is no second choice, as in 'A is wrong, so B'"),
    ("B, not A, not C", "B", "as above"),
    ("Perhaps B", "B", "doubt about the one letter named; a guess is what the question asks for"),
    ("It could be B", "B", "as above"),
    ("There is no doubt that the answer is A", "A", "'no doubt' is read as 'surely', no other double negation is"),
    ("A is not wrong", None, "not wrong is not yet right, and double negations are not read"),
    ("the answer is a", "A", "an article would have a noun after it"),
    ("so a", None, "a small a without a cue is more often the start of something that was cut"),
    ("Is the answer B? Yes.", None, "the letter stands in a question; what answers it names none"),
    ("A because it is red, or B", None, "names two"),
    ("The options are A, B and C. The answer is B.", None, "a list beside a choice looks like a hedge"),
    ("I see C, so the answer is B", None, "a capital that stands alone counts against another choice"),
    ("The answer is B blue", None, "the letter could start a name, as in 'vitamin B complex'"),
    ("B红色", None, "as above"),
    ("Since he does not turn the answer is B", None, "without a comma nobody tells what 'not' is about"),
    ("There is no sign that the answer is A", None, "as above"),
    ("A: B", None, "'A:' may be short for 'answer', or the first label"),
    ("A错B对", None, "two clauses without a mark between them are one clause, and it rejects"),
    ("The man would pick B", "B", "'pick' is a cue, whoever picks"),
    ("1. B", "B", "a numbered list of one"),
    ("B. No", "B", "'no' and 'false' after a label are more often the text of an option than a verdict"),
    ("B: No, he sits", "B", "as above, if more text follows; 'B: No' alone is a verdict"),
    ("B is my first choice, my second is A", None, "'second' rejects A, but 'first' is no word of a choice"),
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
    phrases = [text for _, texts in PHRASES.values() for text in texts]
    assert len({case[:2] for case in LETTERS}) + len({*phrases, *(case[0] for case in DEBATABLE)}) >= 300
    assert len({case[0] for case in ANSWERS}) >= 35


@pytest.mark.parametrize(("text", "options", "letter"), LETTERS)
def test_choice_letter(text, options, letter):
    assert choice_letter(text, options) == letter


@pytest.mark.parametrize("group", PHRASES)
def test_phrases(group):
    letter, texts = PHRASES[group]
    assert [text for text in texts if choice_letter(text) != letter] == []


@pytest.mark.parametrize(("text", "letter", "why"), DEBATABLE)
def test_debatable_texts(text, letter, why):
    assert choice_letter(text) == letter, why


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
        "A is wrong, ",
        "so B ",
        "答",
        "选A",
        "A, ",
        "(b) ",
        "I ",
        "no doubt ",
        "A: wrong. ",
        "A over ",
        "<b>",
    ],
)
def test_time_grows_no_faster_than_the_text(unit):
    """Ten times the characters may take 30 times as long; what backtracks takes 100 times as long, or for ever."""
    short, long = ((unit * count)[:count] for count in (10_000, 100_000))

    def seconds(text):
        start = time.thread_time()
        answer_text(text)
        answer_text(text, strict=False)
        choice_letters(text)
        choice_letters(text, COLOURS)
        return time.thread_time() - start

    least = min(seconds(short) for _ in range(3))
    assert any(seconds(long) < 30 * least + 0.005 for _ in range(10))
