"""Rows of other people's data as `Sample`s. The format of each row is recognised by its fields.

FORMATS lists one small function for each format; a new format is one more function. A mistake in a row raises
DataError. A missing or broken video does not: its sample is skipped later, when it is encoded. A row of any format may
also have `problem_type`, `options`, `completions`, `video_start`, `video_end`, `box_size` and `answer_form`.
"""

import functools
import itertools
import json
import os
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LETTER = re.compile(r"\(?[A-Za-z](?![A-Za-z])")  # "B", "B.", "(B)", "B) red"; not "Blue"
CHOICE = re.compile(r"\(?([A-Z])(?:[.):](?!\w)|$)")  # as LETTER, if free text may come too: not "A man"
MARKS = re.compile(r"<(?:video|image)>\n?")  # where other trainers put the pixels; here they always come first
URL = re.compile(r"\w+://[^/?#]*([^?#]*)")  # the group is its path
LETTERS = string.ascii_uppercase  # of options
MULTIPLE_CHOICE = "multiple choice"
NAMED = 10  # so many are named, of many bad rows
CLIP_FIELDS = ("video_start", "video_end", "sample_fps")  # in the order of Clip's fields
OF_ANY_FORMAT = ("problem_type", "options", "completions", "box_size", "answer_form", *CLIP_FIELDS)
SUFFIXES = ("", ".mp4", ".mkv", ".webm", ".avi", ".mov")
FOLDERS = ("", "videos", "video", "data")  # where benchmarks keep their videos, under their own root
# MVBench's rows name a file alone; the folder under its `video` depends on the subtask, which names the .json
MVBENCH_FOLDERS = {
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute "
    "counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action",
    "sta/sta_video": "action_localization",
    "scene_qa/video": "scene_transition",
    "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",
}

VIDEO_FOLDERS = ("Charades_v1", "Charades_v1_480", "timerft_data", "tvgbench_data")  # of temporal grounding
VIDEO_MMMU_FOLDERS = ("Art", "Business", "Engineering", "Humanities", "Medicine", "Science")


class DataError(ValueError):
    """A data file or row that cannot be used: one line with the place and the fix."""


def printable(text: object, most: int = 4000) -> str:
    """The first `most` characters of str(text) on one line that any terminal shows: line breaks, escape codes and the
    stray bytes of a file name that is not UTF-8 appear as in Python's repr."""
    text = str(text)
    start = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])
    return start + "…" * (len(text) > most)


def each_row(items: Iterable, make: Callable) -> list:
    """[make(item) for each item]. If `make` raises DataErrors, raises one for all of them, so that they can be fixed at
    once: how many rows are bad, and the errors of the first NAMED."""
    made, errors = [], []
    for item in items:
        try:
            made.append(make(item))
        except DataError as error:
            errors.append(str(error))
    if len(errors) == 1:
        raise DataError(errors[0])
    if errors:
        which = f", the first {NAMED}" if len(errors) > NAMED else ""
        listed = "; ".join(printable(error, 300) for error in errors[:NAMED])
        raise DataError(f"{len(errors)} of {len(errors) + len(made)} rows cannot be used{which}: {listed}")
    return made


class Clip(NamedTuple):
    """The part of a video that a row asks about."""

    start: float | None = None  # seconds; None: the start of the video
    end: float | None = None  # seconds; None: the end of the video
    fps: float | None = None  # the rate at which a folder of frames was taken (None: 2, as in qwen-vl-utils)


WHOLE = Clip()


@dataclass(frozen=True)
class Sample:
    """One question."""

    key: str  # names its row: "train.jsonl:17" (1-based line, or item of an array)
    problem: str  # the question as asked, options included
    answer: str  # the ground truth, e.g. "B" or "B."
    videos: tuple[str, ...] = ()  # files, or folders of frames
    images: tuple[str, ...] = ()  # files
    problem_type: str = MULTIPLE_CHOICE  # tells the rewards how to score: see `guess_type`
    options: tuple[str, ...] = ()  # lettered: "A. red"
    completions: tuple[str, ...] = ()  # target texts of a supervised warm-up
    clips: tuple[Clip, ...] = ()  # one for each of `videos`; () if all are taken whole
    slot: int = field(default=0, compare=False)  # its number among the samples that a step draws
    meta: dict = field(default_factory=dict)  # the row's other fields

    @property
    def media(self) -> tuple[str, ...]:
        """All its files, or folders of frames."""
        return self.videos + self.images


