"""What a strategy costs, in units that hold across machines.

Time is compared with one float32 product of the features with themselves (N x N x D, the Gram
matrix) and with one pass over the features, both measured in the same process between the runs of
the strategy. Memory is what the process grew by at its peak, in a child of its own.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import Reducer
from tokenreduce.tokens import VisualTokens

#: Rows of the Gram matrix that are held at a time; the product costs the same.
ROWS = 2048
#: The parameter of glibc's ``mallopt``.
M_MMAP_THRESHOLD = -3


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs; times are in milliseconds.

    Attributes:
        ms: the strategy.
        gram_ms: the Gram matrix of every item of the batch.
        read_ms: one pass over the features.
        peak_bytes: growth of the resident set at its peak; None where it cannot be told.
    """

    ms: float
    gram_ms: float
    read_ms: float
    peak_bytes: int | None

    @property
    def grams(self) -> float:
        """The time in Gram products."""
        return self.ms / self.gram_ms


def measure_cost(
    reducer: Reducer,
    tokens: VisualTokens,
    *,
    rounds: int = 5,
    seconds: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Time a strategy and its anchors, in turn, round after round; the shortest times count.

    Load of the machine lengthens times, so that the shortest are disturbed least.

    Args:
        reducer: prepared.
        tokens: on the CPU.
        rounds: at most.
        seconds: no further round begins after so long; a first call that takes longer is the only
            one, and the peak is not measured.
        clock: in seconds; ``time.process_time`` leaves out what the process waits for a processor.
    """
    item = tokens.features[0]

    def strategy() -> None:
        with torch.no_grad():
            reducer(tokens)

    first = _milliseconds(strategy, clock)
    brief = first < 1000 * seconds
    calls = (lambda: gram(item), tokens.features.sum, strategy)
    times: list[list[float]] = []
    if not brief:
        times.append([*(_milliseconds(call, clock) for call in calls[:2]), first])
    begin = time.perf_counter()
    while brief and (not times or (len(times) < rounds and time.perf_counter() - begin < seconds)):
        times.append([_milliseconds(call, clock) for call in calls])
    gram_ms, read_ms, ms = (min(column) for column in zip(*times, strict=True))
    return Cost(
        ms=ms,
        gram_ms=gram_ms * tokens.batch,
        read_ms=read_ms,
        peak_bytes=peak_growth(strategy) if brief else None,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, so that load and cores of the machine matter less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gram(features: Tensor) -> Tensor:
    """The last rows of ``features @ features.T``, for ``(N, D)``, after all others."""
    features = features.float()
    tile = features.new_empty(min(ROWS, len(features)), len(features))
    for rows in features.split(ROWS):
        torch.mm(rows, features.T, out=tile[: len(rows)])
    return tile


def _milliseconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    call()
    return (clock() - begin) * 1000


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grows at its peak in a call, made in a child process.

    The child makes the call twice, and the second counts: the first maps the pages of libraries,
    which are no memory used.
    """
    if not sys.platform.startswith("linux"):
        return None
    receives, sends = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on a fork warns of threads; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            # A new thread has a heap of its own: free blocks of this one would be taken first and
            # not go back.
            with ThreadPoolExecutor(1) as thread:
                grown = thread.submit(_growth_of_second, call).result()
            os.write(sends, str(grown).encode())
        finally:
            os._exit(0)
    os.close(sends)
    with os.fdopen(receives) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return int(said) if said else None


def _growth_of_second(call: Callable[[], object]) -> int:
    """Bytes by which the resident set grows at its peak in the second of two calls."""
    import resource

    torch.set_num_threads(1)
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    tunable = hasattr(library, "malloc_trim") and hasattr(library, "mallopt")
    if tunable:
        # Blocks from 64 KiB on go back as they are freed; what the allocator keeps is no need.
        library.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    call()
    if tunable:
        library.malloc_trim(0)
    # The high-water mark falls to what is resident now.
    with open("/proc/self/clear_refs", "w", encoding="ascii") as marks:
        marks.write("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
