"""Files of questions as lists of `Sample`s: several of them weighed against each other, without the known bad ones."""
import json
import math
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from video.formats import MARKS, MULTIPLE_CHOICE, Clip, DataError, Sample, parse_row

__all__ = ["MARKS", "MULTIPLE_CHOICE", "Clip", "DataError", "Sample", "leave_out", "read_mixture", "read_samples",
           "read_skip_list", "split_spec"]


def read_mixture(specs: str | Iterable[str], video_root: str | Path | None = None) -> list[Sample]:
    """The samples of an epoch: those of all files of `specs`, "FILE" or "FILE:WEIGHT", one file after the other.

    The weight is how often each row of that file comes in an epoch: 2 takes all rows twice; 0.25 takes a quarter of
    them, drawn once and for all from the file's name and length (so the same quarter in every epoch and process); 1.5
    takes all rows and half of them again. Keys tell files of the same name apart ("a/train.jsonl:3"). Raises DataError.
    """
    weights = {}
    for spec in [specs] if isinstance(specs, str) else specs:
        path, weight = split_spec(spec)
        if path in weights:
            raise DataError(f"--data {path}: is given twice; give it once, with a weight: {path}:2")
        weights[path] = weight
    samples = []
    for name, (path, weight) in zip(distinct_names(list(weights)), weights.items()):
        samples += repeat(read_samples(path, video_root, name), weight, name)
    if not samples:
        raise DataError("--data: the weights leave no row; raise them")
    return samples


def read_samples(
    path: str | Path, video_root: str | Path | None = None, name: str | None = None, flag: str = "--data"
) -> list[Sample]:
    """The samples of a .jsonl or .parquet file, or of a .json file that holds an array of rows.

    Relative video paths are joined with `video_root` (default: the folder of the file). An absolute path that does
    not exist is re-rooted there by the longest suffix of it that does: datasets carry paths of their author's disk.
    `name` stands for the file in the keys, `flag` for where it was given in errors. Raises DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{flag} {path}: no such file; give a .jsonl file, or run --preset demo, which makes its own")
    root = Path(video_root) if video_root is not None else path.parent
    samples = [parse_row(row, key, root, path.stem) for key, row in _rows(path, name or path.name)]
    if not samples:
        raise DataError(f"{flag} {path}: is empty; give a file with one JSON row a line")
    return samples


def repeat(samples: list[Sample], weight: float, name: str) -> list[Sample]:
    """`samples` as often as `weight` says; the part after the point is a draw fixed by `name` and their number."""
    whole = int(weight)
    extra = set(random.Random(name).sample(range(len(samples)), round((weight - whole) * len(samples))))
    return samples * whole + [sample for number, sample in enumerate(samples) if number in extra]


def distinct_names(paths: list[str]) -> list[str]:
    """The shortest ends of `paths` that differ: the file's name, with as many folders before it as that takes."""
    parts = [Path(path).absolute().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        count = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-count:]))
    return names


def read_skip_list(path: str | Path) -> dict[str, str]:
    """{absolute path of a file: reason} of a list that `python -m video.scan` wrote. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--skip_list {path}: no such file; python -m video.scan --data ... --output FILE writes one")
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            row = _json(line, f"--skip_list {path.name}:{number}")
            if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                raise DataError(f'--skip_list {path.name}:{number}: must be {{"path": ..., "reason": ...}}')
            listed[os.path.abspath(row["path"])] = str(row.get("reason", ""))
    return listed


def leave_out(samples: list[Sample], listed: dict[str, str]) -> tuple[list[Sample], list[Sample]]:
    """(samples that use no file of `listed`, those that use one), each in order."""
    kept, left_out = [], []
    for sample in samples:
        bad = any(os.path.abspath(path) in listed for path in (*sample.videos, *sample.images))
        (left_out if bad else kept).append(sample)
    return kept, left_out


def split_spec(spec: str) -> tuple[str, float]:
    """(path, weight) of "FILE" or "FILE:WEIGHT"; a file whose own name ends so is a file."""
    path, colon, number = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError:
        return spec, 1.0
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"--data {spec}: the weight must be above 0; to drop a file, leave it out")
    return path, weight


def _rows(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """(key, row) of each row. Blank lines are passed over but counted, so that keys stay line numbers."""
    if path.suffix == ".parquet":
        numbered = enumerate(_parquet(path), start=1)
    else:
        numbered = _text_rows(path, name)
    for number, row in numbered:
        key = f"{name}:{number}"
        if not isinstance(row, dict):
            raise DataError(f"{key}: is a {type(row).__name__}, not an object; write a row as {{\"problem\": ...}}")
        yield key, row


def _text_rows(path: Path, name: str) -> Iterator[tuple[int, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--data {path}: is not UTF-8 text ({error.reason}); give a .jsonl file") from error
    if path.suffix == ".json":
        rows = _json(text, name)
        if not isinstance(rows, list):
            raise DataError(f"{name}: holds no array; write rows as [{{...}}, ...], or one a line in a .jsonl")
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028 inside a string
        if line.strip():
            yield number, _json(line, f"{name}:{number}")


def _parquet(path: Path) -> Iterator[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"--data {path}: parquet files are read by pyarrow: pip install pyarrow") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"--data {path}: is not a parquet file ({str(error).splitlines()[0]})") from error


def _json(text: str, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON ({error.msg}, column {error.colno}); mend or delete it") from error
