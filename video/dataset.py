"""Files of questions as lists of `Sample`s: several files with their weights, without the rows of known bad videos."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from video.files import write_bytes
from video.formats import CLIP_FIELDS, DataError, Sample, each_row, parse_row, printable

MEDIA = ("image", "images", "video", "videos", "path")  # fields whose bytes are files
PARQUET_ROWS = 64  # read at a time: rows may hold images
MOST_ROWS = 10_000_000  # of an epoch that weights may make
DEEPEST = 50  # lists and objects within each other in a row: whoever copies or writes a row recurses as deep


def read_mixture(
    specs: str | Iterable[str], video_root: str | Path | None = None, text_only: bool = False
) -> list[Sample]:
    """The samples of an epoch: those of all files of `specs`, "FILE" or "FILE:WEIGHT", one file after the other.

    The weight says how often each row of that file comes in an epoch: 2 takes all rows twice; 0.25 takes a quarter of
    them, drawn once from the file's name and length, so it is the same quarter in every epoch and process; 1.5 takes
    all rows and half of them again. Keys tell files of the same name apart ("a/train.jsonl:3"). Raises DataError.
    """
    weights = {}
    for spec in [specs] if isinstance(specs, str) else specs:
        path, weight = split_spec(spec)
        if path in weights:
            raise DataError(f"--data {path}: is given twice; give it once, with a weight: {path}:2")
        weights[path] = weight
    samples = []
    for name, (path, weight) in zip(distinct_names(list(weights)), weights.items()):
        own = read_samples(path, video_root, name, text_only=text_only)
        if weight > 1 and weight * len(own) > MOST_ROWS:
            raise DataError(
                f"--data {path}:{weight:g}: makes {weight * len(own):.1e} rows of {len(own)}; "
                f"lower the weight, at most {MOST_ROWS} fit"
            )
        samples += repeat(own, weight, name)
    if not samples:
        raise DataError("--data: the weights leave no row; raise them")
    return samples


def read_samples(
    path: str | Path,
    video_root: str | Path | None = None,
    name: str | None = None,
    flag: str = "--data",
    text_only: bool = False,
) -> list[Sample]:
    """The samples of a file of one of the types in READERS.

    Videos lie under `video_root` (default: the folder of the file), as `formats.reroot` says. Keys begin with `name`
    (default: that of the file), errors with `flag`, which gave the file. Images and videos that a parquet file holds as
    bytes are written to files beside it, in FILE.parquet.media.

    Raises DataError for bad rows, of which it names ten, and if no row has a video or image, as with a misspelt field,
    unless that is expected (`text_only`).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{flag} {path}: no such file; a relative path starts at {os.getcwd()}")
    root = Path(video_root) if video_root is not None else path.parent
    name, fields = printable(name or path.name), {}

    def parse(numbered):
        key, row = f"{name}:{numbered[0]}", numbered[1]
        row = _json(row, key) if isinstance(row, bytes) else _cells(row, key) if isinstance(row, tuple) else row
        if not isinstance(row, dict):
            raise DataError(f'{key}: is a {type(row).__name__}, not an object; write a row as {{"problem": ...}}')
        if _is_deeper(row, DEEPEST):
            raise DataError(f"{key}: is nested more than {DEEPEST} deep; fix or delete it")
        fields.update(row)
        return parse_row(row, key, root, path.stem)

    samples = each_row(_reader(path, flag)(path, flag), parse)
    if not samples:
        raise DataError(f"{flag} {path}: is empty; give a file with one JSON row a line")
    if not (text_only or any(sample.media for sample in samples)):
        seen = printable(", ".join(sorted(fields)), 300)
        raise DataError(
            f"{flag} {path}: no row has a video or image; its fields are {seen}; name a file in the field "
            "video, videos, image or images, or give --text_only to train.py or eval.py"
        )
    return samples


