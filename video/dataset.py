"""Files of questions as lists of `Sample`s: several of them weighed against each other, without the known bad ones."""
import hashlib
import json
import math
import os
import random
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from video.formats import DataError, Sample, parse_row

MEDIA = ("image", "images", "video", "videos", "path")  # fields whose bytes are files
PARQUET_ROWS = 64  # read at a time: rows may hold images


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
    `name` stands for the file in the keys, `flag` for where it was given in errors. Images and videos that a parquet
    file holds as bytes are kept as files beside it, in FILE.parquet.media. Raises DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{flag} {path}: no such file; give a .jsonl file, or run --preset demo, which makes its own")
    root = Path(video_root) if video_root is not None else path.parent
    samples = [parse_row(row, key, root, path.stem) for key, row in _rows(path, name or path.name, flag)]
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
    for number, row in _lines(path, f"--skip_list {path.name}", "--skip_list"):
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise DataError(f'--skip_list {path.name}:{number}: must be {{"path": ..., "reason": ...}}')
        listed[os.path.abspath(row["path"])] = str(row.get("reason", ""))
    return listed


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Writes a .jsonl file, which is there whole or not at all."""
    partial = Path(f"{path}.part")
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


def leave_out(samples: list[Sample], listed: dict[str, str]) -> tuple[list[Sample], list[Sample]]:
    """(samples that use no file of `listed`, those that use one), each in order."""
    bad = {s.key for s in samples if any(os.path.abspath(path) in listed for path in s.media)}
    return [s for s in samples if s.key not in bad], [s for s in samples if s.key in bad]


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


def _rows(path: Path, name: str, flag: str) -> Iterator[tuple[str, dict]]:
    """(key, row) of each row."""
    reader = {".parquet": _parquet, ".json": _array}.get(path.suffix, _lines)
    for number, row in reader(path, name, flag):
        key = f"{name}:{number}"
        if not isinstance(row, dict):
            raise DataError(f"{key}: is a {type(row).__name__}, not an object; write a row as {{\"problem\": ...}}")
        yield key, row


def _lines(path: Path, name: str, flag: str) -> Iterator[tuple[int, object]]:
    """(number, row) of each line. Blank lines are passed over but counted."""
    lines = _text(path, flag).split("\n")  # splitlines() would also cut at U+2028 inside a string
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _json(line, f"{name}:{number}")


def _array(path: Path, name: str, flag: str) -> Iterator[tuple[int, object]]:
    rows = _json(_text(path, flag), name)
    if not isinstance(rows, list):
        raise DataError(f"{name}: holds no array; write rows as [{{...}}, ...], or one a line in a .jsonl")
    return enumerate(rows, start=1)


def _parquet(path: Path, name: str, flag: str) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{flag} {path}: parquet files are read by pyarrow: pip install pyarrow") from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(PARQUET_ROWS)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield number, _with_files(row, Path(f"{path}.media"))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{flag} {path}: is not a parquet file ({str(error).splitlines()[0]})") from error


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{flag} {path}: is not UTF-8 text ({error.reason}); give a .jsonl file") from error


def _with_files(value, folder: Path, is_media: bool = False):
    """`value` with bytes of images and videos, and the {"bytes", "path"} in which `datasets` stores them, replaced by
    paths. Other bytes are text, which some writers store so; what is no text is None."""
    if isinstance(value, list):
        return [_with_files(item, folder, is_media) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else _keep(value["bytes"], folder)
        return {name: _with_files(item, folder, name in MEDIA) for name, item in value.items()}
    if not isinstance(value, bytes):
        return value
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = None
    is_path = text is not None and len(text) < 1000 and text.isprintable()
    return _keep(value, folder) if is_media and not is_path else text


def _keep(content: bytes, folder: Path) -> str:
    """The absolute path of a file in `folder` that holds `content`.

    Its name is the content's hash: equal images of several rows are one file, and what an earlier run or another
    process has written is used again.
    """
    file = folder.absolute() / hashlib.sha256(content).hexdigest()[:32]
    if not file.exists():
        try:
            folder.mkdir(exist_ok=True)
            partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # of this process alone
            partial.write_bytes(content)
            os.replace(partial, file)
        except OSError as error:
            raise DataError(f"{folder}: images that are bytes in a parquet file are kept there, but it cannot be "
                            f"written to ({error.strerror}); copy the parquet file to a folder that can") from error
    return str(file)


def _json(text: str, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON ({error.msg}, column {error.colno}); mend or delete it") from error