class Row:
    """A row while it is read: its fields by type. `used` are the names of the fields that were read."""

    def __init__(self, fields: dict, key: str, root: Path, source: str):
        self.fields, self.key, self.root, self.source, self.used = fields, key, root, source, set()

    def get(self, name: str) -> object:
        self.used.add(name)
        return self.fields.get(name)

    def text(self, *names: str) -> str:
        """The text of the first field of `names` that is there."""
        name = next((name for name in names if self.fields.get(name) is not None), names[0])
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field {name!r} must be a text that is not empty, got {value!r:.200}")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        """The texts of the first field of `names` that is there: "a" counts as ["a"], null as not there."""
        given = [(name, value) for name in names if (value := self.get(name)) is not None]
        for name, value in given:
            if not all(isinstance(item, str) and item for item in _listed(value)):
                raise self.error(f"field {name!r} must be a text or a list of texts, got {value!r:.200}")
        return tuple(_listed(given[0][1])) if given else ()

    def paths(self, *names: str) -> tuple[str, ...]:
        """As `texts`, of paths: where the files lie under the root."""
        return tuple(reroot(path, self.root) for path in self.texts(*names))

    def error(self, message: str) -> DataError:
        return DataError(f"{self.key}: {message}")


def parse_row(fields: dict, key: str, root: Path, source: str = "") -> Sample:
    """The sample of a row; `root` is where its videos lie, `source` the stem of its file's name. Raises DataError."""
    present = {name for name, value in fields.items() if value is not None}
    for names in (present, fields.keys()):  # the second only to say which field of a format is null
        for needed, parse in FORMATS.items():
            if set(needed.split()) <= names:
                return parse(Row(fields, key, root, source))
    known = "; ".join(needed.replace(" ", " + ") for needed in FORMATS)
    hint = next(filter(None, (misspelt(fields, needed.split()) for needed in FORMATS)), "")
    raise DataError(f"{key}: has the fields {sorted(fields)!r:.200}, of no known format{hint}; needed are: {known}")


def misspelt(fields: Iterable[str], needed: list[str]) -> str:
    """A question that names the needed fields and how they are spelt, "" unless each that is missing has a likeness.

    in:  ["probelm", "solution"], ["problem", "solution"]
    out: " (did you mean problem by probelm?)"
    """
    others = [name for name in fields if name not in (*needed, *OF_ANY_FORMAT)]
    close = {name: get_close_matches(name, others, 1, 0.7) for name in needed if name not in fields}
    if not all(close.values()):
        return ""
    return f" (did you mean {', '.join(f'{name} by {found[0]}' for name, found in close.items())}?)"


def reroot(path: str, root: Path) -> str:
    """Where `path` lies under `root`.

    A relative path is joined. An absolute path that does not exist is looked for by its longest suffix:
    /nas/bob/clips/a.mp4 is ROOT/clips/a.mp4 if that exists. Of a URL the path counts, so that a row that names a
    download finds the downloaded file.
    """
    if url := URL.match(path):
        path = unquote(url[1])
    given = Path(path)
    if not given.is_absolute():
        return str(root / given)
    if not os.path.exists(given):
        for start in range(1, len(given.parts)):
            candidate = root.joinpath(*given.parts[start:])
            if os.path.exists(candidate):
                return str(candidate)
    return path


def _open_r1_video(row: Row) -> Sample:
    """open-r1-video-4k, which is also the project's own form: problem, solution, video(s) and/or image(s)."""
    return _build(row, row.text("problem"), _tagged(row.text("solution")), MULTIPLE_CHOICE)


def _video_r1(row: Row) -> Sample:
    """Video-R1 and OneThinker: `path` is a video or an image by `data_type`, or a video with the image
    `additional_path`. The options are not in the question yet.

    Rows of Video-R1's CoT file also have `process`, a thought in its tags: with the solution after it, a completion.
    """
    media, paths = row.text("data_type"), row.paths("path")
    if media not in ("video", "image", "video-image"):
        raise row.error(f'data_type is {media!r:.200}; it must be "video", "image" or "video-image"')
    problem = row.text("problem") + ("\nOptions:" if row.texts("options") else "")
    parts = {"videos": (), "images": row.paths("additional_path") if media == "video-image" else ()}
    parts["images" if media == "image" else "videos"] = paths
    if row.get("process"):
        parts["completions"] = (f"{row.text('process')}\n{row.text('solution')}",)
    return _build(row, problem, _tagged(row.text("solution")), MULTIPLE_CHOICE, **parts)


