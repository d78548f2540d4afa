"""PruneSID: oracles in the notation of the paper."""

from math import ceil

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce_strategies import prunesid
from tokenreduce_strategies.prunesid import PruneSID, choose, component_groups, quotas, suppress

TIE = 2.5e-7


def slow_survivors(x, a, groups, factor):
    """Suppression within groups, token by token."""
    n = len(x)
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    cosine = (unit @ unit.T).tolist()
    mean = sum(cosine[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    survivors = []
    for i in sorted(range(n), key=lambda i: (-float(a[i]), i)):
        rivals = [j for j in survivors if groups[j] == groups[i]]
        if all(cosine[i][j] <= factor * mean + TIE for j in rivals):
            survivors.append(i)
    return survivors


def slow_choice(a, groups, survivors, k, total):
    """Quotas, then survivors first, then by attention."""
    n, kept = len(a), []
    members = {g: [i for i in range(n) if groups[i] == g] for g in sorted(set(groups))}
    found = {g: sum(i in survivors for i in m) for g, m in members.items()}
    extra = 0
    while True:
        limit = {
            g: min(min(5 * ceil(k / 64), found[g]) + extra, len(m)) for g, m in members.items()
        }
        if sum(limit.values()) >= total:
            break
        extra += 1
    spare, before, quota = total - len(members), 0, {}
    for g in members:
        after = before + found[g]
        first, last = (round(spare * part / sum(found.values())) for part in (before, after))
        quota[g], before = min(limit[g], 1 + last - first), after
    while sum(quota.values()) < total:
        for g in sorted(members, key=lambda g: (-found[g], g)):
            if quota[g] < limit[g] and sum(quota.values()) < total:
                quota[g] += 1
    for g, m in members.items():
        m.sort(key=lambda i: (i not in survivors, -float(a[i]), i))
        kept += m[: quota[g]]
    return sorted(kept)


@quick
@given(clouds(min_tokens=2, max_tokens=16, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    batch, n, _ = cloud.shape
    count = data.draw(st.integers(1, 4))
    k = data.draw(st.integers(min(count, n - 1), n - 1))
    factor = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    attention = torch.rand(batch, n, generator=generator)
    groups = torch.randint(0, min(count, k), (batch, n), generator=generator)
    survives = suppress(cloud, attention, groups, factor=factor)
    kept = choose(attention, groups, survives, k, k)
    for b in range(batch):
        survivors = slow_survivors(cloud[b], attention[b], groups[b].tolist(), factor)
        assert survives[b].nonzero().flatten().tolist() == sorted(survivors)
        expected = slow_choice(attention[b], groups[b].tolist(), survivors, k, k)
        assert sorted(kept[b].tolist()) == expected


def test_components_are_the_leading_ones():
    generator = torch.Generator().manual_seed(0)
    # Five components, each of its own strength.
    strength = torch.tensor([16.0, 8, 4, 2, 1])
    mixed = torch.randn(1, 90, 5, generator=generator) * strength
    logits = mixed @ torch.linalg.qr(torch.randn(40, 5, generator=generator)).Q.T / 8
    x = logits.sigmoid()
    x = (x - x.mean(2, keepdim=True))[0].double()
    left = torch.linalg.svd(x).U[:, :5]
    share = (component_groups(logits, 5)[0] == left.abs().argmax(1)).float().mean()
    assert share > 0.9


def test_quotas_add_up():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 12, (8,), generator=generator).tolist()
        found = [min(size, 1 + size // 3) for size in sizes]
        low = max(1, sum(size > 0 for size in sizes))
        for total in range(low, sum(sizes) + 1):
            quota = quotas(sizes, found, total, total)
            assert sum(quota) == total
            assert all(q <= size for q, size in zip(quota, sizes, strict=True))
            assert all(q >= 1 for q, size in zip(quota, sizes, strict=True) if size)


def test_official_counts_the_class_token():
    features = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(0))
    signals = {"class_attention": torch.rand(1, 200)}
    tokens = VisualTokens.from_grid(features, (10, 20), signals=signals)
    assert PruneSID(keep=64, official=True)(tokens).kept == 63
    assert PruneSID(keep=64, official=True).count_class == "layout"


def test_without_a_gram_matrix(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    signals = {"class_attention": torch.rand(2, 70, generator=generator)}
    features = torch.randn(2, 70, 16, generator=generator)
    tokens = VisualTokens.from_grid(features, (7, 10), signals=signals)
    whole = PruneSID(keep=24)(tokens).positions
    monkeypatch.setattr(prunesid, "GRAM_LIMIT", 69)
    assert PruneSID(keep=24)(tokens).positions.equal(whole)


def test_half_shares_go_to_the_even_number():
    # Of 5 spare tokens half are 2.5: the first group gets 2 beside its own one.
    assert quotas([10, 10], [5, 5], 8, 7) == [3, 4]
