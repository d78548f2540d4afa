"""Searches with FAISS indices, on the CPU and, without a copy to the host, on the GPU.

An index proposes neighbours; what it proposes is measured again on the vectors themselves, so that
values are as exact as those of the exact search. ``nearest`` indexes the keys as they are.
``nearest_earlier`` keeps a growing index of the tokens seen so far, projected to a few channels,
which holds a small part of what the features hold; tokens of one block are compared exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

import faiss
import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.neighbors.exact import Metric, earlier_within, nearer, nearest_exact
from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import SMALLEST_NORM, directions, unit_vectors
from tokenreduce.ops.tracks import cosine_to

#: Channels of the projected tokens: a quarter of 1024.
PROJECTED: Final = 256
#: Tokens that are searched, then added, at once.
BLOCK: Final = 512
#: Proposals of an index, beyond those asked for.
SPARE: Final = 15
#: Vectors for each list that the lists are fitted to, and passes over them.
FIT_VECTORS, FIT_PASSES = 12, 5


class FaissSearch(ABC):
    """See :class:`tokenreduce.neighbors.NeighborBackend`."""

    gpu: ClassVar[bool] = True

    @abstractmethod
    def index(self, channels: int, count: int, metric: Any) -> Any:
        """A CPU index for about ``count`` vectors; on the GPU its like is built from it."""

    def nearest(
        self, queries: Tensor, keys: Tensor, k: int, *, metric: Metric, exclude_self: bool
    ) -> tuple[Tensor, Tensor]:
        """See :func:`tokenreduce.neighbors.nearest`."""
        cosine = metric == "cosine"
        kind = faiss.METRIC_INNER_PRODUCT if cosine else faiss.METRIC_L2
        ready = unit_vectors if cosine else Tensor.float
        values, places = [], []
        for query, key in zip(queries.detach(), keys.detach(), strict=True):
            asked, vectors = ready(query).contiguous(), ready(key).contiguous()
            index = self._open(vectors.shape[1], len(vectors), kind, vectors.device)
            _fit(index, vectors)
            index.add(_given(vectors))
            proposals = _search(index, asked, min(len(vectors), k + exclude_self + SPARE))
            score = _scores(asked, vectors, proposals, cosine=cosine)
            if exclude_self:
                own = torch.arange(len(asked), device=asked.device)[:, None]
                score = score.masked_fill(proposals == own, -torch.inf)
            score, best = score.topk(k, dim=1)
            place = proposals.gather(1, best)
            short = (score[:, -1] == -torch.inf).nonzero()[:, 0]
            if len(short):
                # The lists that were probed hold fewer than k.
                score[short], place[short] = _exact(
                    asked, vectors, short, k, cosine=cosine, exclude_self=exclude_self
                )
            values.append(score if cosine else -score)
            places.append(place)
        return torch.stack(values), torch.stack(places)

    def nearest_earlier(
        self, features: Tensor, rows: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`tokenreduce.neighbors.nearest_earlier`."""
        features = features.detach()
        count = len(rows)
        basis = _basis(features.shape[1], features.device)
        index = self._open(basis.shape[1], count, faiss.METRIC_INNER_PRODUCT, features.device)
        if not index.is_trained:
            wanted = min(count, FIT_VECTORS * index.nlist)
            sample = rows[torch.linspace(0, count - 1, wanted, device=rows.device).long()]
            fitted = torch.empty(wanted, basis.shape[1], device=features.device)
            for part, out in zip(sample.split(BLOCK), fitted.split(BLOCK), strict=True):
                out.copy_(unit_vectors(directions(features[part]) @ basis))
            _fit(index, fitted)
            del fitted
        value = torch.full((count,), -torch.inf, device=features.device)
        place = torch.full_like(rows, -1)
        silent = torch.ones_like(rows, dtype=torch.bool)
        silent[asked] = False
        for start in range(0, count, BLOCK):
            block = slice(start, start + BLOCK)
            unit = directions(features[rows[block]])
            key = unit_vectors(unit @ basis)
            searching = (~silent[block]).nonzero()[:, 0]
            if start == 0 or not len(searching):
                index.add(_given(key))
            if not len(searching):
                continue
            value[block], place[block] = earlier_within(unit, start)
            if start == 0:
                continue
            unit, own = unit[searching], start + searching
            for proposal in self.propose(index, key, searching, 1 + SPARE).T:
                near = _cosine(unit, features[rows[proposal.clamp(min=0)]])
                near.masked_fill_(proposal < 0, -torch.inf)
                nearer(near, proposal, value, place, own)
        value.masked_fill_(silent, -torch.inf)
        place.masked_fill_(silent, -1)
        silent[:1] = True
        for alone in ((place < 0) & ~silent).nonzero()[:, 0].tolist():
            # First of its block, and the lists that were probed were empty.
            own = directions(features[rows[alone]])
            cosine = cosine_to(features, rows[:alone], own)
            place[alone] = first_argmax(cosine, scale=1.0)
            value[alone] = cosine[place[alone]]
        return value, place

    def propose(self, index: Any, vectors: Tensor, searching: Tensor, k: int) -> Tensor:
        """Places of what an index holds that is like some vectors, before all of them join it.

        Args:
            index: of the tokens before.
            vectors: ``(N, D)``.
            searching: ``(Q,)`` which of them search.
            k: how many places.

        Returns:
            ``(Q, k)``, -1 where there are fewer.
        """
        found = _search(index, vectors[searching], k)
        index.add(_given(vectors))
        return found

    def _open(self, channels: int, count: int, metric: Any, device: torch.device) -> Any:
        """An index on a device.

        Raises:
            PipelineError: if this kind of index, or this build of FAISS, does not run there.
        """
        index = self.index(channels, count, metric)
        if device.type == "cpu":
            return index
        if device.type != "cuda" or not self.gpu or faiss.get_num_gpus() == 0:
            raise PipelineError(
                f"{type(self).__name__} of FAISS {faiss.__version__} cannot search tokens on "
                f"{device}: it sees {faiss.get_num_gpus()} GPUs, and has no graph index for them. "
                "Use the backend 'torch', or 'faiss-ivf' with faiss-gpu on a CUDA device."
            )
        # Teaches indices to take CUDA tensors where they lie.
        from faiss.contrib import torch_utils  # noqa: F401

        return faiss.index_cpu_to_gpu(_resources(device.index or 0), device.index or 0, index)


