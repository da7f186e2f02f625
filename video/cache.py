"""Tensors kept on disk by any number of processes; and the frames of videos, picked and resized, kept so, that a second
epoch, or another run, decodes nothing."""

import hashlib
import os
import tempfile
import time
import uuid
import warnings
import zlib
from pathlib import Path

import torch
from safetensors.torch import load, save

from video import frames
from video.files import write_bytes
from video.formats import WHOLE, Clip, DataError
from video.frames import Picked
from video.settings import VideoSettings

KEEP = 0.9  # of the limit is left after evicting
SCANS_PER_LIMIT = 256  # how often the folder's size is measured while a limit's worth of entries is written
STALE_SECONDS = 600  # after which a half-written file is the leftover of a process that died


class DiskCache:
    """Tensors in `folder`, at most `gigabytes` (10**9 bytes) of them.

    Any number of processes may share a folder: entries are written atomically, and a damaged or missing entry is a
    cache miss. The limit is kept to within 1/256 for each process that writes; the entries longest unused go first.
    A subclass says what names an entry.
    """

    flag, suffix = "", ""  # the flag that names the folder; of an entry: safetensors, and the crc32 of its bytes
    version = 0  # of what is stored

    def __init__(self, folder: str | Path, gigabytes: float = 20.0):
        self.folder, self.limit = Path(folder), int(gigabytes * 1e9)
        self._unmeasured = self.limit  # bytes written since the folder was measured: measure at the first write
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise DataError(f"{self.flag} {folder}: cannot be written to ({error.strerror})") from error

    def place(self, identity: str) -> Path:
        """Where the entry of this identity is kept."""
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}{self.suffix}"

    def get(self, entry: Path) -> dict[str, torch.Tensor] | None:
        """What `entry` holds, marked as just used; None if it is missing or damaged."""
        try:
            whole = entry.read_bytes()  # in one go: another process may remove it at any time
            os.utime(entry)
        except OSError:
            return None
        return load(whole[:-4]) if whole[-4:] == self._checksum(whole[:-4]) else None

    def put(self, entry: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Stores an entry. A full disk costs time, not samples: it warns."""
        stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        try:
            if self._unmeasured + len(stored) > self.limit / SCANS_PER_LIMIT:
                self._evict(len(stored))
                self._unmeasured = 0
            self._unmeasured += len(stored)
            aside = self.folder / f"{uuid.uuid4().hex}.tmp"
            write_bytes(entry, stored + self._checksum(stored), aside=aside, sync=False)
        except OSError as error:
            warnings.warn(f"{self.flag} {self.folder}: {error.strerror}; {self.suffix[1:]} are not kept", stacklevel=3)

    def _checksum(self, stored: bytes) -> bytes:
        return zlib.crc32(stored, self.version).to_bytes(4, "little")

    def _evict(self, coming: int) -> None:
        """Removes the longest unused entries if they and `coming` bytes would be over the limit."""
        found, now = [], time.time()
        for item in os.scandir(self.folder):
            try:
                status = item.stat()
            except FileNotFoundError:  # another process evicts too
                continue
            if item.name.endswith(".tmp") and now - status.st_mtime > STALE_SECONDS:
                Path(item.path).unlink(missing_ok=True)
            elif item.name.endswith((self.suffix, ".tmp")):
                found.append((status.st_mtime_ns, status.st_size, item.path))
        total = sum(size for _, size, _ in found) + coming
        goal = self.limit * KEEP if total > self.limit else total
        for _, size, path in sorted(found):
            if total > goal and path.endswith(self.suffix):
                Path(path).unlink(missing_ok=True)
                total -= size


class FrameCache(DiskCache):
    """Reads videos as `frames.read_video` does, and keeps the frames.

    An entry belongs to a file's real path, size and time of change (its content is not hashed: reading 100 GB for that
    would cost what the cache saves), to the clip, all settings, the patch factor and the part.
    """

    flag, suffix = "--frame_cache", ".frames"
    version = 5  # raise it when frames are picked or resized in another way

    def read(
        self, path: str, settings: VideoSettings, factor: int, clip: Clip = WHOLE, part: slice = frames.ALL
    ) -> tuple[torch.Tensor, Picked]:
        """As `frames.read_video`; raises VideoError as that does."""
        entry = self.entry(path, settings, factor, clip, part)
        if entry and (found := self.get(entry)):
            return found["frames"], Picked(found["numbers"].tolist(), *found["rates"].tolist())
        pixels, picked = frames.read_video(path, settings, factor, clip, part)
        if entry:
            rates = torch.tensor([picked.rate, picked.fps], dtype=torch.float64)
            self.put(entry, {"frames": pixels, "numbers": torch.tensor(picked.numbers), "rates": rates})
        return pixels, picked

    def entry(
        self, path: str, settings: VideoSettings, factor: int, clip: Clip, part: slice = frames.ALL
    ) -> Path | None:
        """Where the frames of a video are kept; None if there is no such video."""
        try:
            files = [path, *frames.frame_files(path)] if os.path.isdir(path) else [path]
            status = [(os.path.realpath(file), os.stat(file)) for file in files]
        except (OSError, frames.VideoError):
            return None
        identity = [(real, found.st_size, found.st_mtime_ns) for real, found in status]
        return self.place(repr((self.version, identity, settings, factor, clip, part)))
