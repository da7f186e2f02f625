"""An evaluation to read and to look at: its accuracies as text tables, and report.html with every question's frames.

A summary is what `grpo.engine.evaluate.summarise` returns, a record what `grpo.engine.evaluate.predict` does.
"""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2
import torch
from PIL import Image

from grpo.engine.evaluate import CONTROLS, RECALL_AT
from video.dataset import Sample
from video.files import write_text
from video.loader import PromptLoader
from video.pictures import frames_of, strip
from video.prompt import Skipped

HEIGHT = 96  # pixels, at most, of a frame in report.html


def summary_of(before: dict, after: dict, controls: dict[str, dict], seconds: float) -> dict:
    """One flat record of a run's evaluations, each a summary; None stands for what was not evaluated.

    `accuracy_*` are over the categories of question that the run trains on, `overall` over all,
    `categories` by category; `grounding` has {evaluation: its `recalls`}, if answers are times or boxes;
    `opposite_when_reversed` is the share of questions with an opposite answer that got it when the video ran backwards.
    """
    evaluated = {"before": before or None, "after": after or None}
    evaluated |= {name.replace(" ", "_"): controls.get(name) for name in CONTROLS}
    categories = sorted(after.get("categories", {}))
    shares = lambda share: {name: summary and share(summary) for name, summary in evaluated.items()}
    found = {name: summary["grounding"] for name, summary in evaluated.items() if summary and "grounding" in summary}
    return {
        **{f"accuracy_{name}": share for name, share in shares(lambda summary: summary["trained"]).items()},
        "opposite_when_reversed": controls["reversed"]["opposite"] if "reversed" in controls else None,
        "seconds": seconds,
        "overall": shares(lambda summary: summary["overall"]),
        "categories": {name: shares(lambda summary: summary["categories"].get(name)) for name in categories},
        "questions": after.get("count", 0),
        "skipped": after.get("skipped", 0),
        "unparsed": after.get("unparsed"),
        **({"grounding": found} if found else {}),
    }


def summary_table(summary: dict) -> str:
    """Accuracy by category before and after training and under each control, as text; "" if nothing was asked.

    summary: as `summary_of` returns it.
    """
    if not summary["questions"]:
        return ""
    rows = {**summary["categories"], "all": summary["overall"]}
    evaluated = [name for name, overall in summary["overall"].items() if overall is not None]
    titled = lambda columns: {name.replace("_", " "): column for name, column in columns.items()}
    text = text_table(titled({name: {label: row[name] for label, row in rows.items()} for name in evaluated}), rows)
    if summary["opposite_when_reversed"] is not None:
        text += f"\nopposite answer when the video is reversed: {summary['opposite_when_reversed']:.1%}"
    return "\n".join([text, *grounding_tables(titled(summary.get("grounding", {})))])


def grounding_tables(columns: dict[str, dict]) -> list[str]:
    """{column: `grpo.engine.evaluate.recalls`} as a table for each kind of overlap, with a title."""
    kinds = dict.fromkeys(kind for recalls in columns.values() for kind in recalls)
    rows = lambda kind: {name: recalls.get(kind, {}) for name, recalls in columns.items()}
    return [f"{kind}\n{text_table(rows(kind), ['mIoU', *(f'R@{least}' for least in RECALL_AT)])}" for kind in kinds]


def evaluation_table(result: dict) -> str:
    """Accuracies, their 95% intervals and the gains over another checkpoint, each by category, as text.

    result: {"results": {column: summary}, "paired": {mode: `significance.paired`}, "score": {column: share}}.
    """
    results = result["results"]
    first = next(iter(results.values()))
    rows = [*first["categories"], "all"]
    shares = {
        name: {**s["categories"], "all": s["overall"], "not parsed": s["unparsed"]} for name, s in results.items()
    }
    ends = {name: {**s["intervals"], "all": s["intervals"]["overall"]} for name, s in results.items()}
    within = lambda pair: f"{100 * pair[0]:.1f}-{pair[1]:.1%}"
    lines = [text_table(shares, [*rows, "not parsed"]), "95% intervals", text_table(ends, rows, within)]
    for name, one in results.items():
        if "reversed" in name and one["opposite"] is not None:
            lines.append(f"{name}: opposite answer {one['opposite']:.1%}")
    for mode, pair in result["paired"].items():
        lines.append(f"{mode}, against the other checkpoint:")
        for category, gain in {**pair["categories"], "all": pair}.items():
            lines.append(
                f"{category:24}{gain['difference']:+10.1%} of {gain['count']} questions ({gain['better']} better, "
                f"{gain['worse']} worse, exact McNemar p = {gain['p']:.2g})"
            )
    lines += grounding_tables({name: summary.get("grounding", {}) for name, summary in results.items()})
    for name, score in result.get("score", {}).items():
        lines.append(f"the benchmark's own total, {name}: {score:.1%}")
    for name, summary in results.items():
        if failed := summary.get("unjudged"):
            lines.append(f"{name}: the judge failed on {failed} answers, scored 0; the same command asks again")
    return "\n".join([*lines, f"{first['count']} questions; {first['skipped']} unreadable, counted neither way"])


