"""Nearest-neighbour search, with backends by registration.

Built in: ``torch``, exact and tiled, on any device. A plugin adds others through the hook
``register_neighbor_backends``; the FAISS ones come with the extra ``faiss``. ``"auto"`` chooses by
the number of keys and the device, from measured crossovers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Protocol, cast

from tokenreduce.errors import TokensError
from tokenreduce.plugins import installed

# The plugin that registers the built-in backend lives in this package, and plugins are read
# without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from tokenreduce.neighbors.exact import Metric

__all__ = ["NeighborBackend", "check_backend", "choose_backend", "nearest", "nearest_earlier"]

#: Keys from which on a backend beats exact search on the CPU, in ascending order; measured by
#: benchmarks/neighbors.py and recorded in benchmarks/results/neighbors_cpu.json.
CROSSOVERS: Final = {"cpu": {"faiss-ivf": 8192}}


class NeighborBackend(Protocol):
    """What a plugin registers: a class, instantiated without arguments at every search."""

    def nearest(
        self, queries: Tensor, keys: Tensor, k: int, *, metric: Metric, exclude_self: bool
    ) -> tuple[Tensor, Tensor]:
        """As :func:`nearest`."""
        ...

    def nearest_earlier(
        self, features: Tensor, rows: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :func:`nearest_earlier`."""
        ...


def nearest(
    queries: Tensor,
    keys: Tensor,
    k: int = 1,
    *,
    metric: Metric = "cosine",
    exclude_self: bool = False,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest keys of each query.

    Args:
        queries: ``(B, Q, D)``.
        keys: ``(B, K, D)``.
        k: how many, 1 <= k <= K (K - 1 with ``exclude_self``).
        metric: ``"cosine"`` similarity or ``"euclidean"`` distance.
        exclude_self: whether query i may not find key i (queries and keys are the same tokens).
        backend: a registered backend, or ``"auto"``.

    Returns:
        values ``(B, Q, k)`` float32 (similarities, largest first, or distances, smallest first)
        and indices ``(B, Q, k)``. The exact backend gives ties to the lowest index.

    Raises:
        TokensError: if shapes do not fit or fewer than ``k`` keys exist.
        UnknownName: if no plugin registered the backend.
        MissingExtra: if it needs a package that is not installed.
    """
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[::2] != keys.shape[::2]:
        raise TokensError(
            "queries (B, Q, D) and keys (B, K, D) must agree in B and D, got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    available = keys.shape[1] - bool(exclude_self)
    if not 1 <= k <= available:
        raise TokensError(f"k={k} neighbours of {available} keys: k lies in [1, {available}].")
    search = _resolve(backend, keys.shape[1], keys.device.type)
    return search.nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)


def nearest_earlier(
    features: Tensor, rows: Tensor, *, asked: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The most similar earlier token (cosine) of each of some tokens of an item.

    Token ``rows[i]`` may find ``rows[j]`` for j < i. Nothing of the size of the features is
    copied: rows are gathered tile by tile.

    Args:
        features: ``(N, D)``.
        rows: ``(n,)`` indices of the tokens, in their order.
        asked: ``(m,)`` places in ``rows``, ascending, of the tokens that search; all if omitted.
        backend: a registered backend, or ``"auto"``.

    Returns:
        cosine ``(n,)`` float32 and place ``(n,)`` in ``rows`` of the token found; the first token,
        which has none before it, and those that were not asked about get ``-inf`` and -1. The
        exact backend gives ties to the lowest place.

    Raises:
        TokensError: if shapes do not fit.
        UnknownName: if no plugin registered the backend.
        MissingExtra: if it needs a package that is not installed.
    """
    if features.ndim != 2 or rows.ndim != 1:
        raise TokensError(
            "features (N, D) and rows (n,) are needed, got "
            f"{tuple(features.shape)} and {tuple(rows.shape)}."
        )
    if asked is None:
        import torch

        asked = torch.arange(len(rows), device=rows.device)
    # Crossovers were measured where all tokens search, and half of them lie before a token.
    keys = 2 * int(asked.sum()) // max(1, len(rows))
    search = _resolve(backend, keys, features.device.type)
    return search.nearest_earlier(features, rows, asked)


def choose_backend(keys: int, device: str) -> str:
    """The backend that ``"auto"`` stands for: the fastest measured one that is installed.

    Args:
        keys: how many keys are searched.
        device: type of the device that holds them.
    """
    chosen = "torch"
    for name, crossover in CROSSOVERS.get(device, {}).items():
        known = name in installed().neighbor_backends
        if keys >= crossover and known and find_spec("faiss") is not None:
            chosen = name
    return chosen


def check_backend(name: str) -> None:
    """Check that a backend exists, without importing it.

    Raises:
        UnknownName: if it is neither ``"auto"`` nor registered.
    """
    if name != "auto":
        installed().neighbor_backends[name]


def _resolve(backend: str, keys: int, device: str) -> NeighborBackend:
    name = choose_backend(keys, device) if backend == "auto" else backend
    return cast(NeighborBackend, installed().neighbor_backends.resolve(name)())