def _llava_video(row: Row) -> Sample:
    """LLaVA-Video-large-swift, raw, with the rules of Open-R1-Video's own conversion, which published 4k of its rows:
    tags dropped, the question cut at the first "Please", the answer at two characters, and no other field kept."""
    question, response = re.sub("<video>|<image>", "", row.text("query")), row.text("response")
    row.used |= row.fields.keys()
    sample = _build(row, question.split("Please")[0], response[:2].strip(), MULTIPLE_CHOICE)
    sample.meta.update(original_question=question, original_answer=response)
    return sample


def _easy_r1(row: Row) -> Sample:
    """EasyR1, LongVideo-Reason and OneThinker: problem with <video> and <image> marks; answer bare or tagged, of any
    type. Times and boxes may also be an object instead of its text: {"time": [3.2, 7.5]}."""
    answer = row.get("answer")
    answer = json.dumps(answer) if isinstance(answer, (dict, list)) else str(answer)
    return _build(row, row.text("problem"), _tagged(answer))


def _messages(row: Row) -> Sample:
    """A chat: one user turn with text, videos and images, and one assistant turn. System turns are left out.

    The answer is the row's `answer` or `solution`, else the assistant's text. That text is a completion in any case.
    """
    # 1) Turns, and their parts as dicts
    turns = {"user": [], "assistant": [], "system": []}
    for turn in _listed(row.get("messages")):
        if not isinstance(turn, dict) or turn.get("role") not in tuple(turns):
            raise row.error(f"a message must have the role user, assistant or system, got {turn!r:.200}")
        turns[turn["role"]].append(_listed(turn.get("content")))
    if len(turns["user"]) != 1 or len(turns["assistant"]) > 1:
        counts = f"{len(turns['user'])} user turns and {len(turns['assistant'])} of the assistant"
        raise row.error(f"has {counts}; one is needed")
    as_dicts = lambda contents: [{"text": p} if isinstance(p, str) else p for p in itertools.chain(*contents)]
    parts, replies = as_dicts(turns["user"]), as_dicts(turns["assistant"])
    if not all(isinstance(part, dict) and isinstance(part.get("text") or "", str) for part in (*parts, *replies)):
        raise row.error('a message\'s content must be a text or a list of parts such as {"type": "video", ...}')
    # 2) Files, if they are in the parts, else in the row's own fields
    files = {}
    for media in ("video", "image"):
        paths = [part[media] for part in parts if part.get(media)]
        if not all(isinstance(path, str) for path in paths):
            raise row.error("a video or image in a message must be a path; give frames as a folder")
        if paths:
            files[f"{media}s"] = tuple(reroot(path, row.root) for path in paths)
    clips = [Clip(*(_seconds(row, part.get(name)) for name in CLIP_FIELDS)) for part in parts if part.get("video")]
    # 3) Texts
    problem, reply = "\n".join(_texts_of(parts)), "".join(_texts_of(replies))
    answer = next((str(value) for name in ("answer", "solution") if (value := row.get(name)) is not None), reply)
    if not answer.strip():
        raise row.error("has no answer; end the messages with the assistant's, or add the field 'answer'")
    own = {"clips": tuple(clips) if any(map(any, clips)) else (), "completions": (reply,) if reply else ()}
    return _build(row, problem, _tagged(answer), **files, **own)


def _mvbench(row: Row) -> Sample:
    """MVBench: candidates and the text of the right one; `start` and `end` in seconds; its root holds the folders."""
    folder = next((name for name, subtasks in MVBENCH_FOLDERS.items() if row.source in subtasks.split()), "")
    fps = 3.0 if folder.startswith("tvqa") else None
    video = _find(row, row.text("video"), (folder,))
    clip = Clip(_seconds(row, row.get("start")), _seconds(row, row.get("end")), fps)
    return _choice(row, row.texts("candidates"), row.text("answer"), video, clips=(clip,) if any(clip) else ())


def _video_mme(row: Row) -> Sample:
    return _choice(row, row.texts("options"), row.text("answer"), _find(row, row.text("videoID")))


def _tempcompass(row: Row) -> Sample:
    """TempCompass: options are in the question; "yes" and "no" become options, "Option 2: ..." is the number 2."""
    question, answer, video = row.text("question"), row.text("answer"), _find(row, row.text("video_id"))
    if _plain(answer) in ("yes", "no"):
        return _choice(row, ("yes", "no"), answer, video)
    label = re.match(r"(?:Caption|Sentence|Option) (\w)\b", answer) or CHOICE.match(answer)
    return _build(row, question, label[1] if label else answer, videos=(video,))


