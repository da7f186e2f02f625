"""What a completion answers: the one parser that the training reward and the evaluation share.

Every pattern runs on whitespace-collapsed text and holds no nested repeats, so the time is linear in the length.
"""

import re
import unicodedata

_TAG = re.compile(r"</?answer>")
_LETTERS_UNKNOWN = "ABCDEFGHIJ"  # the letters accepted where the options are not known
_END = r"(?= ?(?:$|[):;,\]]|\.(?!\w)|because\b|since\b))"  # after a letter, so "the answer is A man" names none
_BARE = re.compile(r"[(\[]?([A-Za-z])[)\].:,;]*")
_LABEL = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])(?:\)[.:]?|[.:](?= |$))|([A-Z]) [-\u2013\u2014](?= )) ?")
_CUES = (
    re.compile(r"(?i:\banswer|\bchoose|\bchoice|\bselect|\bpick|\boption(?= is|:))"
               r"(?i: (?:is|would be|should be|must be|was))? ?[:=]? ?(?i:option |choice )?[(\[]?([A-Z])" + _END),
    re.compile(r"(?i:\banswer|\bchoice)(?i: is)? ?[:=]? ?[(\[]([a-z])[)\]]"),
    re.compile(r"(?i:^(?:the )?(?:option|choice) ?:? ?)[(\[]?([A-Z])" + _END),
    re.compile(r"(?<![\w'])[(\[]?([A-Z])[)\]]? is (?:the )?(?:correct|right|best|answer)\b"),
)
# A capital that stands alone. "A" before a word is the article, unless that word joins it to another choice.
_LONE = re.compile(r"(?<![\w'-])(?:([B-HJ-Z])|(A)(?! (?!or\b|and\b|nor\b|vs\b)\w))(?![\w'-])")


def answers_given(completion: str, strict: bool = True) -> tuple[str, ...]:
    """The distinct non-empty contents of the answer tags, in order, stripped; () where there is none.

    A thought that opens the completion, `<think>` to the first `</think>`, is left out: talk of tags in it is no
    answer.

    strict (training): tags must alternate, `<answer>` then `</answer>`; anything unclosed, nested or stray gives ().
    not strict (evaluation of any model): an unclosed `<answer>B` counts, nested tags give their contents, and a
    completion without any tag is its own answer, unless it ends inside the thought.
    """
    text = completion.lstrip()
    thought_open = False
    if text.startswith("<think>"):
        _, closed, after = text.partition("</think>")
        text, thought_open = (after, False) if closed else (text, True)
    tags = list(_TAG.finditer(text))
    if strict and [tag[0] for tag in tags] != ["<answer>", "</answer>"] * (len(tags) // 2):
        return ()
    if tags:
        ends = [tag.start() for tag in tags[1:]] + [len(text)]
        contents = [text[tag.end():end] for tag, end in zip(tags, ends) if tag[0] == "<answer>"]
    else:
        contents = [] if strict or thought_open else [text]
    return tuple(dict.fromkeys(content.strip() for content in contents if content.strip()))


def answer_text(completion: str, strict: bool = True) -> str | None:
    """The one answer that the completion gives, stripped, or None: no answer, or several different ones.

    Repeating the same answer is one answer. `strict` as in `answers_given`: training leaves it True, so that a
    completion cut at the length limit earns nothing; evaluation may pass False.
    """
    given = answers_given(completion, strict)
    return given[0] if len(given) == 1 else None


def choice_letters(text: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The letters that `text` names as its choice: () for none, one for an answer, more for a text that hedges.

    Only letters of existing options count (A to J where the options are unknown). Accepted: the letter alone in any
    dress ("b", "(B)", "**B**.", "\\boxed{B}"); a label before text ("B) red", "B. red"); a phrase ("The answer is B",
    "Option B", "B is correct"); the whole text of exactly one option. A letter inside a word, a lone article, and a
    label whose text is another option's are no answer.
    """
    valid = [chr(ord("A") + i) for i in range(len(options))] or list(_LETTERS_UNKNOWN)
    text = _plain(text)
    if bare := _BARE.fullmatch(text):
        letter = bare[1].upper()
        return (letter,) if letter in valid else ()
    texts = [_option_text(option, letter) for option, letter in zip(options, valid)]
    if same := _letters_of(_bare_text(text), texts):
        return same

    named = set()
    if label := _LABEL.match(text):
        letter = _label_letter(label)
        if same := _letters_of(_bare_text(text[label.end():]), texts):
            return (letter,) if letter in same else tuple(sorted({letter, *same}))
        named.add(letter)
    for cue in _CUES:
        named |= {found[1].upper() for found in cue.finditer(text)}
    lone = {found[1] or found[2] for found in _LONE.finditer(text)}
    letters = sorted((named | lone) & set(valid))
    # A lone capital is evidence against another choice, never a choice: "vitamin C" answers nothing.
    return tuple(letters) if named & set(valid) or len(letters) > 1 else ()


def choice_letter(text: str, options: tuple[str, ...] = ()) -> str | None:
    """The one letter that `text` chooses, upper case, or None for none or several; see `choice_letters`."""
    letters = choice_letters(text, options)
    return letters[0] if len(letters) == 1 else None


def _plain(text: str) -> str:
    """`text` with full-width forms folded, mark-up removed and whitespace collapsed; a first line "B" becomes "B."."""
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm) ?\{|[*_`$}{\"\u201c\u201d]", "", unicodedata.normalize("NFKC", text))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and len(lines[0]) == 1:
        lines[0] += "."
    return " ".join(lines).strip(" '")


def _bare_text(text: str) -> str:
    """`text` for comparison: case folded, without the punctuation at its end."""
    return text.casefold().rstrip(" .,:;!?'").lstrip(" '")


def _letters_of(text: str, texts: list[str]) -> tuple[str, ...]:
    """The letters of the options whose text is `text`."""
    return tuple(chr(ord("A") + i) for i, option in enumerate(texts) if text and option == text)


def _label_letter(label: re.Match) -> str:
    return (label[1] or label[2] or label[3]).upper()


def _option_text(option: str, letter: str) -> str:
    """The option without its own label ("A. red", "(A) red" and "A) red" are all "red"), for comparison."""
    option = _plain(option)
    label = _LABEL.match(option)
    own = label and _label_letter(label) == letter
    return _bare_text(option[label.end():] if own else option)
