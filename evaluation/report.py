"""What there is to read and to look at: tables of accuracies, and report.html."""

import base64
import hashlib
import html
import io
import json
import re

from PIL import Image

from evaluation.evaluate import CONTROLS
from video.files import write_text
from video.pictures import frames_of, strip
from video.prompt import Skipped


def summary_of(before, after, controls, seconds):
    """One flat record of a run's evaluations (each a `evaluation.evaluate.summarise`); None for what was not evaluated.

    `accuracy_*` are over the kinds of question that the run trains on, `overall` over all, `kinds` by kind;
    `opposite_when_reversed` is the share of questions with an opposite answer that got it when the video ran backwards.
    """
    evaluated = {
        "before": before or None, "after": after or None,
        **{name.replace(" ", "_"): controls.get(name) for name in CONTROLS},
    }  # fmt: skip
    kinds = sorted(after.get("kinds", {}))
    return {
        **{f"accuracy_{name}": result and result["trained"] for name, result in evaluated.items()},
        "opposite_when_reversed": controls["reversed"]["opposite"] if "reversed" in controls else None,
        "seconds": seconds,
        "overall": {name: result and result["overall"] for name, result in evaluated.items()},
        "kinds": {
            kind: {name: result and result["kinds"].get(kind) for name, result in evaluated.items()} for kind in kinds
        },
        "questions": after.get("count", 0),
        "skipped": after.get("skipped", 0),
        "unparsed": after.get("unparsed"),
    }


def summary_table(summary):
    """Accuracy by kind of question, before and after training and under each control, as text; "" of no questions."""
    if not summary["questions"]:
        return ""
    rows = {**summary["kinds"], "all": summary["overall"]}
    text = accuracy_table(rows, [name for name, share in summary["overall"].items() if share is not None])
    if summary["opposite_when_reversed"] is not None:
        text += f"\nopposite answer when the video is reversed: {summary['opposite_when_reversed']:.1%}"
    return text


def evaluation_table(result):
    """The tables of an evaluation, {"results": {column: `evaluation.evaluate.summarise`}, "paired", "score"}, as text:
    accuracy and its 95% intervals by kind, and what was gained over another checkpoint, by kind as well."""
    results = result["results"]
    first = next(iter(results.values()))
    rows = {kind: {name: one["kinds"].get(kind) for name, one in results.items()} for kind in first["kinds"]}
    rows["all"] = {name: one["overall"] for name, one in results.items()}
    rows["not parsed"] = {name: one["unparsed"] for name, one in results.items()}
    ends = {
        "all" if kind == "overall" else kind: {name: one["intervals"].get(kind) for name, one in results.items()}
        for kind in (*first["kinds"], "overall")
    }
    within = lambda pair: f"{100 * pair[0]:.1f}-{pair[1]:.1%}"
    lines = [accuracy_table(rows, list(results)), "95% intervals", accuracy_table(ends, list(results), within)]
    for name, one in results.items():
        if "reversed" in name and one["opposite"] is not None:
            lines.append(f"{name}: opposite answer {one['opposite']:.1%}")
    for mode, pair in result["paired"].items():
        lines.append(f"{mode}, against the other checkpoint:")
        for kind, gain in {**pair["kinds"], "all": pair}.items():
            lines.append(
                f"{kind:24}{gain['difference']:+10.1%} of {gain['count']} questions ({gain['better']} better, "
                f"{gain['worse']} worse, exact McNemar p = {gain['p']:.2g})"
            )
    for name, score in result.get("score", {}).items():
        lines.append(f"the benchmark's own total, {name}: {score:.1%}")
    return "\n".join([*lines, f"{first['count']} questions; {first['skipped']} unreadable, counted neither way"])


def accuracy_table(rows, columns, text="{:.1%}".format):
    """{row: {column: value or None}} as aligned text; text: of a value."""
    widths = {name: max(13, len(name) + 2) for name in columns}
    cell = lambda value, width: f"{'-' if value is None else text(value):>{width}}"
    lines = [" " * 24 + "".join(f"{name.replace('_', ' '):>{width}}" for name, width in widths.items())]
    lines += [
        f"{kind:24}" + "".join(cell(row[name], width) for name, width in widths.items()) for kind, row in rows.items()
    ]
    return "\n".join(lines)


STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
pre{background:#f6f6f6;padding:1em;overflow-x:auto}article{border-left:6px solid #bbb;margin:1em 0;padding:.4em 1em}
article[hidden]{display:none}.right{border-color:#2a8}.wrong{border-color:#d44}.partly{border-color:#da3}
.frames{overflow-x:auto;white-space:nowrap}.frames img{height:96px;image-rendering:pixelated;margin-right:6px}
.text{white-space:pre-wrap;overflow-wrap:anywhere}.thought{color:#666}.bar{display:flex;gap:1em;margin:2px 0}
.bar b{width:14em;font-weight:normal;text-align:right}.track{position:relative;width:30em;background:#eee}
.track *{position:absolute;top:0;bottom:0}.track i{background:#58a}.track u{background:#0004;top:40%;bottom:40%}
nav{position:sticky;top:0;background:#fff;padding:.5em 0}.curve{max-width:100%}"""

SCRIPT = """for (const image of document.querySelectorAll('img[data-strip]')) image.src = strips[image.dataset.strip];
const cards = [...document.querySelectorAll('article')], selects = [...document.querySelectorAll('select')];
function show() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const select of selects) select.value = wanted.get(select.name) || '';
  for (const card of cards) card.hidden = !selects.every(({name, value}) =>
    !value || (name === 'verdict' ? card.className.split(' ').includes(value) : card.dataset.kind === value));
  document.getElementById('shown').textContent = cards.filter(card => !card.hidden).length + ' of ' + cards.length;
}
for (const select of selects) select.addEventListener('change', () => {
  location.hash = new URLSearchParams(selects.map(({name, value}) => [name, value]));
});
addEventListener('hashchange', show);
show();
"""


def write_report(path, title, result, columns, samples, loader, most, picture=None):
    """Writes report.html, one file that needs no network, and returns its path.

    result: as for `evaluation_table`; columns: {column: records}, the first being shown in full; at most `most` of the
    samples, spread evenly, are shown, with their frames, which `loader` reads again; picture: a PNG to put beside.
    """
    step = max(1, -(-len(samples) // most)) if most else len(samples)
    shown = list(range(0, len(samples), step))[:most]
    strips, places = _strips([samples[i] for i in shown], loader)
    cards = [
        _card(samples[i], {name: rows[i] for name, rows in columns.items()}, places[n]) for n, i in enumerate(shown)
    ]
    kinds = sorted({rows["kind"] for i in shown if "kind" in (rows := next(iter(columns.values()))[i])})
    script = f"const strips = {json.dumps(strips)};\n{SCRIPT}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # No script but this one may run, and nothing may be fetched, whatever a completion holds.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    curve = f'<img class="curve" alt="training" src="{_uri(picture.read_bytes(), "png")}">' if picture else ""
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><pre>{html.escape(evaluation_table(result))}</pre>"
        f"{_bars(result['results'])}{curve}"
        f"<nav>{_select('verdict', ('right', 'partly', 'wrong', 'unparsed', 'unreadable'))} {_select('kind', kinds)} "
        f'<span id="shown"></span> of {len(samples)} questions in all</nav>\n'
        + "\n".join(cards)
        + f"\n<script>{script}</script></html>\n"
    )
    write_text(path, page)
    return path


def _strips(samples, loader):
    """(data URIs, for each sample the numbers of those it shows); a video is read once however many ask about it."""
    media = {(s.videos, s.images, s.clips): s for s in samples}
    uris, numbers = [], {}
    for place, (prompt,) in zip(media, loader.batches([s] for s in media.values())):
        pictures = [] if isinstance(prompt, Skipped) else frames_of(prompt, loader.encoder.processor)
        numbers[place] = range(len(uris), len(uris) + len(pictures))
        uris += [_thumbnail(frames) for frames in pictures]
    return uris, [numbers[s.videos, s.images, s.clips] for s in samples]


def _thumbnail(frames, height=96):
    picture = Image.fromarray(strip(frames).permute(1, 2, 0).numpy())
    if picture.height > height:
        picture = picture.resize((max(1, picture.width * height // picture.height), height))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return _uri(buffer.getvalue(), "webp")


def _uri(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _select(name, values):
    options = "".join(f'<option value="{html.escape(v)}">{html.escape(v)}</option>' for v in values)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>'


def _bars(results):
    """A bar with its interval for each kind of the first column, and one for every column."""
    name, first = next(iter(results.items()))
    bars = [(f"{name}: {kind}", share, first["intervals"][kind]) for kind, share in first["kinds"].items()]
    bars += [(f"{name}: all", one["overall"], one["intervals"]["overall"]) for name, one in results.items()]
    return "".join(
        f'<div class="bar"><b>{html.escape(label)}</b><span class="track"><i style="left:0;width:{share:.2%}"></i>'
        f'<u style="left:{low:.2%};width:{high - low:.2%}"></u></span>{share:.1%} ({low:.1%} to {high:.1%})</div>'
        for label, share, (low, high) in bars
    )


def verdict(record):
    """The words that a record is filtered by: an answer that could not be parsed is wrong as well."""
    if "skipped" in record:
        return "unreadable"
    score = record["score"]
    word = "right" if score == 1 else "partly" if score > 0 else "wrong"
    return f"{word} unparsed" if record["prediction"] is None else word


def _card(sample, records, places):
    """One question: frames, options, thought, answer, and what the other columns answered. Every text is escaped."""
    record, *_ = records.values()
    text = lambda name, value: f'<div class="text {name}">{html.escape(value)}</div>' if value else ""
    images = "".join(f'<img data-strip="{number}" alt="frames">' for number in places)
    others = "; ".join(
        f"{name}: {row.get('prediction') or '-'} ({verdict(row)})" for name, row in list(records.items())[1:]
    )
    thought = re.search(r"<think>(.*?)(?:</think>|$)", record.get("completion", ""), re.DOTALL)
    question = "\n".join([sample.problem, *(option for option in sample.options if option not in sample.problem)])
    return (
        f'<article class="{verdict(record)}" data-kind="{html.escape(record.get("kind", ""))}">'
        f"<small>{html.escape(sample.key)} {html.escape(record.get('kind', ''))}: {verdict(record)}</small>"
        f'<div class="frames">{images}</div>{text("question", question)}'
        f"{text('thought', thought[1].strip() if thought else '')}"
        f"{text('answer', 'answer: ' + (record.get('prediction') or 'none') + '; right is: ' + sample.answer)}"
        f"{text('others', others)}{text('skipped', record.get('skipped', ''))}"
        f"<details><summary>completion</summary>{text('completion', record.get('completion', ''))}</details></article>"
    )