def _mmvu(row: Row) -> Sample:
    """MMVU: choices by letter, or none in an open-ended question."""
    videos = tuple(_find(row, path) for path in row.texts("video_path", "video"))
    choices = row.get("choices") or {}
    if not isinstance(choices, dict) or not all(isinstance(text or "", str) for text in choices.values()):
        raise row.error(f"field 'choices' must be an object of texts, got {choices!r:.200}")
    options = () if row.get("question_type") == "open-ended" else tuple(filter(None, choices.values()))
    return _choice(row, options, row.text("answer").strip(), *videos, otherwise="free-form")


def _vsi_bench(row: Row) -> Sample:
    """VSI-Bench: a question without options has a number for an answer, scored by mean relative accuracy."""
    video = _find(row, f"{row.text('dataset')}/{row.text('scene_name')}")
    return _choice(row, row.texts("options"), str(row.get("ground_truth")), video, otherwise="mra")


def _longvideobench(row: Row) -> Sample:
    """LongVideoBench: option0 to option4, "N/A" if there are fewer (or `candidates`); the index of the right one."""
    numbered = tuple(text for n in range(5) if (text := row.get(f"option{n}")) not in (None, "N/A"))
    options = row.texts("candidates") or numbered
    if not all(isinstance(option, str) for option in options):
        raise row.error(f"its options must be texts, got {options!r:.200}")
    index = row.get("correct_choice")
    if not isinstance(index, int) or not 0 <= index < len(options):
        raise row.error(f"correct_choice must be the index of one of its {len(options)} options, got {index!r:.200}")
    return _choice(row, options, LETTERS[index], _find(row, row.text("video_path")))


def _video_mmmu(row: Row) -> Sample:
    """Video-MMMU: the video has the row's id and lies in a folder of its discipline; if a question has an image, the
    published video shows it at the end. A question without options has a number or a text for an answer."""
    video = _find(row, row.text("id"), VIDEO_MMMU_FOLDERS)
    row.used |= {"image", "images"}
    return _choice(row, row.texts("options"), str(row.get("answer")), video, otherwise="")


def _moment(row: Row) -> Sample:
    """When a sentence holds, in seconds: Time-R1, Charades-STA, ActivityNet-Captions and VideoChat-R1's files of both.

    Time-R1's `video_start` and `video_end` say where the file was cut from its source, and times count from there: its
    trainer reads the whole file, and so does this.
    """
    times = row.get("timestamp")
    if not isinstance(times, list) or len(times) != 2:
        raise row.error(f"field 'timestamp' must be [start, end] in seconds, got {times!r:.200}")
    times = [_seconds(row, time) for time in times]
    return _located(row, row.text("video", "vid"), row.text("sentence", "caption"), times)


def _tvgbench(row: Row) -> Sample:
    """TVGBench: the answer is "13.4-28.1". `start` and `end` are as `video_start` and `video_end` in `_moment`."""
    times = re.fullmatch(r"(\d+\.?\d*)-(\d+\.?\d*)", row.text("answer"))
    if not times:
        raise row.error(f"the answer {row.text('answer')!r:.200} must be START-END in seconds")
    return _located(row, row.text("path"), row.text("question"), [float(time) for time in times.groups()])


def _located(row: Row, video: str, sentence: str, times: list[float]) -> Sample:
    """The sample of `_moment` and `_tvgbench`. `video` is an id, a file name, or a path in the publisher's folders."""
    row.fields = {name: value for name, value in row.fields.items() if name not in CLIP_FIELDS}
    path = _find(row, video, VIDEO_FOLDERS)
    if not os.path.exists(path) and "/" in video:
        moved = reroot("/" + video.removeprefix("./"), row.root)
        path = moved if os.path.exists(moved) else path
    problem = f'When does this happen in the video: "{sentence.strip().rstrip(".")}"?'
    return _build(row, problem, f"{times[0]} to {times[1]}", "temporal grounding", videos=(path,), images=())


def _got(row: Row) -> Sample:
    """GOT-10k as VideoChat-R1 has it: a folder of frames, and an object's box at eight moments, from 0 to 1."""
    boxes = row.get("gt")
    if not isinstance(boxes, list) or not boxes:
        raise row.error(f"field 'gt' must be a list of boxes [x1, y1, x2, y2], got {boxes!r:.200}")
    problem = f"Track the {row.text('object')}. Its box in the first frame is {json.dumps(boxes[0])}."
    sample = _build(row, problem, json.dumps(boxes), "tracking", videos=row.paths("path"), images=())
    form = f"a list of its {len(boxes)} boxes [x1, y1, x2, y2] at even distances in time, with coordinates from 0 to 1"
    return replace(sample, meta={**sample.meta, "answer_form": form})


