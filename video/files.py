"""Files that are whole after a kill, a power loss or a full disk."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: str | Path, content: bytes, aside: str | Path | None = None, sync: bool = True) -> None:
    """Writes a file atomically: until the new content is on the disk, the file keeps its old content.

    The content first goes to the file `aside`, PATH.part; processes that write the same file need one each. Without
    `sync`, which takes milliseconds, a power loss may leave a damaged file. Raises OSError, which names the file.
    """
    aside = Path(aside or f"{path}.part")
    try:
        with naming(aside), open(aside, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file as `write_bytes` does.

    A character that UTF-8 cannot hold, as in a file name of another encoding, becomes its escape, which JSON reads.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Writes a .jsonl file atomically, as `write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def append_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Adds lines to the end of a .jsonl file. Raises OSError, which names the file."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: str | Path, names: Iterable[str]) -> list[dict]:
    """The rows of a .jsonl file that have all fields of `names`; [] if there is no file.

    Other lines are damaged: a kill or a full disk cuts a line short, a power loss fills it with NUL bytes. They are
    left out, and one line on stderr says how many.
    """
    path, rows = Path(path), []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # neither JSON nor UTF-8
            continue
        if isinstance(row, dict) and all(name in row for name in names):
            rows.append(row)
    if len(rows) < len(lines):
        print(f"{path}: {len(lines) - len(rows)} damaged lines are left out", file=sys.stderr)
    return rows


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError of its block the name of the file if it has no name, as that of a full disk has not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
