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
) -> Cost:
    """Time a strategy and its anchors, in turn, round after round; the shortest times count.

    Load of the machine lengthens times, so that the shortest are disturbed least.

    Args:
        reducer: prepared.
        tokens: on the CPU.
        rounds: at most.
        seconds: no further round begins after so long.
    """
    item = tokens.features[0]

    def strategy() -> None:
        with torch.no_grad():
            reducer(tokens)

    strategy()
    calls = (lambda: gram(item), tokens.features.sum, strategy)
    begin = time.perf_counter()
    times: list[list[float]] = []
    while not times or (len(times) < rounds and time.perf_counter() - begin < seconds):
        times.append([_milliseconds(call) for call in calls])
    gram_ms, read_ms, ms = (min(column) for column in zip(*times, strict=True))
    return Cost(
        ms=ms,
        gram_ms=gram_ms * tokens.batch,
        read_ms=read_ms,
        peak_bytes=peak_growth(strategy),
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


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grows at its peak in a call, made in a child process.

    The child begins with the memory of this process as its high-water mark, less what the
    allocator keeps for later, which is given back first.
    """
    if not sys.platform.startswith("linux"):
        return None
    import resource

    library = ctypes.CDLL(ctypes.util.find_library("c"))
    tunable = hasattr(library, "malloc_trim") and hasattr(library, "mallopt")
    if tunable:
        library.malloc_trim(0)
    receives, sends = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on a fork warns of threads; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if tunable:
            # Blocks from 64 KiB on go back as they are freed; what the allocator keeps is no need.
            library.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        before, code = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _mapped_files()
        try:
            call()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            # A fork maps the pages of libraries anew as they are called; they are no memory used.
            grown = after - before - (_mapped_files() - code)
            os.write(sends, str(max(0, grown) * 1024).encode())
        finally:
            os._exit(0)
    os.close(sends)
    with os.fdopen(receives) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return int(said) if said else None


def _mapped_files() -> int:
    """KiB of files, libraries above all, in the resident set."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssFile"))