def _next_gqa(row: Row) -> Sample:
    """NExT-GQA as VideoChat-R1 has it. The stretches of time in `glue`, which it also asks for, stay in `meta`."""
    return _choice(row, row.texts("options"), row.text("answer"), *row.paths("video"))


def _next_qa(row: Row) -> Sample:
    """NExT-QA's .csv: the number of the right option; NExT-GQA's: its number or its text.

    VidOR keeps a video in a folder that the row does not name: 1164/4010069381.mp4.
    """
    options = tuple(row.text(f"a{number}") for number in range(5))
    answer, name = row.text("answer"), row.text("video")
    video = _find(row, name, ("NExTVideo",))
    if not os.path.exists(video):
        video = _files_below(row.root).get(name, video)
    return _choice(row, options, LETTERS[int(answer)] if answer in tuple("01234") else answer, video)


@functools.lru_cache(maxsize=4)
def _files_below(root: Path) -> dict[str, str]:
    """{name of an .mp4 without its suffix: path} of all folders below."""
    return {path.stem: str(path) for path in sorted(root.rglob("*.mp4"))}


# the fields of a format -> its function. Tried in this order, so a format comes before those whose fields it includes
FORMATS = {
    "problem solution path data_type": _video_r1,
    "problem solution": _open_r1_video,
    "problem answer": _easy_r1,
    "query response": _llava_video,
    "messages": _messages,
    "video_path question option0 correct_choice": _longvideobench,
    "video_path question candidates correct_choice": _longvideobench,
    "video question candidates answer": _mvbench,
    "videoID question options answer": _video_mme,
    "dataset scene_name question ground_truth": _vsi_bench,
    "question question_type choices answer": _mmvu,
    "video_id question answer dim": _tempcompass,
    "video question options answer glue": _next_gqa,
    "id question options answer": _video_mmmu,
    "video sentence timestamp": _moment,
    "video caption timestamp": _moment,
    "vid sentence timestamp": _moment,
    "path question answer qsemtype": _tvgbench,
    "path object gt": _got,
    "video question answer a0 a1 a2 a3 a4": _next_qa,
}


def _choice(
    row: Row, options: tuple[str, ...], answer: str, *videos: str, otherwise: str | None = None, **parts: tuple
) -> Sample:
    """A multiple-choice sample of a row that asks in the field `question`; `answer` is a letter, or the text of one of
    `options`. If a row may have no options, `otherwise` is its type then, "" for what `guess_type` says. `parts`: see
    `_build`."""
    if options or otherwise is None:
        texts, found = [_plain(option) for option in options], CHOICE.match(answer.strip())
        letter = LETTERS[texts.index(_plain(answer))] if _plain(answer) in texts else found and found[1]
        if letter not in tuple(LETTERS[: len(options)]):
            raise row.error(f"the answer {answer!r:.200} is none of the options {list(options)!r:.200}")
        answer, otherwise = letter, MULTIPLE_CHOICE
    return _build(row, row.text("question"), answer, otherwise, videos=videos, images=(), options=options, **parts)


def _build(row: Row, problem: str, answer: str, problem_type: str | None = None, **parts: tuple) -> Sample:
    """A sample of a row. A part that is not given (videos, images, options, clips, completions) is read from the row's
    field of that name; fields that nobody reads are `meta`. The row's own problem_type and completions come first. If
    the row has `box_size`, [width, height], its boxes are in pixels, and become thousandths of the width and height.

    Options that are not in the question yet are added to it, a lettered line each.
    """
    # 1) The type
    if row.get("problem_type") is not None:
        problem_type = row.text("problem_type")
    problem_type = problem_type or guess_type(answer)
    if row.get("box_size") is not None:
        answer = _thousandths(row, answer)
    if problem_type == MULTIPLE_CHOICE and not LETTER.match(answer):
        raise row.error(
            f"solution {answer!r:.200} has no option letter; write e.g. <answer>B</answer>, or set problem_type"
        )
    # 2) The parts that are not given
    own = {
        "videos": lambda: row.paths("video", "videos"),
        "images": lambda: row.paths("image", "images"),
        "options": lambda: row.texts("options"),
    }
    parts |= {name: read() for name, read in own.items() if name not in parts}
    parts["completions"] = completions = row.texts("completions") or parts.get("completions", ())
    parts["clips"] = parts.get("clips") or _clips(row, len(parts["videos"]))
    # 3) Options
    if len(parts["options"]) > len(LETTERS):
        raise row.error(f"has {len(parts['options'])} options; there are letters for {len(LETTERS)}")
    parts["options"] = options = lettered(parts["options"])
    labels = [(letter, re.sub(r"^\(?[A-Z][.):]+\s*", "", option)) for letter, option in zip(LETTERS, options)]
    if not all(re.search(rf"\b{letter}\W+{re.escape(text)}", problem) for letter, text in labels):
        problem = "\n".join((problem.rstrip("\n"), *options))
    try:
        "".join((problem, answer, problem_type, *options, *completions)).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise row.error(f"holds half a character ({half!r}), as a text cut within an emoji does; fix or delete it")
    meta = {name: value for name, value in row.fields.items() if name not in row.used}
    return Sample(row.key, problem, answer, problem_type=problem_type, meta=meta, **parts)


