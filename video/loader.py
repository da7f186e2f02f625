"""Prompts encoded ahead of the trainer, in worker processes that may hang or die without harm.

A decoder can crash or hang on a damaged file, which no `try` catches. So each sample is a task with a time limit in a
process of its own; pebble replaces a worker that overruns or dies, and the sample comes back as Skipped.
"""
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, TimeoutError

import torch
from pebble import ProcessExpired, ProcessPool

from video.dataset import Sample
from video.frames import SampleError
from video.prompt import Prompt, Skipped

Encoder = Callable[[Sample, str | None], Prompt]

# imported once, by the server that workers are forked from: a replaced worker then starts in a fraction of a second
PRELOAD = (
    "torch", "torchvision.transforms.functional", "video.prompt", "transformers.models.qwen2_vl.processing_qwen2_vl",
    "transformers.models.qwen2_vl.video_processing_qwen2_vl", "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl", "transformers.models.qwen2.tokenization_qwen2",
)


class PromptLoader:
    """Encodes batches of samples in order, at most `ahead` batches before they are asked for.

    `workers` 0 encodes in this process, when a batch is asked for: no limit of time and no protection then. `timeout`
    is in seconds a sample. Workers start at once, so that they are ready when the model has loaded. A script that uses
    it needs the usual `if __name__ == "__main__":`. Use it as a context manager, or call close().
    """

    def __init__(self, encoder: Encoder, workers: int = 2, timeout: float = 60.0, ahead: int = 2):
        for holds, message in (
            (workers >= 0, "--workers must be 0 or more"),
            (timeout > 0, "--timeout must be above 0 seconds"),
            (ahead >= 1, "--ahead must be 1 or more"),
        ):
            if not holds:
                raise ValueError(message)
        self.encoder, self.timeout, self.ahead = encoder, timeout, ahead
        self._pool = None
        if workers:
            self._pool = ProcessPool(workers, initializer=_start_worker, initargs=(encoder,), context=_context())
            self._pool.schedule(os.getpid)  # pebble starts its workers at the first task

    def batches(
        self, groups: Iterable[list[Sample]], control: str | None = None
    ) -> Iterator[list[Prompt | Skipped]]:
        """One list for each list of `groups`, in the same order; `control` goes to the encoder."""
        if self._pool is None:
            for group in groups:
                yield [_encode(self.encoder, sample, control) for sample in group]
            return
        source, pending = iter(groups), deque()
        try:
            while True:
                while len(pending) <= self.ahead and (group := next(source, None)) is not None:
                    pending.append([(sample, self._submit(sample, control)) for sample in group])
                if not pending:
                    return
                yield [self._collect(sample, future) for sample, future in pending.popleft()]
        finally:  # the consumer stopped early: what has not begun need not begin
            for _, future in (pair for batch in pending for pair in batch):
                if not future.running():
                    future.cancel()

    def close(self) -> None:
        """Ends the workers. (The server that forked them is shared by all loaders, and ends with this process.)"""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def __enter__(self) -> "PromptLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _submit(self, sample: Sample, control: str | None) -> Future:
        return self._pool.schedule(_work, args=(sample, control), timeout=self.timeout)

    def _collect(self, sample: Sample, future: Future) -> Prompt | Skipped:
        try:
            return future.result()
        except TimeoutError:
            return _skipped(sample, f"took more than {self.timeout:g} s (--timeout)")
        except ProcessExpired as error:
            return _skipped(sample, f"its worker died (exit code {error.exitcode})")


def _context():
    """A way to start processes that inherits no thread, lock or CUDA state from the trainer."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


_worker_encoder: Encoder | None = None  # set once in each worker, so that tasks carry a sample alone


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer ends its workers
    torch.set_num_threads(1)
    _worker_encoder = encoder


def _work(sample: Sample, control: str | None) -> Prompt | Skipped:
    return _encode(_worker_encoder, sample, control)


def _encode(encoder: Encoder, sample: Sample, control: str | None) -> Prompt | Skipped:
    """The prompt, or why there is none. Any error costs this sample alone, and its type and text are kept."""
    try:
        return encoder(sample, control)
    except SampleError as error:
        return Skipped(sample.key, error.path, error.reason)
    except Exception as error:  # named and counted by the caller: one odd file in 100,000 must not end a run
        return _skipped(sample, f"{type(error).__name__}: {error}")


def _skipped(sample: Sample, reason: str) -> Skipped:
    media = (*sample.videos, *sample.images)
    return Skipped(sample.key, media[0] if media else "", " ".join(reason.split())[:300])
