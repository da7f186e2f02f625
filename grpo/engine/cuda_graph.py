"""CUDA graphs of a few steps, recorded without emptying the allocator's cache."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch


def record(step: Callable[[], object], pool: torch.cuda.MemPool) -> torch.cuda.CUDAGraph:
    """The CUDA graph of step(), which is recorded and not run; its memory comes from `pool`.

    torch.cuda.graph does the same, but first empties the allocator's cache: too much for a graph of a few steps.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(capture_stream()):
        graph.capture_begin(pool.id, capture_error_mode="thread_local")  # other threads load data
        try:
            step()
        except Exception:
            with suppress(RuntimeError):  # says only that there was an error
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


@cache
def capture_stream() -> torch.cuda.Stream:
    """The one stream of all recordings: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()