def _thousandths(row: Row, answer: str) -> str:
    """in: box_size [640, 480], {"boxes": [32, 48, 320, 240]}; out: {"boxes": [50.0, 100.0, 500.0, 500.0]}"""
    size = row.get("box_size")

    def scaled(value):
        if isinstance(value, dict):
            return {name: item if name == "time" else scaled(item) for name, item in value.items()}
        if isinstance(value[0], list):
            return [scaled(item) for item in value]
        return [round(1000 * number / size[i % 2], 2) for i, number in enumerate(value)]

    try:
        return json.dumps(scaled(json.loads(answer)))
    except (LookupError, RecursionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise row.error(
            f"box_size {size!r:.200} must be [width, height] of boxes in pixels, not of {answer!r:.200}"
        ) from error


def lettered(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options as lettered lines, or as they are if each has its own letter already.

    in: ("red", "blue"); out: ("A. red", "B. blue"). As they are: ("A. red", ...), ("A) red", ...), ("(A) red", ...)
    """
    if all(re.match(rf"\(?{letter}[.):]", option) for letter, option in zip(LETTERS, options)):
        return tuple(options)
    return tuple(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def guess_type(answer: str) -> str:
    """The problem type of an answer whose row names no type: by a letter, a number, LaTeX, else free text."""
    if CHOICE.match(answer):
        return MULTIPLE_CHOICE
    if re.fullmatch(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)", answer):
        return "numerical"
    return "math" if re.search(r"[\\^=$]|\d/\d", answer) else "free-form"


def _clips(row: Row, count: int) -> tuple[Clip, ...]:
    """The clips of a row's videos. A field holds one number for all videos, or a list with one for each.

    in: two videos, video_start [0, 1], video_end 5; out: (Clip(0, 5), Clip(1, 5))
    """
    columns = []
    for name in CLIP_FIELDS:
        value = row.get(name)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count:
            raise row.error(f"field {name!r} has {len(values)} numbers for {count} videos")
        columns.append([_seconds(row, number) for number in values])
    clips = tuple(Clip(*column) for column in zip(*columns))
    return () if set(clips) <= {WHOLE} else clips


def _seconds(row: Row, value) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9):
        raise row.error(f"start, end and sample_fps must be numbers of 0 or more, got {value!r:.200}")
    return value


def _find(row: Row, name: str, inner: tuple[str, ...] = ()) -> str:
    """The video (or folder of frames) that a benchmark calls `name`, with or without a suffix. Looks in FOLDERS, and in
    each of them first in the folders `inner`."""
    path = reroot(name, row.root)
    for top, folder, suffix in itertools.product(FOLDERS, (*inner, ""), SUFFIXES):
        candidate = row.root / top / folder / (name + suffix)
        if os.path.isfile(candidate) or (os.path.isdir(candidate) and not suffix):
            return str(candidate)
    return path if os.path.exists(path) or Path(path).suffix in SUFFIXES[1:] else path + ".mp4"


def _tagged(solution: str) -> str:
    """The text between <answer> and </answer>, or all of it if there are no such tags, stripped."""
    tagged = ANSWER.search(solution)
    return (tagged.group(1) if tagged else solution).strip()


def _plain(text: str) -> str:
    return text.strip(" .").casefold()


def _texts_of(parts: list[dict]) -> list[str]:
    return [part["text"] for part in parts if part.get("text")]


def _listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
