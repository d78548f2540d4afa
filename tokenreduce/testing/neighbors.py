"""Checks of nearest-neighbour backends, against a plain computation of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.errors import RegistrationError
from tokenreduce.neighbors import NeighborBackend
from tokenreduce.neighbors.exact import METRICS, Metric
from tokenreduce.plugins import installed
from tokenreduce.testing.check import Checks, fail
from tokenreduce.testing.kit import NONE, CheckResult, Run, parametrized
from tokenreduce.testing.meter import metered

#: Differences of values that rounding explains.
TOLERANCE = 1e-3
BATCH, QUERIES, KEYS, WIDTH, FOUND = 2, 37, 61, 24, 5


@dataclass(frozen=True)
class NeighborSubject:
    """A neighbour backend under test.

    Attributes:
        name: what to call it.
        factory: makes an instance, as every search does.
        recall: share of the true neighbours that it promises to find; 1 for exact ones.
    """

    name: str
    factory: Callable[[], NeighborBackend]
    recall: float = 1.0

    @classmethod
    def of(cls, backend: str | type[Any], recall: float) -> NeighborSubject:
        """A registered name or a class.

        Raises:
            UnknownName: if nothing registered the name.
            RegistrationError: if it is neither, or cannot be created without arguments.
        """
        if isinstance(backend, str):
            found = installed().neighbor_backends.resolve(backend)
            return cls(backend, found, recall)
        if not callable(backend):
            raise RegistrationError(f"a neighbour backend is a name or a class, got {backend!r}.")
        return cls(getattr(backend, "__name__", repr(backend)), backend, recall)

    def nearest(
        self,
        queries: Tensor,
        keys: Tensor,
        k: int = FOUND,
        *,
        metric: Metric = "cosine",
        exclude_self: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The search of a new instance."""
        return self.factory().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)

    def earlier(self, features: Tensor, rows: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The search for earlier tokens of a new instance."""
        return self.factory().nearest_earlier(features, rows, asked)


NEIGHBOR_CHECKS: Checks[NeighborSubject] = Checks()

_SOUND = ("interface", "shapes", "indices", "values")


def _cloud(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) + torch.randn(shape[-1], generator=generator)


def _pair() -> tuple[Tensor, Tensor]:
    return _cloud(BATCH, QUERIES, WIDTH), _cloud(BATCH, KEYS, WIDTH, seed=1)


def _all_pairs(queries: Tensor, keys: Tensor, metric: Metric) -> Tensor:
    """Similarities, or distances below zero, of every query and key: larger is nearer."""
    queries, keys = queries.double(), keys.double()
    if metric == "euclidean":
        distance: Tensor = (queries[..., :, None, :] - keys[..., None, :, :]).norm(dim=-1)
        return -distance
    one = torch.nn.functional.normalize(queries, dim=-1)
    other = torch.nn.functional.normalize(keys, dim=-1)
    cosine: Tensor = one @ other.transpose(-1, -2)
    return cosine


def _nearness(values: Tensor, metric: Metric) -> Tensor:
    return values.double() if metric == "cosine" else -values.double()


@NEIGHBOR_CHECKS.add("interface")
def check_interface(subject: NeighborSubject) -> None:
    """It is made without arguments, and has both searches."""
    try:
        backend = subject.factory()
    except TypeError as error:
        fail(f"cannot be created without arguments: {error}")
    for method in ("nearest", "nearest_earlier"):
        if not callable(getattr(backend, method, None)):
            fail(f"has no method {method}")


@NEIGHBOR_CHECKS.add("shapes", after=("interface",))
def check_shapes(subject: NeighborSubject) -> None:
    """Values are float32 and indices int64, (B, Q, k), whatever the type of the features."""
    queries, keys = _pair()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for metric in METRICS:
            values, indices = subject.nearest(queries.to(dtype), keys.to(dtype), metric=metric)
            wanted = (BATCH, QUERIES, FOUND)
            for name, tensor, kind in (
                ("values", values, torch.float32),
                ("indices", indices, torch.int64),
            ):
                if tuple(tensor.shape) != wanted or tensor.dtype != kind:
                    fail(
                        f"returned {name} {tensor.dtype} {tuple(tensor.shape)}, expected {kind} "
                        f"{wanted} ({dtype}, {metric})"
                    )


@NEIGHBOR_CHECKS.add("indices", after=("shapes",))
def check_indices(subject: NeighborSubject) -> None:
    """Indices of a query are distinct keys."""
    queries, keys = _pair()
    for k in (1, FOUND, KEYS):
        for metric in METRICS:
            indices = subject.nearest(queries, keys, k, metric=metric)[1]
            if int(indices.min()) < 0 or int(indices.max()) >= KEYS:
                fail(f"returned indices outside of [0, {KEYS}) (k={k}, {metric})")
            if bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
                fail(f"found a key twice for one query (k={k}, {metric})")


@NEIGHBOR_CHECKS.add("values", after=("indices",))
def check_values(subject: NeighborSubject) -> None:
    """Values are the cosine or the distance to the keys that were found, the nearest first."""
    queries, keys = _pair()
    for metric in METRICS:
        values, indices = subject.nearest(queries, keys, metric=metric)
        found = _nearness(values, metric)
        true = _all_pairs(queries, keys, metric).gather(2, indices)
        if not torch.allclose(found, true, atol=TOLERANCE, rtol=TOLERANCE):
            worst = float((found - true).abs().max())
            fail(f"returned values that are off by up to {worst:.3g} ({metric})")
        if bool((found.diff(dim=-1) > TOLERANCE).any()):
            fail(f"returned neighbours that are not sorted, the nearest first ({metric})")


@NEIGHBOR_CHECKS.add("recall", after=_SOUND)
def check_recall(subject: NeighborSubject) -> None:
    """It finds the true neighbours, as many of them as it promises."""
    queries, keys = _pair()
    for metric in METRICS:
        for k in (1, FOUND):
            values = _nearness(subject.nearest(queries, keys, k, metric=metric)[0], metric)
            best = _all_pairs(queries, keys, metric).topk(k).values
            share = float((values >= best - TOLERANCE * (1 + best.abs())).double().mean())
            if share < subject.recall:
                fail(
                    f"found {share:.1%} of the {k} nearest keys ({metric}), expected "
                    f"{subject.recall:.0%}"
                )


@NEIGHBOR_CHECKS.add("exclude-self", after=_SOUND)
def check_exclude_self(subject: NeighborSubject) -> None:
    """With exclude_self no token finds itself, not even where others equal it."""
    keys = _pair()[1]
    twins = torch.cat([keys, keys], dim=1)
    for name, cloud in (("tokens", keys), ("tokens with twins", twins)):
        count = cloud.shape[1]
        for k in (1, FOUND, count - 1):
            for metric in METRICS:
                indices = subject.nearest(cloud, cloud, k, metric=metric, exclude_self=True)[1]
                if bool((indices == torch.arange(count)[:, None]).any()):
                    fail(f"found a token as its own neighbour ({name}, k={k}, {metric})")


@NEIGHBOR_CHECKS.add("no-mutation", after=_SOUND)
def check_no_mutation(subject: NeighborSubject) -> None:
    """Inputs are left as they were."""
    queries, keys = _pair()
    rows = torch.arange(0, KEYS, 2)
    before = [tensor.clone() for tensor in (queries, keys, rows)]
    for metric in METRICS:
        subject.nearest(queries, keys, metric=metric)
        subject.nearest(keys, keys, metric=metric, exclude_self=True)
    subject.earlier(keys[0], rows, torch.arange(len(rows)))
    for name, tensor, kept in zip(
        ("queries", "keys", "rows"), (queries, keys, rows), before, strict=True
    ):
        if not torch.equal(tensor, kept):
            fail(f"wrote into its input {name!r}")


@NEIGHBOR_CHECKS.add("determinism", after=(*_SOUND, "no-mutation"))
def check_determinism(subject: NeighborSubject) -> None:
    """The same search gives the same bits, and draws nothing from the global random state."""
    queries, keys = _pair()
    before = torch.get_rng_state()
    try:
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            runs.append(subject.nearest(queries, keys))
            if not torch.equal(torch.get_rng_state(), state):
                fail("draws from the global random state")
            subject.nearest(keys, queries)
    finally:
        torch.set_rng_state(before)
    for one, other in zip(*runs, strict=True):
        if not torch.equal(one, other):
            fail("returned something else for the same input, called again")


@NEIGHBOR_CHECKS.add("batch-invariance", after=(*_SOUND, "no-mutation"))
def check_batch_invariance(subject: NeighborSubject) -> None:
    """An item is searched alike alone and in a batch, and finds its own keys only."""
    queries, keys = _pair()
    for metric in METRICS:
        together = subject.nearest(queries, keys, metric=metric)[1]
        for item in range(BATCH):
            one = slice(item, item + 1)
            alone = subject.nearest(queries[one], keys[one], metric=metric)[1]
            if not torch.equal(alone, together[one]):
                fail(f"found other keys for an item alone than in a batch of {BATCH} ({metric})")


@NEIGHBOR_CHECKS.add("degenerate", after=(*_SOUND, "no-mutation"))
def check_degenerate(subject: NeighborSubject) -> None:
    """One key, all keys, equal keys and zeros are searched like others."""
    queries, keys = _pair()
    for name, asked, cloud, k in (
        ("one key", queries, keys[:, :1], 1),
        ("one query", queries[:, :1], keys, FOUND),
        ("all keys", queries, keys, KEYS),
        ("equal keys", queries, keys[:, :1].expand(-1, KEYS, -1), FOUND),
        ("zeros", torch.zeros_like(queries), torch.zeros_like(keys), FOUND),
        ("strided", queries.transpose(0, 1).contiguous().transpose(0, 1), keys, FOUND),
    ):
        for metric in METRICS:
            try:
                values, indices = subject.nearest(asked, cloud, k, metric=metric)
            except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
                fail(f"raised {type(error).__name__} on {name} ({metric}): {error}")
            if tuple(indices.shape) != (BATCH, asked.shape[1], k):
                fail(f"returned indices of shape {tuple(indices.shape)} ({name}, {metric})")
            if not bool(values.isfinite().all()):
                fail(f"returned values that are not finite ({name}, {metric})")
            if bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
                fail(f"found a key twice for one query ({name}, {metric})")


@NEIGHBOR_CHECKS.add("earlier", after=("interface",))
def check_earlier(subject: NeighborSubject) -> None:
    """Each token asked about finds the most similar one before it, by its place in the rows."""
    features = _cloud(150, WIDTH)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    for name, rows, step in (
        ("all rows", torch.arange(150), 1),
        ("every second row", torch.arange(0, 150, 2), 1),
        ("rows out of order", order[:80], 1),
        ("one row", torch.tensor([7]), 1),
        ("one in three asked", order[:80], 3),
    ):
        count = len(rows)
        asked = torch.arange(0, count, step)
        values, places = subject.earlier(features, rows, asked)
        if tuple(values.shape) != (count,) or tuple(places.shape) != (count,):
            fail(f"returned shapes {tuple(values.shape)} and {tuple(places.shape)} ({name})")
        later = asked[1:]
        silent = torch.ones(count, dtype=torch.bool).index_fill(0, later, False)
        if bool((values[silent] != -torch.inf).any() | (places[silent] != -1).any()):
            fail(
                "gave the first token, which has none before it, or one that was not asked about, "
                f"a neighbour ({name})"
            )
        values, places = values[later], places[later]
        if bool((places < 0).any() | (places >= later).any()):
            fail(
                f"returned places that are not before the token's own in rows ({name}): they count "
                "places in rows, not tokens"
            )
        cosine = _all_pairs(features[rows], features[rows], "cosine")
        true = cosine[later, places]
        if not torch.allclose(values.double(), true, atol=TOLERANCE):
            fail(f"returned values that are not the cosine to the token found ({name})")
        cosine = cosine.masked_fill(torch.ones_like(cosine).triu().bool(), -torch.inf)
        share = (
            float((true >= cosine.amax(1)[later] - TOLERANCE).double().mean()) if count > 1 else 1
        )
        if share < subject.recall:
            fail(f"found {share:.1%} of the nearest ({name}), expected {subject.recall:.0%}")


@NEIGHBOR_CHECKS.add("memory", after=_SOUND)
def check_memory(subject: NeighborSubject) -> None:
    """Searching compares no pair channel by channel: nothing of queries by keys by channels."""
    cloud = _cloud(1, 512, WIDTH)
    for metric in METRICS:
        meter = metered(lambda m=metric: subject.nearest(cloud, cloud, metric=m))  # type: ignore[misc]
        if meter.largest > 2 * 512**2:
            fail(
                f"made a tensor of {meter.largest} numbers for 512 queries and keys ({metric}): "
                "take matrix products, in tiles"
            )


def run_neighbor_checks(
    backend: str | type[Any], expected_failures: Mapping[str, str] = NONE, *, recall: float = 1.0
) -> list[CheckResult]:
    """Run every check on a nearest-neighbour backend.

    Args:
        backend: a registered name, or a class.
        expected_failures: as for :func:`tokenreduce.testing.run_checks`.
        recall: share of the true neighbours that an approximate backend promises to find.

    Raises:
        UnknownName: if nothing registered the backend, or there is no such check.
    """
    return _run_of(backend, expected_failures, recall).all()


def parametrize_neighbor_checks(
    *backends: str | type[Any],
    expected_failures: Mapping[str, str] = NONE,
    recall: float = 1.0,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a pytest test of every check of every backend; see :func:`run_neighbor_checks`."""
    runs = [_run_of(backend, expected_failures, recall) for backend in backends]
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = parametrized(runs)
    return decorator


def _run_of(
    backend: str | type[Any], expected_failures: Mapping[str, str], recall: float
) -> Run[NeighborSubject]:
    subject = NeighborSubject.of(backend, recall)
    return Run(NEIGHBOR_CHECKS, subject, expected_failures, kind="neighbour backend")
