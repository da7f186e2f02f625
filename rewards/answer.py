"""What a completion answers: the one parser that the training reward and the evaluation share.

Every pattern runs on whitespace-collapsed text and holds no nested repeats, so the time is linear in the length.
Choices are read in English, and short answers also in Chinese, Japanese, Korean, French, German, Spanish, Italian and
Portuguese.

How `choice_letters` reads a text. Each step applies if those before it find nothing:

    1. The text is a letter:       "(b)" -> B
    2. The text is an option:      "blue", "B) blue" -> B
    3. _REWRITES unify spellings:  "A. is wrong, so I go with (b)" -> "A is wrong, so I choose B)"
       _BREAK cuts clauses:        "A is wrong", "so I choose B"
       _REJECTS drops clauses:     "so I choose B"
       `_chosen` reads the rest:   -> B
"""

import re
import unicodedata

_EDGES = " .,:;!?()[]<>'-。、"  # what may stand around a letter
_ASIAN = "\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3"  # kana, Han and Hangul stand beside a letter without a space
_TAG = re.compile(r"(</?answer>)")
_LABEL = re.compile(  # "(b)", "B.", "B)", "B" above a line, "B -"; the group is the letter
    r"(?=[(\[]?([A-Za-z]))(?:[(\[]\w[)\]][.:]?|\w(?:\)[.:]?|[.:](?=\s|$)|(?=\n))|[A-Z] [-–—](?= ))\s?"
)
_WRONG, _RIGHT = "(?:the )?(?:wrong|incorrect|false)", "(?:the )?(?:right|correct|answer)"
_REWRITES = (  # (pattern, replacement); applied in this order
    # "答案是B" -> "答案是 B"
    (rf"(?<=[{_ASIAN}])(?=[A-Za-z(])|(?<=[A-Za-z.:)])(?=[{_ASIAN}])", " "),
    # "option (b)" -> "option B)"; "b) red" -> "B) red"
    (r"(?<!\w)[(\[]([A-Za-z])(?=[)\]])|^([a-z])(?=[.:)](?:\s|$))", lambda found: (found[1] or found[2]).upper()),
    # "A. is wrong" -> "A is wrong", which is one clause
    (rf"(?<![\w'])([A-Za-z])[.:)\]]+ (?=(?:is|was)(?: {_WRONG}|(?:n't| not) {_RIGHT})\b)", r"\1 "),
    # At the start of a sentence, "A: wrong" -> "A is wrong". But "B. No" more often quotes an option.
    (
        r"(?im)(?<![^\n.,;!-] )(?<![\w'])((?:option )?[A-Z])"
        r"(?:[)\]]?: ?|[.)\]] ?(?!no|false)| [-–—] ?| [(\[])(?=(?:no|false)(?:[)\].;]|$)"
        r"|(?:wrong|incorrect|not (?:correct|right)|错误?|不对)(?:[)\].,;:!]| (?:[-–—(]|because\b|[A-Z][.:)])|$))",
        r"\1 is ",
    ),
    # "A resposta é a B" -> "A resposta é B"
    (r"(?<=\bé )a (?=[A-Z]\b)", ""),
    # "no doubt" -> "surely"
    (r"(?i)\b(?:no|without(?: a| any)?) doubt\b", "surely"),
    # "I would go with B" -> "I would choose B"
    (r"\bgo(?:ing)? with\b", "choose"),
)
# A clause ends with a line, a question, a sentence, a label ("B) red"), a comma that is not of a list ("A, B and C"),
# and before a bracket or a conjunction.
_BREAK = re.compile(
    r"\n|(?<=\?)|[;!。]|\.(?= |$)|(?<=\b[A-Za-z])[:)\]]| [-–—] | [(\[]"
    r"|[,、](?! ?(?:and |or )?[A-Z](?:,| and\b| or\b| are\b))"
    r"|(?<!anything) (?=(?i:because|since|as|although|while|which|so|but|therefore|thus|hence)\b)"
    r"| (?=(?:and|or) (?:\w\w|\w is))|(?<=\b[A-Z]) (?=not\b|rather\b|instead\b|over [A-Z]\b)|(?=因为|因此|所以|但|而不)"
)
_LONG = 1000  # characters; a clause this long chooses and rejects nothing
_REJECTS = re.compile(  # a clause that rejects the letters in it
    r"(?i)n't\b|\b(?:do|does|is|would)nt\b|[不错没]|非(?!常)|别选|아니|^over [A-Z]\b"
    r"|\b(?:not|cannot|never|no|nor|neither|wrong|incorrect|false|doubt|unlikely|impossible|except|anything but|avoid"
    r"|without|rather|instead|reject|(?:exclude|eliminate|rule)d?|unlike|initially thought|my second"
    r"|pas|nicht|keine?|falsch|faux|não|non è)\b"
)
# In a clause that gives a reason, a letter that stands alone is no evidence: "B because C is small".
_REASON = re.compile(r" ?(?:because|since|as|although|while|which)\b|因为", re.IGNORECASE)
_ARTICLE = re.compile(  # and the pronoun I
    r"(?<![\w'-])(?:[Ii] |[Aa] (?!(?:[A-Za-z]|is|was|it|or|and|nor|vs|would|should|must|might|may|could|seems)\b))"
    r"(?=[A-Za-z])"
)
# A capital that stands alone. "A" before a word is the article, unless that word joins it to another choice.
_LONE = re.compile(r"(?<![\w'-])(?:[B-HJ-Z]|A(?! (?!or\b|and\b|nor\b|vs\b)\w))(?![\w'-])")
_TOKEN = re.compile(rf"[{_ASIAN}]|[^\s:={_ASIAN}]+")
_WORDS = {  # class -> words
    "B": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "b": "a b c d e f g h i j k l m n o p q r s t u v w x y z",  # a small letter chooses only beside a cue
    # cues
    "c": "answer option choice choose select pick correct réponse antwort respuesta opción risposta resposta opção"
    " 答 选 選 択 답",
    # fillers: what else may stand beside the letter in a clause that chooses it
    "f": "the my final letter right best true only is was be will would should must might may could seems so thus"
    " therefore hence then and or but i'd i'll i'm it it's that that's this one here chose selected picked think guess"
    " believe say conclude most likely probably definitely surely undoubtedly clearly perhaps maybe yes ok"
    " la le bonne est c'est donc je choisis lettre die ist also correcta es corretta correta è é sino sondern"
    " 案 是 为 择 正 确 对 应 该 所 以 因 此 我 故 项 而 的 最 终 但 和 或 え は が で す 解 정 은 이 입 니 다",
}
_WORD_CLASS = {word: name for name, words in _WORDS.items() for word in words.split()}  # any other word is "x"


