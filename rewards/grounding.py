"""Where and when something is: how far a prediction overlaps the ground truth in time, in space, or in both.

Times are in seconds, a box is [x1, y1, x2, y2]. Ground truth and prediction may have the forms of three projects:

    Time-R1, VideoChat-R1    3.2 to 7.5
    VideoChat-R1's tracking  [[0.1, 0.5, 0.3, 0.6], ...]: the boxes at several moments
    OneThinker               {"time": [3.2, 7.5]}
                             {"boxes": [35, 227, 437, 932]}
                             {"boxes": {"4": [35, 227, 437, 932], "5": ...}}: a box for each second
                             {"time": [3.2, 7.5], "boxes": {"4": ...}}
    Qwen2.5-VL               [{"bbox_2d": [35, 227, 437, 932], "label": ...}]

Published sources of the rules, and where the rules here differ:

    Time-R1       github.com/xiaomi-research/time-r1 at 7f2b594, main.py
    VideoChat-R1  github.com/OpenGVLab/VideoChat-R1 at 73b2ea9, src/open_r1/grpo_tasks.py
    OneThinker    github.com/tulerfeng/OneThinker at 768b20f, EasyR1/verl/reward_function/onethinker_reward.py

Departures. Every form is read in every problem type; each source reads its own. Of several answer tags with different
contents none counts (see `answer_text`); Time-R1 and VideoChat-R1 take the last, OneThinker the first. Text around JSON
is no obstacle: OneThinker scores it 0. "3.2s - 7.5s" is a span; Time-R1 wants "3.2 to 7.5" or "3.2 and 7.5". "3 to 7
minutes" is none; Time-R1 reads seconds. A tracking answer that is a list may have as many boxes as the truth has;
VideoChat-R1 wants eight.
"""

import json
import math
import re

from rewards.answer import answer_text
from video.formats import Sample

Box = tuple[float, float, float, float]

_NUMBER = r"(\d+(?:\.\d*)?)"
_OTHER_UNIT = r"[ -]?(?:min(?:ute)?s?|h|hrs?|hours?)\b"
_SPAN = re.compile(
    # "3.2 to 7.5", "3.2s - 7.5s"; not the "03 to 00" of "00:03 to 00:07", the "2 to 7" of "3,2 to 7,5", or minutes
    rf"(?<![\d.:-])(?<!\d,){_NUMBER} ?(?:s|secs?|seconds?)? ?(?:to|and|-|–|—) ?{_NUMBER}(?![\d:]|[.,]\d|{_OTHER_UNIT})",
    re.IGNORECASE,
)
_JSON_START = re.compile(r"[\[{]")


def grounding(prediction: str, sample: Sample) -> float:
    """The mean of `overlaps`, in [0, 1]: the accuracy of a prediction in the problem types of OVERLAPS."""
    parts = overlaps(prediction, sample)
    return sum(parts.values()) / len(parts)


def overlaps(prediction: str, sample: Sample) -> dict[str, float]:
    """{"tIoU" or "box IoU": overlap in [0, 1]}, as the problem type has them; 0 for a prediction of another form.

    Raises ValueError for a ground truth of another form.
    """
    return OVERLAPS[sample.problem_type](prediction, sample.answer)


def timestamp_iou(completion: str, sample: Sample) -> float:
    """tIoU * (1 - |error of the start| / duration) * (1 - |error of the end| / duration): Time-R1's `iou_v2`.

    The duration is the row's field `duration`, in seconds. The reward is below 0 if exactly one error is above it.
    """
    duration = sample.meta.get("duration")
    if not isinstance(duration, (int, float)) or not 0 < duration < math.inf:
        raise ValueError(f"sample {sample.key!r}: timestamp_iou needs the field `duration`, the video's seconds")
    want, got = true_span(sample.answer), read_span(answer_text(completion) or "")
    if got is None:
        return 0.0
    return span_iou(got, want) * math.prod(1 - abs(a - b) / duration for a, b in zip(got, want))


