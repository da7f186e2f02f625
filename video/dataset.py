"""Rows of a data file as `Sample`s.

A row's format is recognised by its fields: one small function a format, listed in FORMATS. A new format is one function
more. What is wrong with a row raises DataError; a video that is missing or broken does not, for only its own sample is
lost, when it is encoded.
"""
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LETTER = re.compile(r"\(?[A-Za-z](?![A-Za-z])")  # "B", "B.", "(B)", "B) red"; not "Blue"
MARKS = re.compile(r"<(?:video|image)>\n?")  # where other trainers put the pixels; here they always come first
MULTIPLE_CHOICE = "multiple choice"


class DataError(ValueError):
    """A data file or row that cannot be used: one line with the place and the mend."""


@dataclass(frozen=True)
class Sample:
    """One question. `key` names its row, e.g. "train.jsonl:17" (1-based line, or item of a .json array)."""

    key: str
    problem: str  # the question as asked, options included
    answer: str  # the ground truth, e.g. "B" or "B."
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    problem_type: str = MULTIPLE_CHOICE
    options: tuple[str, ...] = ()
    completions: tuple[str, ...] = ()  # target texts of a supervised warm-up
    meta: dict = field(default_factory=dict)  # the row's other fields


def read_samples(path: str | Path, video_root: str | Path | None = None) -> list[Sample]:
    """The samples of a .jsonl file, or of a .json file that holds an array of rows.

    Relative video paths are joined with `video_root` (default: the folder of the file). An absolute path that does
    not exist is re-rooted there by the longest suffix of it that does: datasets carry paths of their author's disk.
    Raises DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--data {path}: no such file; give a .jsonl file, or run --preset demo, which makes its own")
    root = Path(video_root) if video_root is not None else path.parent
    samples = [_sample(row, key, root) for key, row in _rows(path)]
    if not samples:
        raise DataError(f"--data {path}: is empty; give a file with one JSON row a line")
    return samples


def reroot(path: str, root: Path) -> str:
    """Where `path` lies under `root`: joined if relative; if absolute and gone, by the longest suffix found there."""
    given = Path(path)
    if not given.is_absolute():
        return str(root / given)
    if not given.exists():
        for start in range(1, len(given.parts)):
            candidate = root.joinpath(*given.parts[start:])
            if candidate.exists():
                return str(candidate)
    return path


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(key, row) of each row. Blank lines are passed over but counted, so that keys stay line numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--data {path}: is not UTF-8 text ({error.reason}); give a .jsonl file") from error
    if path.suffix == ".json":
        rows = _json(text, path.name)
        if not isinstance(rows, list):
            raise DataError(f"{path.name}: holds no array; write rows as [{{...}}, ...], or one a line in a .jsonl")
        numbered = enumerate(rows, start=1)
    else:
        # split on "\n" alone: splitlines() would also cut at U+2028 inside a string
        lines = enumerate(text.split("\n"), start=1)
        numbered = ((n, _json(line, f"{path.name}:{n}")) for n, line in lines if line.strip())
    for number, row in numbered:
        key = f"{path.name}:{number}"
        if not isinstance(row, dict):
            raise DataError(f"{key}: is a {type(row).__name__}, not an object; write a row as {{\"problem\": ...}}")
        yield key, row


def _json(text: str, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON ({error.msg}, column {error.colno}); mend or delete it") from error


def _sample(row: dict, key: str, root: Path) -> Sample:
    for fields, parse in FORMATS:
        if fields <= row.keys():
            return parse(row, key, root)
    known = "; ".join(" + ".join(sorted(fields)) for fields, _ in FORMATS)
    raise DataError(f"{key}: has the fields {sorted(row)}, of no known format; needed are: {known}")


def _open_r1_video(row: dict, key: str, root: Path) -> Sample:
    """open-r1-video-4k, which is also the project's own form: problem, solution, video(s) and/or image(s)."""
    problem, solution = _text(row, "problem", key), _text(row, "solution", key)
    return _build(
        row, key, root, problem, _answer(solution), videos=_texts(row, key, "video", "videos"),
        images=_texts(row, key, "image", "images"),
        used={"problem", "solution", "video", "videos", "image", "images"},
    )


def _video_r1(row: dict, key: str, root: Path) -> Sample:
    """Video-R1: `path` is a video or an image by `data_type`, and the options are not in the question yet."""
    kind, paths = _text(row, "data_type", key), _texts(row, key, "path")
    if kind not in ("video", "image"):
        raise DataError(f"{key}: data_type is {kind!r}; it must be \"video\" or \"image\"")
    problem, options = _text(row, "problem", key), _texts(row, key, "options")
    if options:
        problem = "\n".join((problem, "Options:", *options))
    videos, images = (paths, ()) if kind == "video" else ((), paths)
    return _build(
        row, key, root, problem, _answer(_text(row, "solution", key)), videos, images,
        used={"problem", "solution", "path", "data_type"},
    )


def _llava_video(row: dict, key: str, root: Path) -> Sample:
    """LLaVA-Video-large-swift, raw; cut as Open-R1-Video's reformat did: at "Please", and to two characters."""
    problem = MARKS.sub("", _text(row, "query", key)).split("Please")[0].strip()
    return _build(
        row, key, root, problem, _text(row, "response", key)[:2].strip(), videos=_texts(row, key, "videos"),
        images=_texts(row, key, "images"), used={"query", "response", "videos", "images"},
    )


# tried in this order, so a format comes before those whose fields it includes
FORMATS = (
    (frozenset({"problem", "solution", "path", "data_type"}), _video_r1),
    (frozenset({"problem", "solution"}), _open_r1_video),
    (frozenset({"query", "response"}), _llava_video),
)


def _build(row, key, root, problem, answer, videos, images, used) -> Sample:
    """A sample from a row's parts; the fields that no format claims go to `meta`."""
    problem_type = _text(row, "problem_type", key) if "problem_type" in row else MULTIPLE_CHOICE
    if problem_type == MULTIPLE_CHOICE and not LETTER.match(answer):
        mend = "write e.g. <answer>B</answer>, or set problem_type"
        raise DataError(f"{key}: solution {answer!r} has no option letter; {mend}")
    used = used | {"problem_type", "options", "completions"}
    return Sample(
        key=key, problem=problem, answer=answer, problem_type=problem_type,
        videos=tuple(reroot(video, root) for video in videos), images=tuple(reroot(image, root) for image in images),
        options=_texts(row, key, "options"), completions=_texts(row, key, "completions"),
        meta={name: value for name, value in row.items() if name not in used},
    )


def _answer(solution: str) -> str:
    """The text between <answer> and </answer>, or all of it where there are no such tags, stripped."""
    tagged = ANSWER.search(solution)
    return (tagged.group(1) if tagged else solution).strip()


def _text(row: dict, name: str, key: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key}: field {name!r} must be a text that is not empty, got {value!r}")
    return value


def _texts(row: dict, key: str, *names: str) -> tuple[str, ...]:
    """The texts of the first of the fields `names` that the row has: a text counts as a list of one, null as none."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            raise DataError(f"{key}: field {name!r} must be a text or a list of texts, got {value!r}")
        return tuple(values)
    return ()