def answers_given(completion: str, strict: bool = True) -> tuple[str, ...]:
    """The distinct non-empty texts in answer tags, in order, stripped; () if there are none.

    A thought that opens the completion, `<think>` to the first `</think>`, is left out: it may talk of tags.

    strict (training): tags must alternate, `<answer>` then `</answer>`; anything unclosed, nested or stray gives ().
    not strict (evaluation of any model): an unclosed `<answer>B` counts, nested tags give their contents, and a
    completion without any tag is its own answer, unless it ends inside the thought.
    """
    thought = re.match(r"\s*<think>(?:.*?(</think>))?", completion, re.DOTALL)
    before, *rest = _TAG.split(completion[thought.end() :] if thought else completion)
    tags, texts = rest[::2], rest[1::2]  # "<answer>B</answer>." -> ["<answer>", "</answer>"], ["B", "."]
    if strict and tags != ["<answer>", "</answer>"] * (len(tags) // 2):
        return ()
    answers = [text for tag, text in zip(tags, texts) if tag == "<answer>"]
    if not tags and not strict and not (thought and not thought[1]):
        answers = [before]
    return tuple(dict.fromkeys(text.strip() for text in answers if text.strip()))


def answer_text(completion: str, strict: bool = True) -> str | None:
    """The one answer that the completion gives, stripped; None if there is no answer, or if there are different ones.

    The same answer twice is one answer. `strict` is as in `answers_given`: training leaves it True, so that a
    completion cut at the length limit earns nothing; evaluation may pass False.
    """
    given = answers_given(completion, strict)
    return given[0] if len(given) == 1 else None


def choice_letter(text: str, options: tuple[str, ...] = ()) -> str | None:
    """The one letter that `text` chooses, upper case; None if it chooses none or several (see `choice_letters`)."""
    letters = choice_letters(text, options)
    return letters[0] if len(letters) == 1 else None


def choice_letters(text: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The letters that `text` names as its choice: () for no choice, several for a text that hedges.

    Only letters of existing options count (A to J if the options are unknown). A text that is a letter ("b", "(B)?") or
    the text of exactly one option chooses it. Any other text is cut into clauses. Clauses that reject or ask are left
    out: "A is wrong, so B" chooses B. The others choose as `_chosen` says. A letter inside a word, a lone article, and
    a label whose text is another option's are no choice.
    """
    valid = [chr(ord("A") + i) for i in range(len(options) or 10)]
    text = _plain(text)
    # 1) the whole text is a letter
    bare = text.strip(_EDGES).upper()
    if _WORD_CLASS.get(bare) == "B":
        return (bare,) if bare in valid else ()
    # 2) the whole text is an option, with or without a label
    letters_of: dict[str, list[str]] = {}  # text of an option -> its letters
    for letter, option in zip(valid, map(_plain, options)):
        label = _LABEL.match(option)
        start = label.end() if label and label[1].upper() == letter else 0  # "B) blue" is "blue"
        letters_of.setdefault(_bare_text(option[start:]), []).append(letter)
    letters_of.pop("", None)
    if same := letters_of.get(_bare_text(text)):
        return tuple(same)
    label = _LABEL.match(text)
    if label and (same := letters_of.get(_bare_text(text[label.end() :]))):
        letter = label[1].upper()
        return (letter,) if letter in same else tuple(sorted({letter, *same}))
    # 3) clause by clause
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    named, lone = set(), set()
    for clause in dict.fromkeys(_BREAK.split(text)):
        is_long = len(clause) >= _LONG
        if clause.endswith("?") or (not is_long and _REJECTS.search(clause)):
            continue
        named |= set() if is_long else _chosen(clause)
        lone |= set() if _REASON.match(clause) else set(_LONE.findall(clause))
    letters = sorted((named | lone) & set(valid))
    # A lone capital is evidence against another choice, never a choice: "vitamin C" answers nothing.
    return tuple(letters) if named & set(valid) or len(letters) > 1 else ()


def _chosen(clause: str) -> set[str]:
    """The letters, upper case, that a clause chooses by the classes of its words (see _WORD_CLASS).

    "so B" -> {B}; "so b" -> {}; "After all that, the answer is b" -> {B}; "B is correct for both" -> {B}
    """
    words = [word for part in _TOKEN.findall(_ARTICLE.sub("", clause)) if (word := part.strip(_EDGES))]
    classes = "".join(_WORD_CLASS.get(word) or _WORD_CLASS.get(word.lower(), "x") for word in words)
    chosen = []
    if "x" not in classes and "b" not in classes:  # every word is known
        chosen += words
    head, tail = classes.partition("x")[0], classes.rpartition("x")[2]
    if "c" in tail:  # the known words that end the clause hold a cue
        chosen += words[len(words) - len(tail) :]
    if re.match("f*[Bb].*c", head):  # in those that start it, a letter comes before the cue
        chosen += words[: len(head)]
    return {word.upper() for word in chosen if _WORD_CLASS.get(word) in ("B", "b")}


def _plain(text: str) -> str:
    """`text` with full-width forms folded, mark-up removed and whitespace collapsed within its lines."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm) ?\{|[*_`$}{\"\u201c\u201d【】「」『』]", "", text)
    text = re.sub(r"[\u200b-\u200f\u2060\ufeff]", "", text)  # invisible characters
    text = re.sub(r"<(b|i|u|p|em|strong)>([^<>]*)</\1>", r"\2", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip()).strip(" '")


def _bare_text(text: str) -> str:
    """`text` for comparison: case folded, on one line, without the punctuation at its end."""
    return " ".join(text.casefold().split()).rstrip(" .,:;!?'").lstrip(" '")
