"""What a completion answers: the one parser that the training reward and the evaluation share.

Every pattern runs on whitespace-collapsed text and holds no nested repeats, so the time is linear in the length.
Choices are read in English, and short answers also in Chinese, Japanese, Korean, French, German, Spanish, Italian and
Portuguese.
"""

import itertools
import re
import unicodedata

_TAG = re.compile(r"</?answer>")
_LETTERS_UNKNOWN = "ABCDEFGHIJ"  # the letters accepted where the options are not known
_EDGES = " .,:;!?()[]<>'-。、"  # what may stand around a letter
_LABEL = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])(?:\)[.:]?|[.:](?=\s|$)|(?=\n))|([A-Z]) [-\u2013\u2014](?= ))\s?"
)
_ASIAN = "\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3"  # kana, Han and Hangul stand beside a letter without a space
_REWRITES = (
    (re.compile(rf"(?<=[{_ASIAN}])(?=[A-Za-z(])|(?<=[A-Za-z.:)])(?=[{_ASIAN}])"), " "),
    (re.compile(r"(?<!\w)[(\[]([A-Za-z])(?=[)\]])"), lambda found: found[1].upper()),  # "(b)" is "B)"
    (
        re.compile(
            r"(?<![\w'])([A-Za-z])[.:)\]]+ (?=(?:is|was)(?: (?:the )?(?:wrong|incorrect|false)"
            r"|(?:n't| not) (?:the )?(?:right|correct|answer))\b)"
        ),
        r"\1 ",
    ),  # "A. is wrong" is one clause
    # "A: wrong" at the start of a sentence is "A is wrong". "B. No" rather quotes an option.
    (
        re.compile(
            r"(?<![^\n.,;!-] )(?<![\w'])((?:option )?[A-Z])"
            r"(?:[)\]]?: ?|[.)\]] ?(?!no|false)| [-\u2013\u2014] ?| [(\[])"
            r"(?=(?:wrong|incorrect|not (?:correct|right)|错误?|不对)"
            r"(?:[)\].,;:!]| (?:[-\u2013\u2014(]|because\b|[A-Z][.:)])|$)"
            r"|(?:no|false)(?:[)\].;]|$))",
            re.IGNORECASE | re.MULTILINE,
        ),
        r"\1 is ",
    ),
    (re.compile(r"(?<=\bé )a (?=[A-Z]\b)"), ""),  # the article: "A resposta é a B"
    (re.compile(r"^[a-z](?=[.:)](?:\s|$))"), lambda found: found[0].upper()),  # "b) red" is "B) red"
    (re.compile(r"\b(?:no|without(?: a| any)?) doubt\b", re.IGNORECASE), "surely"),
    (re.compile(r"\bgo(?:ing)? with\b"), "choose"),
)
# A clause ends with a line, a question, a sentence, a label ("B) red"), a comma that is not of a list ("A, B and C"),
# and before a bracket or a conjunction.
_BREAK = re.compile(
    r"\n|(?<=\?)|[;!。]|\.(?= |$)|(?<=\b[A-Za-z])[:)\]]| [-\u2013\u2014] | [(\[]"
    r"|[,、](?! ?(?:and |or )?[A-Z](?:,| and\b| or\b| are\b))"
    r"|(?<!anything) (?=(?i:because|since|as|although|while|which|so|but|therefore|thus|hence)\b)"
    r"| (?=(?:and|or) (?:\w\w|\w is))|(?<=\b[A-Z]) (?=not\b|rather\b|instead\b|over [A-Z]\b)|(?=因为|因此|所以|但|而不)"
)
_LONG = 1000  # characters; a clause this long chooses and rejects nothing
# In a clause that gives a reason, a letter that stands alone is no evidence: "B because C is small".
_REASON = re.compile(r" ?(?:because|since|as|although|while|which)\b|因为", re.IGNORECASE)
_REJECTS = re.compile(  # a clause that rejects what it names
    r"n't\b|\b(?:do|does|is|would)nt\b|[不错没]|非(?!常)|别选|아니|^over [A-Z]\b"
    r"|\b(?:not|cannot|never|no|nor|neither|wrong|incorrect|false|doubt|unlikely|impossible|except|anything but|avoid"
    r"|without|rather|instead|reject|(?:exclude|eliminate|rule)d?|unlike|initially thought|my second"
    r"|pas|nicht|keine?|falsch|faux|não|non è)\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(  # and the pronoun I
    r"(?<![\w'-])(?:[Aa] (?!(?:[A-Za-z]|is|was|it|or|and|nor|vs|would|should|must|might|may|could|seems)\b)|[Ii] )"
    r"(?=[A-Za-z])"
)
# A capital that stands alone. "A" before a word is the article, unless that word joins it to another choice.
_LONE = re.compile(r"(?<![\w'-])(?:([B-HJ-Z])|(A)(?! (?!or\b|and\b|nor\b|vs\b)\w))(?![\w'-])")
_TOKEN = re.compile(rf"[{_ASIAN}]|[^\s:={_ASIAN}]+")
_CUES = frozenset(
    "answer option choice choose select pick correct réponse antwort respuesta opción risposta resposta opção"
    " 答 选 選 択 답".split()
)
# What else may stand beside the letter in a clause that chooses it.
_WORDS = (
    _CUES
    | frozenset(
        "the my final letter right best true only is was be will would should must might may could seems so thus "
        "therefore hence then and or but i'd i'll i'm it it's that that's this one here chose selected picked think "
        "believe guess say conclude most likely probably definitely surely undoubtedly clearly perhaps maybe yes ok "
        "la le bonne est c'est donc je choisis lettre die ist also correcta es corretta correta è é sino "
        "sondern".split()
    )
    | frozenset("案是为择正确对应该所以因此我故项而的最终但和或えはがです解정은이입니다")
)


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
        contents = [text[tag.end() : end] for tag, end in zip(tags, ends) if tag[0] == "<answer>"]
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

    Only letters of existing options count (A to J if the options are unknown). The letter alone ("b", "(B)?") and the
    whole text of exactly one option choose it. Any other text is cut into clauses. Those that reject or ask are left
    out: "A is wrong, so B" chooses B. The others choose as `_chosen` says. A letter inside a word, a lone article, and
    a label whose text is another option's are no answer.
    """
    valid = [chr(ord("A") + i) for i in range(len(options))] or list(_LETTERS_UNKNOWN)
    text = _plain(text)
    bare = text.strip(_EDGES).upper()
    if _is_letter(bare):
        return (bare,) if bare in valid else ()
    texts = [_option_text(option, letter) for option, letter in zip(options, valid)]
    if same := _letters_of(_bare_text(text), texts):
        return same
    if (label := _LABEL.match(text)) and (same := _letters_of(_bare_text(text[label.end() :]), texts)):
        letter = _label_letter(label)
        return (letter,) if letter in same else tuple(sorted({letter, *same}))

    named, lone = set(), set()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for clause in dict.fromkeys(_BREAK.split(text)):
        if clause.endswith("?") or len(clause) < _LONG and _REJECTS.search(clause):
            continue
        named |= _chosen(clause) if len(clause) < _LONG else set()
        if not _REASON.match(clause):
            lone |= {found[1] or found[2] for found in _LONE.finditer(clause)}
    letters = sorted((named | lone) & set(valid))
    # A lone capital is evidence against another choice, never a choice: "vitamin C" answers nothing.
    return tuple(letters) if named & set(valid) or len(letters) > 1 else ()


def _chosen(clause: str) -> set[str]:
    """The letters, upper case, that a clause chooses: those in a run of known words.

    The run is the whole clause ("so B", "I think B"); or it holds a cue and ends the clause ("After all that, the
    answer is B"); or it starts the clause, with the letter before the cue ("B is correct for both"). A small letter
    always needs a cue.
    """
    words = [word for part in _TOKEN.findall(_ARTICLE.sub("", clause)) if (word := part.strip(_EDGES))]
    letters, end = set(), 0
    for known, run in itertools.groupby(words, lambda word: _is_letter(word) or word.lower() in _WORDS):
        run = list(run)
        start, end = end, end + len(run)
        found = {word for word in run if _is_letter(word)}
        if not known or not found:
            continue
        named = [word for word in run if word in found or word.lower() in _CUES]
        cued = not found.issuperset(named)
        whole = len(run) == len(words) and all(word.isupper() for word in found)
        if whole or cued and (end == len(words) or start == 0 and named[0] in found):
            letters |= {letter.upper() for letter in found}
    return letters


def _is_letter(word: str) -> bool:
    return len(word) == 1 and word.isascii() and word.isalpha()


def choice_letter(text: str, options: tuple[str, ...] = ()) -> str | None:
    """The one letter that `text` chooses, upper case, or None for none or several; see `choice_letters`."""
    letters = choice_letters(text, options)
    return letters[0] if len(letters) == 1 else None


def _plain(text: str) -> str:
    """`text` with full-width forms folded, mark-up removed and whitespace collapsed within its lines."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm) ?\{|[*_`$}{\"\u201c\u201d【】「」『』]", "", text)
    text = re.sub(r"[\u200b-\u200f\u2060\ufeff]", "", text)  # nothing that is seen
    text = re.sub(r"<(b|i|u|p|em|strong)>([^<>]*)</\1>", r"\2", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip()).strip(" '")


def _bare_text(text: str) -> str:
    """`text` for comparison: case folded, on one line, without the punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip(" .,:;!?'").lstrip(" '")


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
    return _bare_text(option[label.end() :] if own else option)