def copy_rows(path: str | Path, target: str | Path, numbers: set[int], flag: str = "--data") -> None:
    """Writes the rows of a data file that have these numbers, as in their keys, unchanged to a file of the same type.

    Lines keep their bytes, rows of a .parquet file their columns; .json becomes an array. Raises DataError, as
    `read_samples` does, and OSError, which names the file.
    """
    path, reader = Path(path), _reader(Path(path), flag)
    if reader is _parquet:
        import pyarrow.parquet

        table, buffer = pyarrow.parquet.read_table(path), pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table.take([number - 1 for number in sorted(numbers)]), buffer)
        content = buffer.getvalue().to_pybytes()
    elif reader is _array:
        rows = [row for number, row in _array(path, flag) if number in numbers]
        content = json.dumps(rows, indent=1).encode()
    elif reader is _table:
        names, rows = [], []
        for number, (names, cells) in _table(path, flag):
            rows += [cells] if number in numbers else []
        text = io.StringIO()
        separator = "\t" if path.suffix == ".tsv" else ","
        csv.writer(text, delimiter=separator, lineterminator="\n").writerows([names, *rows])
        content = text.getvalue().encode()
    else:
        content = b"".join(line + b"\n" for number, line in _lines(path, flag) if number in numbers)
    write_bytes(target, gzip.compress(content) if path.suffix == ".gz" else content)


def repeat(samples: list[Sample], weight: float, name: str) -> list[Sample]:
    """`samples` as often as `weight` says; the part after the point is a draw that `name` and their number fix."""
    whole = int(weight)
    extra = set(random.Random(name).sample(range(len(samples)), round((weight - whole) * len(samples))))
    return samples * whole + [sample for number, sample in enumerate(samples) if number in extra]


