"""Prompts encoded ahead of the trainer, in worker processes that may hang or die without harm.

A decoder can crash or hang on a damaged file, which no `try` catches. So each sample is a call with a time limit in a
process of its own; a worker that overruns or dies is replaced, and the sample comes back as Skipped.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain

from video.formats import DataError, Sample
from video.frames import SampleError
from video.pool import WorkerDied, WorkerPool
from video.prompt import Prompt, Skipped

Encoder = Callable[[Sample, str | None], Prompt]

AHEAD = 2  # batches
GIVE_UP_AFTER = 50  # samples, all skipped for one type of reason before any could be used: the set-up is at fault
ADVICE = {  # Skipped.reason_type -> what to do if nothing else happens
    "VideoError": "python -m video.scan --data ... lists all such files",
    "PromptTooLong": "raise --max_prompt_tokens; lower --max_frames (or --nframes), --max_pixels or --image_max_pixels",
    "SampleError": "fix the rows",
    "timeout": "raise --decode_timeout, or lower --workers if the machine is busy",
    "worker died": "lower --workers if memory is short; --workers 0 shows the error if a decoder crashes",
}


class PromptLoader(AbstractContextManager):
    """Encodes batches of samples in order, at most AHEAD batches before they are asked for.

    If the first `give_up_after` samples are all skipped, and for the same type of reason, it raises DataError with
    advice for that type: with a wrong --video_root, say, a run would train on nothing. None: it never does.

    `timeout` is in seconds a sample. With `workers` 0 this process encodes, when a batch is asked for, without a limit
    of time or protection from crashes. Workers start at once, so that they are ready when the model has loaded. Use it
    as a context manager, in a script that has the usual `if __name__ == "__main__":`.
    """

    def __init__(
        self, encoder: Encoder, workers: int = 2, timeout: float = 60.0, give_up_after: int | None = GIVE_UP_AFTER
    ):
        if workers < 0:
            raise ValueError("--workers must be 0 or more")
        if not timeout > 0:
            raise ValueError("--decode_timeout must be above 0 seconds")
        self.encoder, self.timeout, self.give_up_after = encoder, timeout, give_up_after
        self._reason_types, self._seen = set(), 0  # of the samples so far; None: the sample was used
        self._pool = WorkerPool(partial(_encode, encoder), workers, timeout) if workers else None

    def batches(self, groups: Iterable[list[Sample]], control: str | None = None) -> Iterator[list[Prompt | Skipped]]:
        """One list for each list of `groups`, in the same order; `control` goes to the encoder."""
        source, pending = iter(groups), deque()
        try:
            while True:
                ahead = AHEAD if self._pool else 0
                while len(pending) <= ahead and (group := next(source, None)) is not None:
                    pending.append(self._begin(group, control))
                if not pending:
                    return
                yield self._finish(pending.popleft())
        finally:  # the consumer stopped early: calls that have not begun need not begin
            for _, future in chain(*pending):
                future.cancel()

    def submit(self, group: list[Sample], control: str | None = None) -> Callable[[], list[Prompt | Skipped]]:
        """Begins to encode one batch; returns a function that waits for it."""
        return partial(self._finish, self._begin(group, control))

    def _begin(self, group: list[Sample], control: str | None) -> list[tuple[Sample, Future]]:
        if self._pool:
            return [(sample, self._pool.submit(sample, control)) for sample in group]
        futures = [Future() for _ in group]
        for sample, future in zip(group, futures):
            future.set_result(_encode(self.encoder, sample, control))
        return list(zip(group, futures))

    def __exit__(self, *_) -> None:
        """Ends the workers. (The server that forked them is shared by all loaders, and ends with this process.)"""
        if self._pool is not None:
            self._pool.close()

    def _finish(self, calls: list[tuple[Sample, Future]]) -> list[Prompt | Skipped]:
        """The outcomes of the calls, unless they show that no sample at all can be used."""
        batch = [self._collect(sample, future) for sample, future in calls]
        self._reason_types |= {item.reason_type if isinstance(item, Skipped) else None for item in batch}
        self._seen += len(batch)
        all_alike = len(self._reason_types) == 1 and None not in self._reason_types
        if batch and all_alike and self.give_up_after and self._seen >= self.give_up_after:
            last = batch[-1]
            because = ": ".join(filter(None, (last.path, last.reason)))
            because = "; ".join(filter(None, (because, ADVICE.get(last.reason_type))))
            raise DataError(f"all of the first {self._seen} samples were skipped, the last ({last.key}): {because}")
        return batch

    def _collect(self, sample: Sample, future: Future) -> Prompt | Skipped:
        try:
            return future.result()
        except TimeoutError:
            return _skipped(sample, f"took more than {self.timeout:g} s (--decode_timeout)", "timeout")
        except WorkerDied as error:
            return _skipped(sample, f"its worker died ({error})", "worker died")


def _encode(encoder: Encoder, sample: Sample, control: str | None) -> Prompt | Skipped:
    """The prompt, or why there is none. Any error costs this sample alone, and its type and text are kept."""
    try:
        return encoder(sample, control)
    except SampleError as error:
        return Skipped(sample.key, error.path, error.reason, type(error).__name__)
    except Exception as error:  # named and counted by the caller: one odd file in 100,000 must not end a run
        return _skipped(sample, f"{type(error).__name__}: {error}", type(error).__name__)


def _skipped(sample: Sample, reason: str, reason_type: str) -> Skipped:
    return Skipped(sample.key, next(iter(sample.media), ""), " ".join(reason.split())[:300], reason_type)