class FlatSearch(FaissSearch):
    """Every key is compared."""

    def index(self, channels: int, count: int, metric: Any) -> Any:
        """See :meth:`FaissSearch.index`."""
        return faiss.IndexFlat(channels, metric)


class InvertedListSearch(FaissSearch):
    """Keys in 4 sqrt(count) lists around centroids, 8 bits a channel; 8 lists are compared."""

    def index(self, channels: int, count: int, metric: Any) -> Any:
        """See :meth:`FaissSearch.index`."""
        lists = max(1, min(round(4 * count**0.5), count // FIT_VECTORS))
        centroids = faiss.IndexFlat(channels, metric)
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(centroids, channels, lists, kind, metric)
        index.nprobe = min(8, lists)
        # Differences from the centroids say no more in 8 bits than unit vectors do, and fitting to
        # them holds the sample twice.
        index.by_residual = False
        index.cp.niter, index.cp.min_points_per_centroid = FIT_PASSES, 1
        return index

    def propose(self, index: Any, vectors: Tensor, searching: Tensor, k: int) -> Tensor:
        """See :meth:`FaissSearch.propose`; the lists near a vector are looked up once for both."""
        if vectors.is_cuda:
            return super().propose(index, vectors, searching, k)
        given, asked = vectors.numpy(), searching.numpy()
        likeness, lists = index.quantizer.search(given, index.nprobe)
        found = index.search_preassigned(given[asked], k, lists[asked], likeness[asked])[1]
        own = lists[:, 0].copy()
        index.add_core(len(given), faiss.swig_ptr(given), None, faiss.swig_ptr(own))
        return torch.as_tensor(found)


class GraphSearch(FaissSearch):
    """Keys linked to 16 near ones each; a search walks towards the query."""

    gpu = False

    def index(self, channels: int, count: int, metric: Any) -> Any:
        """See :meth:`FaissSearch.index`."""
        index = faiss.IndexHNSWFlat(channels, 16, metric)
        index.hnsw.efConstruction, index.hnsw.efSearch = 40, 64
        return index


_RESOURCES: dict[int, Any] = {}


def _resources(gpu: int) -> Any:
    """One pool of scratch memory for each GPU."""
    if gpu not in _RESOURCES:
        _RESOURCES[gpu] = faiss.StandardGpuResources()
    return _RESOURCES[gpu]


def _basis(channels: int, device: torch.device) -> Tensor:
    """``(D, P)`` orthonormal directions, drawn at random, the same every time."""
    if channels <= PROJECTED:
        return torch.eye(channels, device=device)
    draw = torch.randn(channels, PROJECTED, generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(draw)[0]
    return basis.to(device)


def _given(vectors: Tensor) -> Any:
    """What an index takes: CUDA tensors as they are, others as arrays that share their memory."""
    return vectors if vectors.is_cuda else vectors.numpy()


def _fit(index: Any, vectors: Tensor) -> None:
    if not index.is_trained:
        index.train(_given(vectors))


def _search(index: Any, queries: Tensor, k: int) -> Tensor:
    """Places ``(Q, k)`` of the proposals, -1 where there are fewer."""
    if not len(queries):
        return torch.empty(0, k, dtype=torch.long, device=queries.device)
    return torch.as_tensor(index.search(_given(queries), k)[1])


def _cosine(unit: Tensor, features: Tensor) -> Tensor:
    """Inner products ``(Q,)`` of unit vectors and the directions of features, both ``(Q, D)``."""
    features = features.float()
    length = torch.linalg.vector_norm(features, dim=1)
    # Vectors of length 0 share the direction of all channels alike; see `directions`.
    alike = unit.sum(1) * unit.shape[1] ** -0.5
    cosine = (unit * features).sum(1) / length.clamp(min=SMALLEST_NORM)
    return torch.where(length == 0, alike, cosine)


def _scores(queries: Tensor, keys: Tensor, place: Tensor, *, cosine: bool) -> Tensor:
    """``(Q, k)`` similarities or negative distances; ``-inf`` where there is no proposal."""
    columns = []
    for column in place.T:
        found = keys[column.clamp(min=0)]
        score = (queries * found).sum(-1) if cosine else -(queries - found).norm(dim=-1)
        columns.append(score.masked_fill(column < 0, -torch.inf))
    return torch.stack(columns, dim=1)


def _exact(
    queries: Tensor, keys: Tensor, rows: Tensor, k: int, *, cosine: bool, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Scores and places ``(len(rows), k)`` of some queries, by exact search."""
    value, place = nearest_exact(
        queries[None, rows],
        keys[None],
        k + exclude_self,
        metric="cosine" if cosine else "euclidean",
        exclude_self=False,
    )
    score = value[0] if cosine else -value[0]
    if exclude_self:
        score = score.masked_fill(place[0] == rows[:, None], -torch.inf)
    score, best = score.topk(k, dim=1)
    return score, place[0].gather(1, best)
