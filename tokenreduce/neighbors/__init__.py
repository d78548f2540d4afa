"""Nearest-neighbour search: one function, with backends by registration.

Built in: ``torch``, exact and tiled, on any device. A plugin adds others through the hook
``register_neighbor_backends``; a backend is a function with the signature of :func:`nearest`
without ``backend``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from tokenreduce.errors import TokensError
from tokenreduce.plugins import installed

# The plugin that registers the built-in backend lives in this package, and plugins are read
# without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from tokenreduce.neighbors.exact import Metric

__all__ = ["NeighborBackend", "nearest"]


class NeighborBackend(Protocol):
    """A function that finds nearest neighbours."""

    def __call__(
        self, queries: Tensor, keys: Tensor, k: int, *, metric: Metric, exclude_self: bool
    ) -> tuple[Tensor, Tensor]:
        """As :func:`nearest`."""
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
        backend: a registered backend.

    Returns:
        values ``(B, Q, k)`` float32 (similarities, largest first, or distances, smallest first)
        and indices ``(B, Q, k)``. The exact backend gives ties to the lowest index.

    Raises:
        TokensError: if shapes do not fit or fewer than ``k`` keys exist.
        UnknownName: if no plugin registered the backend.
    """
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[::2] != keys.shape[::2]:
        raise TokensError(
            "queries (B, Q, D) and keys (B, K, D) must agree in B and D, got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    available = keys.shape[1] - bool(exclude_self)
    if not 1 <= k <= available:
        raise TokensError(f"k={k} neighbours of {available} keys: k lies in [1, {available}].")
    search = cast(NeighborBackend, installed().neighbor_backends.resolve(backend))
    return search(queries, keys, k, metric=metric, exclude_self=exclude_self)