def span_iou(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two stretches of time. A span whose end is not after its start overlaps nothing."""
    common = min(one[1], other[1]) - max(one[0], other[0])
    return max(0.0, common) / (max(one[1], other[1]) - min(one[0], other[0])) if common > 0 else 0.0


def box_iou(one: Box | None, other: Box | None) -> float:
    """Intersection over union of two boxes; 0.0 if one of them is None, or has no area."""
    if one is None or other is None:
        return 0.0
    sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    common = max(0.0, sides[0]) * max(0.0, sides[1])
    area = sum(max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (one, other))
    return common / (area - common) if common > 0 else 0.0


def read_span(text: str) -> tuple[float, float] | None:
    """The (start, end) that a text names; None if it names none. Of several spans in words the last counts, as in
    Time-R1. "between 1 and 2, or 3.2 to 7.5" -> (3.2, 7.5)"""
    value = _json_in(text)
    span = _numbers(value.get("time") if isinstance(value, dict) else value, 2)
    if span is None and (found := _SPAN.findall(" ".join(text.split()))):
        span = _numbers([float(number) for number in found[-1]], 2)
    return span


def read_boxes(text: str) -> dict[object, Box | None]:
    """{moment: box} of a text; {} if it names no box, None for a box that is no four numbers.

    The moments of an object are its keys: "4". A single box has the moment "". In a list of 8 boxes they are (0, 8),
    (1, 8), ... (7, 8), so that a list of another length has no moment in common.
    """
    value = _json_in(text)
    if isinstance(value, list) and len(value) == 1:  # [[35, 227, 437, 932]] and [{"bbox_2d": ...}] are one box
        value = value[0]
    if isinstance(value, dict):
        value = value.get("boxes", value.get("bbox_2d"))
    if (box := _numbers(value, 4)) is not None:
        return {"": box}
    if isinstance(value, dict):
        return {moment: _numbers(box, 4) for moment, box in value.items()}
    return {(i, len(value)): _numbers(box, 4) for i, box in enumerate(value)} if isinstance(value, list) else {}


def true_span(answer: str) -> tuple[float, float]:
    """The (start, end) of a ground truth. Raises ValueError if it names none."""
    span = read_span(answer)
    if span is None:
        raise ValueError(f"the answer {answer!r:.200} names no two times, as 3.2 to 7.5 does")
    return span


def true_boxes(answer: str) -> dict[object, Box]:
    """The {moment: box} of a ground truth, as in `read_boxes`. Raises ValueError if it names none, or a broken one."""
    boxes = read_boxes(answer)
    if not boxes or None in boxes.values():
        raise ValueError(f'the answer {answer!r:.200} names no boxes, as {{"boxes": [35, 227, 437, 932]}} does')
    return boxes


def _temporal(prediction: str, answer: str) -> dict[str, float]:
    """Time-R1's `iou`, VideoChat-R1's `tg_iou`, OneThinker's `iou_1d`."""
    want, got = true_span(answer), read_span(prediction)
    return {"tIoU": span_iou(got, want) if got else 0.0}


def _boxes(prediction: str, answer: str) -> dict[str, float]:
    """The mean over the moments of the truth; a moment that is missing counts 0: OneThinker's `mean_iou_over_gt_frames`
    and VideoChat-R1's `tracking_iou`. A single box is one moment: OneThinker's `iou_2d` of spatial grounding."""
    want, got = true_boxes(answer), read_boxes(prediction)
    return {"box IoU": sum(box_iou(got.get(moment), box) for moment, box in want.items()) / len(want)}


def _spatial_temporal(prediction: str, answer: str) -> dict[str, float]:
    """OneThinker's: the boxes count at the moments that truth and prediction have in common
    (`mean_iou_over_intersection`), so a prediction loses nothing by leaving moments out."""
    want, got = true_boxes(answer), read_boxes(prediction)
    common = [box_iou(got[moment], box) for moment, box in want.items() if moment in got]
    return _temporal(prediction, answer) | {"box IoU": sum(common) / max(1, len(common))}


OVERLAPS = {
    "temporal grounding": _temporal,
    "spatial grounding": _boxes,
    "spatial-temporal grounding": _spatial_temporal,
    "tracking": _boxes,
}


def _json_in(text: str) -> object:
    """The first JSON object or list in a text; None if there is none."""
    start = _JSON_START.search(text)
    try:
        return json.JSONDecoder().raw_decode(text, start.start())[0] if start else None
    except (ValueError, RecursionError):  # ValueError also for an integer of more than 4,300 digits
        return None


def _numbers(value: object, count: int) -> tuple[float, ...] | None:
    """`value` as floats if it is a list of `count` finite numbers, else None."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value):
        return None
    return tuple(map(float, value)) if all(abs(number) < 1e9 for number in value) else None
