"""Writes a data file of any known format in the project's own form, that of open-r1-video-4k.

    python -m video.convert train.jsonl LLaVA-Video-large-swift-origin.jsonl --video_root LLaVA-Video-large-swift

Rows get `problem`, `solution` (for a choice, `<answer>`, the first two characters of the answer, `</answer>`), `video`,
`original_question` and `original_answer`. Of LLaVA-Video-large-swift these are all, as its 4k rows were published; the
rows of other formats keep what else they have. As there, rows whose file is missing are left out.
"""

import os
import sys

from video.dataset import READERS, read_samples
from video.files import write_rows
from video.formats import CLIP_FIELDS, MARKS, MULTIPLE_CHOICE, DataError, Sample, printable
from video.terminal import OneLineParser, run_program


def to_row(sample: Sample) -> dict:
    """The row of `sample`, paths made absolute: `formats` reads it as the same sample."""
    is_choice = sample.problem_type == MULTIPLE_CHOICE
    line = next((option for option in sample.options if option.startswith(sample.answer)), sample.answer)
    original = sample.meta.get("original_answer", line)
    answer = sample.answer
    if is_choice and original[:1].isalpha() and original[:1] == answer[:1]:
        answer = original[:2]
    row = {"problem": sample.problem, "solution": f"<answer>{answer}</answer>"}
    for name, paths in (("video", sample.videos), ("image", sample.images)):
        if paths:
            absolute = [os.path.abspath(path) for path in paths]
            row |= {name: absolute[0]} if len(paths) == 1 else {f"{name}s": absolute}
    row["original_question"] = sample.meta.get("original_question", MARKS.sub("", sample.problem))
    row["original_answer"] = original
    rest = {} if is_choice else {"problem_type": sample.problem_type}
    rest |= {name: list(seconds) for name, seconds in zip(CLIP_FIELDS, zip(*sample.clips)) if set(seconds) != {None}}
    rest |= {"options": list(sample.options), "completions": list(sample.completions)}
    row |= {name: value for name, value in rest.items() if value}
    return row | {name: value for name, value in sample.meta.items() if name not in row}


def convert(
    source: str, target: str, video_root: str | None = None, keep_missing: bool = False
) -> tuple[int, list[str]]:
    """(rows written to `target`, missing files of the rows left out). Raises DataError if no row is left."""
    written, missing = [], []
    for sample in read_samples(source, video_root, text_only=True):
        gone = [path for path in sample.media if not os.path.exists(path)]
        if gone and not keep_missing:
            missing.append(gone[0])
        else:
            written.append(to_row(sample))
    if not written:
        raise DataError(
            f"{source}: the files of all {len(missing)} rows are missing, the first {missing[0]}; "
            "give --video_root, or --keep_missing to write the rows all the same"
        )
    write_rows(target, written)
    return len(written), missing


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(prog="video.convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help=f"A file of one of the types {', '.join(READERS)}.")
    parser.add_argument("target", metavar="OUT", help="The .jsonl file to write.")
    parser.add_argument("--video_root", help="Folder that video paths are under (default: that of IN).")
    parser.add_argument("--keep_missing", action="store_true", help="Keep rows whose file is missing.")
    given = parser.parse_args(arguments)

    def work() -> None:
        written, missing = convert(given.source, given.target, given.video_root, given.keep_missing)
        print(f"{written} rows written to {printable(given.target)}")
        if missing:
            first = printable(missing[0])
            print(f"{len(missing)} rows left out, their files are missing; the first: {first}", file=sys.stderr)

    return run_program("video.convert", work)


if __name__ == "__main__":
    sys.exit(main())