def text_table(columns: dict[str, dict], rows: Iterable[str], text: Callable = "{:.1%}".format) -> str:
    """{column: {row: value}} as aligned text: `text` of each value, "-" if a column has none.

    in:  {"think": {"colour": 0.5, "all": 0.75}, "direct": {"all": 0.25}}, ["colour", "all"]
    out:                         think       direct
         colour                  50.0%            -
         all                     75.0%        25.0%
    """
    widths = {name: max(13, len(name) + 2) for name in columns}
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for row in rows:
        values = {name: column.get(row) for name, column in columns.items()}
        cells = [f"{'-' if value is None else text(value):>{widths[name]}}" for name, value in values.items()]
        lines.append(f"{row:24}" + "".join(cells))
    return "\n".join(lines)


def write_report(
    path: Path, title: str, result: dict, questions: list, loader: PromptLoader, most: int, picture: Path | None = None
) -> Path:
    """Writes report.html, one file that needs no network, and returns its path.

    result: as for `evaluation_table`. questions: (Sample, {column: record}) of every question; a card shows the first
    column in full. most: how many questions get a card, spread evenly; `loader` reads their frames again. picture: a
    PNG to show as well.
    """
    shown = questions[:: math.ceil(len(questions) / max(1, most))][:most]
    strips, numbers = _strips([sample for sample, _ in shown], loader)
    first = next(iter(result["results"]))
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    strict = jinja2.StrictUndefined  # a name that is misspelt in the template raises
    template = jinja2.Template(source, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    page = template.render(
        title=title,
        table=evaluation_table(result),
        results=result["results"],
        curve=picture and _uri(picture.read_bytes(), "png"),
        categories=sorted({records[first]["category"] for _, records in shown if "category" in records[first]}),
        total=len(questions),
        cards=[(sample, records, own) for (sample, records), own in zip(shown, numbers)],
        strips=strips,
        verdict=verdict,
        percent="{:.1%}".format,
        sha256=lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    )
    write_text(path, page)
    return path


def _strips(samples: list[Sample], loader: PromptLoader) -> tuple[list[str], list[range]]:
    """(data URIs, for each sample the numbers of the URIs it shows); a video is read once however many ask about it."""
    media = {(s.videos, s.images, s.clips): s for s in samples}
    uris, numbers = [], {}
    for place, (prompt,) in zip(media, loader.batches([s] for s in media.values())):
        pictures = [] if isinstance(prompt, Skipped) else frames_of(prompt, loader.encoder.processor)
        numbers[place] = range(len(uris), len(uris) + len(pictures))
        uris += [_thumbnail(frames) for frames in pictures]
    return uris, [numbers[s.videos, s.images, s.clips] for s in samples]


def _thumbnail(frames: torch.Tensor) -> str:
    picture = Image.fromarray(strip(frames).permute(1, 2, 0).numpy())
    if picture.height > HEIGHT:
        picture = picture.resize((max(1, picture.width * HEIGHT // picture.height), HEIGHT))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return _uri(buffer.getvalue(), "webp")


def _uri(data: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def verdict(record: dict) -> str:
    """The words that a record is filtered by: an answer that could not be parsed is wrong as well."""
    if "skipped" in record:
        return "unreadable"
    score = record["score"]
    word = "right" if score == 1 else "partly" if score > 0 else "wrong"
    return f"{word} unparsed" if record["prediction"] is None else word
