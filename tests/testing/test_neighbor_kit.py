"""Neighbour backends broken on purpose, each caught by exactly the check that is meant to."""

import pytest
import torch

from support.defects import Defects
from tokenreduce.errors import RegistrationError, UnknownName
from tokenreduce.neighbors.exact import ExactSearch
from tokenreduce.testing import CheckFailed, parametrize_neighbor_checks, run_neighbor_checks
from tokenreduce.testing.neighbors import NEIGHBOR_CHECKS

BROKEN = Defects()
caught_by = BROKEN.caught_by


@caught_by("interface")
class NeedsArguments(ExactSearch):
    def __init__(self, lists):
        self.lists = lists


@caught_by("interface")
class OneSearchOnly:
    nearest = ExactSearch.nearest


@caught_by("shapes")
class AnswersInHalf(ExactSearch):
    def nearest(self, queries, keys, k, *, metric, exclude_self):
        value, index = super().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)
        return value.to(queries.dtype), index


@caught_by("shapes")
class SmallIndices(ExactSearch):
    def nearest(self, queries, keys, k, **options):
        value, index = super().nearest(queries, keys, k, **options)
        return value, index.int()


@caught_by("indices")
class FindsTheBestAgain(ExactSearch):
    def nearest(self, queries, keys, k, **options):
        value, index = super().nearest(queries, keys, k, **options)
        return value[..., :1].expand_as(value), index[..., :1].expand_as(index)


@caught_by("values")
class SquaredDistances(ExactSearch):
    def nearest(self, queries, keys, k, *, metric, exclude_self):
        value, index = super().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)
        return (value if metric == "cosine" else value.square()), index


@caught_by("values")
class ForgetsToNormalize(ExactSearch):
    def nearest(self, queries, keys, k, *, metric, exclude_self):
        value, index = super().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)
        if metric == "cosine":
            item = torch.arange(len(keys))[:, None, None]
            value = (queries[:, :, None] * keys[item, index]).float().sum(-1)
        return value, index


@caught_by("values")
class FarthestFirst(ExactSearch):
    def nearest(self, queries, keys, k, **options):
        value, index = super().nearest(queries, keys, k, **options)
        return value.flip(-1), index.flip(-1)


@caught_by("recall")
class LooksAtHalfOfTheKeys(ExactSearch):
    def nearest(self, queries, keys, k, **options):
        half = keys.shape[1] // 2
        wide = keys[:, :half] if k <= half - 1 and not options["exclude_self"] else keys
        return super().nearest(queries, wide, k, **options)


@caught_by("exclude-self")
class ExcludesByValue(ExactSearch):
    """Leaves out the first that is found, which need not be the token itself."""

    def nearest(self, queries, keys, k, *, metric, exclude_self):
        if not exclude_self:
            return super().nearest(queries, keys, k, metric=metric, exclude_self=False)
        value, index = super().nearest(queries, keys, k + 1, metric=metric, exclude_self=False)
        return value[..., 1:], index[..., 1:]


@caught_by("no-mutation")
class NormalizesTheKeys(ExactSearch):
    def nearest(self, queries, keys, k, *, metric, exclude_self):
        if metric == "cosine":
            keys.div_(keys.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        return super().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)


@caught_by("determinism")
class DrawsAProjection(ExactSearch):
    def nearest(self, queries, keys, k, **options):
        torch.randn(3)
        return super().nearest(queries, keys, k, **options)


@caught_by("batch-invariance")
class BreaksTiesByBatch(ExactSearch):
    """Reverses the order of neighbours that differ by less than rounding explains, in a batch."""

    def nearest(self, queries, keys, k, **options):
        value, index = super().nearest(queries, keys, k, **options)
        if len(keys) > 1 and k > 1:
            close = (value[..., :-1] - value[..., 1:]).abs() < 5e-4
            first = (close & (close.long().cumsum(-1) == 1)).long()
            order = torch.arange(k).expand_as(index).clone()
            order[..., :-1] += first
            order[..., 1:] -= first
            index = index.gather(-1, order)
        return value, index


@caught_by("degenerate")
class DividesByTheNorm(ExactSearch):
    def nearest(self, queries, keys, k, *, metric, exclude_self):
        value, index = super().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)
        norm = queries.float().norm(dim=-1, keepdim=True)
        return value * (norm / norm), index


@caught_by("degenerate")
class ViewsItsInput(ExactSearch):
    def nearest(self, queries, keys, k, **options):
        queries.view(-1, queries.shape[-1])
        return super().nearest(queries, keys, k, **options)


@caught_by("earlier")
class CountsTokens(ExactSearch):
    def nearest_earlier(self, features, rows, asked):
        value, place = super().nearest_earlier(features, rows, asked)
        return value, torch.where(place < 0, place, rows[place])


@caught_by("earlier")
class FindsItself(ExactSearch):
    def nearest_earlier(self, features, rows, asked):
        return torch.ones(len(rows)), torch.arange(len(rows))


@caught_by("earlier")
class LooksAtTheOneBefore(ExactSearch):
    def nearest_earlier(self, features, rows, asked):
        unit = torch.nn.functional.normalize(features[rows], dim=-1)
        value = torch.cat([torch.tensor([-torch.inf]), (unit[1:] * unit[:-1]).sum(-1)])
        return value, torch.arange(len(rows)) - 1


@caught_by("earlier")
class AnswersForAll(ExactSearch):
    def nearest_earlier(self, features, rows, asked):
        return super().nearest_earlier(features, rows, torch.arange(len(rows)))


@caught_by("memory")
class Broadcasts(ExactSearch):
    def nearest(self, queries, keys, k, *, metric, exclude_self):
        if metric == "euclidean":
            (queries[:, :, None] - keys[:, None]).square()
        return super().nearest(queries, keys, k, metric=metric, exclude_self=exclude_self)


@pytest.mark.parametrize("name", BROKEN)
def test_caught_by_exactly_the_right_check(name):
    backend, expected = BROKEN[name]
    results = run_neighbor_checks(backend)
    failed = {result.check: result.detail for result in results if result.outcome == "failed"}
    assert set(failed) == expected, failed
    for result in results:
        if result.error is not None:
            assert isinstance(result.error, CheckFailed)
            assert f"neighbour backend '{name}'" in str(result.error)


def test_every_check_is_explained():
    for name, check in NEIGHBOR_CHECKS.items():
        assert check.name == name
        assert check.meaning.endswith(".")
        assert set(check.after) <= set(NEIGHBOR_CHECKS)


@parametrize_neighbor_checks("torch", ExactSearch)
def test_the_exact_search_is_sound(check):
    check()


def test_approximate_backends_promise_a_recall():
    half = BROKEN["LooksAtHalfOfTheKeys"][0]
    assert all(result.ok for result in run_neighbor_checks(half, recall=0.02))


def test_expected_failures_are_strict():
    half = BROKEN["LooksAtHalfOfTheKeys"][0]
    results = {r.check: r for r in run_neighbor_checks(half, {"recall": "half of the keys"})}
    assert results["recall"].outcome == "expected failure"
    results = {r.check: r for r in run_neighbor_checks("torch", {"recall": "thought so"})}
    assert results["recall"].outcome == "failed"


def test_unknown_names():
    with pytest.raises(UnknownName, match="torch"):
        run_neighbor_checks("torhc")
    with pytest.raises(UnknownName, match="recall"):
        run_neighbor_checks("torch", {"recal": "no such check"})
    with pytest.raises(RegistrationError, match="a name or a class"):
        run_neighbor_checks(3)