def distinct_names(paths: list[str]) -> list[str]:
    """The shortest ends of `paths` that differ.

    in: ["/data/x/a.jsonl", "/data/y/a.jsonl", "/data/b.jsonl"]; out: ["x/a.jsonl", "y/a.jsonl", "b.jsonl"]
    """
    parts = [Path(path).absolute().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        count = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append(printable("/".join(own[-count:])))
    return names


def read_skip_list(path: str | Path) -> dict[str, str]:
    """{absolute path of a file: reason} of a list that `python -m video.scan` wrote. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--skip_list {path}: no such file; python -m video.scan --data ... --output FILE writes one")
    listed = {}
    for number, line in _lines(path, "--skip_list"):
        row = _json(line, f"--skip_list {path.name}:{number}")
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise DataError(f'--skip_list {path.name}:{number}: must be {{"path": ..., "reason": ...}}')
        listed[os.path.abspath(row["path"])] = str(row.get("reason", ""))
    return listed


def leave_out(samples: list[Sample], listed: dict[str, str]) -> tuple[list[Sample], list[Sample]]:
    """(samples that use no file of `listed`, samples that do), each in order."""
    bad = {s.key for s in samples if any(os.path.abspath(path) in listed for path in s.media)}
    return [s for s in samples if s.key not in bad], [s for s in samples if s.key in bad]


def split_spec(spec: str) -> tuple[str, float]:
    """(path, weight) of "FILE:WEIGHT", or of "FILE", with weight 1. A file that is called "a:2" is a file."""
    path, colon, number = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError:
        return spec, 1.0
    if not 0 < weight < float("inf"):
        raise DataError(f"--data {spec}: the weight must be above 0; to drop a file, leave it out")
    return path, weight


def _lines(path: Path, flag: str) -> Iterator[tuple[int, bytes]]:
    """(number, text) of each line. Blank lines are passed over but counted."""
    with _open(path, flag) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix(b"\n")


def _array(path: Path, flag: str) -> Iterator[tuple[int, object]]:
    """The items of an array; or, of ActivityNet-Captions' {video: {"timestamps": [...], "sentences": [...], ...}}, a
    row for each sentence."""
    with _open(path, flag) as file:
        rows = _json(file.read(), f"{flag} {path}")
    if isinstance(rows, dict) and rows and all(isinstance(v, dict) and "sentences" in v for v in rows.values()):
        rows = [moment for name, video in rows.items() for moment in _moments(name, video, f"{flag} {path}")]
    if not isinstance(rows, list):
        raise DataError(f"{flag} {path}: holds no array; write rows as [{{...}}, ...], or one a line in a .jsonl")
    return enumerate(rows, start=1)


def _moments(name: str, video: dict, place: str) -> list[dict]:
    sentences, times = video["sentences"], video.get("timestamps")
    if not isinstance(sentences, list) or not isinstance(times, list) or len(sentences) != len(times):
        raise DataError(f"{place}: {name!r:.100} must have as many timestamps as sentences")
    of_video = {"vid": name, "duration": video.get("duration")}
    return [{**of_video, "sentence": sentence, "timestamp": time} for sentence, time in zip(sentences, times)]


def _charades_sta(path: Path, flag: str) -> Iterator[tuple[int, dict]]:
    """Charades-STA's own lines: "3MSZA 24.3 30.4##person turn a light on." """
    for number, line in _lines(path, flag):
        found = re.fullmatch(r"(\S+) (\d+\.?\d*) (\d+\.?\d*)##(.*\S)\s*", line.decode(errors="replace"))
        if not found:
            raise DataError(f"{flag} {path}:{number}: a line of a .txt file must be VIDEO START END##SENTENCE")
        yield number, {"vid": found[1], "timestamp": [float(found[2]), float(found[3])], "sentence": found[4]}


def _table(path: Path, flag: str) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    """(number of its first line, (names of the columns, cells)) of each row of a .csv or .tsv file. The first row has
    the names."""
    number, names = 1, None
    with _open(path, flag) as file:
        lines = (line.decode("utf-8-sig" if n == 0 else "utf-8") for n, line in enumerate(file))
        separator = "\t" if path.suffix == ".tsv" else ","
        reader = csv.reader(lines, delimiter=separator, strict=True)  # else a quote that is not closed eats rows
        try:
            for cells in reader:
                if names is None:
                    names = cells
                    if "" in names or len({*names}) < len(names):
                        raise DataError(f"{flag} {path}:1: the first row must name each column, got {names!r:.200}")
                elif cells:
                    yield number, (names, cells)
                number = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(f"{flag} {path}:{number}: is not UTF-8 text; save the file as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{flag} {path}:{number}: is no table ({error}); fix the quotes of its cells") from error


def _cells(row: tuple[list[str], list[str]], key: str) -> dict:
    """A row of a table by the names of its columns. An empty cell is null, a JSON list or object is read as one, and
    the seconds of a clip are numbers; all else is text."""
    names, cells = row
    if len(cells) != len(names):
        raise DataError(f"{key}: has {len(cells)} cells for {len(names)} columns; quote a cell that holds a separator")
    fields = {}
    for name, cell in zip(names, cells):
        fields[name] = cell or None
        if cell[:1] in ("[", "{") or name in CLIP_FIELDS and cell:
            try:
                fields[name] = json.loads(cell)
            except (ValueError, RecursionError):
                pass  # a text such as "[laughs] Why?"
    return fields


def _parquet(path: Path, flag: str) -> Iterator[tuple[int, dict]]:
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


# the end of a file's name -> what reads its rows; a name without a suffix is .jsonl
READERS = {
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".json": _array,
    ".parquet": _parquet,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _charades_sta,
}


def _reader(path: Path, flag: str) -> Callable:
    if not path.suffix:
        return _lines
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise DataError(f"{flag} {path}: unsupported file type; use one of {', '.join(READERS)} (of Charades-STA)")


@contextmanager
def _open(path: Path, flag: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if its name ends with .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except OSError as error:  # also for what is no gzip file
        raise DataError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{flag} {path}: is a damaged gzip file ({error}); download it again") from error


def _is_deeper(value, most: int) -> bool:
    """Whether lists and objects stand within each other in `value` more than `most` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (most == 0 or any(_is_deeper(item, most - 1) for item in inner))


def _with_files(value, folder: Path, is_media: bool = False):
    """`value` with paths for images and videos: for bytes, and for {"bytes", "path"}, in which `datasets` stores them.

    Other bytes are text, as some writers store it; bytes that are no text become None.
    """
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

    Its name is the hash of the content: equal images of several rows share a file, and a file that an earlier run or
    another process has written is used again.
    """
    file = folder.absolute() / hashlib.sha256(content).hexdigest()[:32]
    try:
        if not file.exists():
            folder.mkdir(exist_ok=True)
            write_bytes(file, content, aside=f"{file}.{uuid.uuid4().hex}.part", sync=False)
    except OSError as error:
        raise DataError(
            f"{folder}: images that are bytes in a parquet file are kept there, but it cannot be "
            f"written to ({error.strerror}); copy the parquet file to a folder that can"
        ) from error
    return str(file)


def _json(text: bytes, place: str):
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON ({error.msg}, column {error.colno}); fix or delete it") from error
    except RecursionError as error:
        raise DataError(f"{place}: is nested too deep; fix or delete it") from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise DataError(f"{place}: holds an integer of thousands of digits; fix or delete it") from error
