"""FAISS searches: exact search is the oracle, and approximate ones state their recall."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import tokenreduce_integrations.faiss as plugin
from tokenreduce import neighbors
from tokenreduce.errors import MissingExtra, PipelineError
from tokenreduce.neighbors import choose_backend, nearest, nearest_earlier
from tokenreduce.plugins import installed

BACKENDS = ("faiss-flat", "faiss-ivf", "faiss-hnsw")
#: What the searches of this file reach at least, as in docs/long_video.md.
RECALL = {"faiss-flat": 0.999, "faiss-ivf": 0.9, "faiss-hnsw": 0.9}

if "faiss-ivf" not in installed().neighbor_backends:
    installed().load("faiss", plugin)
needs_faiss = pytest.mark.skipif(not find_spec("faiss"), reason="the extra 'faiss' is missing")


def cloud(count: int, channels: int = 96, *, seed: int = 0) -> torch.Tensor:
    """Tokens around common directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, channels, generator=generator)
    which = torch.randint(40, (count,), generator=generator)
    return centres[which] + 0.5 * torch.randn(count, channels, generator=generator)


@needs_faiss
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_nearest_finds_what_exact_search_finds(backend, metric, exclude_self) -> None:
    keys = torch.stack([cloud(1500), cloud(1500, seed=1)])
    queries = keys if exclude_self else keys[:, :200] + 0.1
    options = {"metric": metric, "exclude_self": exclude_self}
    values, places = nearest(queries, keys, 3, backend=backend, **options)
    expected, exact = nearest(queries, keys, 3, **options)
    assert places.shape == exact.shape
    assert values.dtype == torch.float32
    hits = (places[..., None] == exact[:, :, None]).any(-1)
    assert hits.float().mean() >= RECALL[backend]
    own = torch.arange(places.shape[1])[:, None]
    assert not (exclude_self and bool((places == own).any()))
    assert all(len(set(row)) == 3 for row in places[0].tolist())
    right = (places == exact).all(-1)
    torch.testing.assert_close(values[right], expected[right], rtol=1e-4, atol=1e-4)
    order = values.diff(dim=-1)
    assert bool((order <= 0).all() if metric == "cosine" else (order >= 0).all())


@needs_faiss
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [32, 256])
def test_nearest_earlier_finds_what_exact_search_finds(backend, channels) -> None:
    features = cloud(2600, channels)
    features[7] = 0
    features[2000] = features[3]
    rows = torch.arange(0, 2600, 2)
    expected, exact = nearest_earlier(features, rows, backend="torch")
    value, place = nearest_earlier(features, rows, backend=backend)
    assert place[0] == -1
    assert value[0] == -torch.inf
    assert bool((place < torch.arange(len(rows))).all())
    assert bool((value <= expected + 1e-5).all())
    assert (place == exact).float().mean() >= 0.85
    again = nearest_earlier(features, rows, backend=backend)
    assert again[1].equal(place)


@needs_faiss
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_keys(backend) -> None:
    keys = cloud(5)[None]
    values, places = nearest(keys, keys, 4, exclude_self=True, backend=backend)
    assert places.sort(-1).values.tolist() == [[[j for j in range(5) if j != i] for i in range(5)]]
    assert bool(values.isfinite().all())
    _, place = nearest_earlier(keys[0], torch.arange(5), backend=backend)
    assert place.tolist() == nearest_earlier(keys[0], torch.arange(5), backend="torch")[1].tolist()
    assert nearest(keys[:, :0], keys, 2, backend=backend)[1].shape == (1, 0, 2)


@needs_faiss
def test_auto_is_exact_for_few_tokens_and_faiss_for_many() -> None:
    assert choose_backend(1000, "cpu") == "torch"
    assert choose_backend(10**6, "cpu") == "faiss-ivf"
    assert choose_backend(10**6, "meta") == "torch"


def test_auto_goes_by_the_comparisons_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []
    monkeypatch.setattr(
        neighbors, "choose_backend", lambda keys, device: asked_for.append(keys) or "torch"
    )
    features, rows = torch.randn(100, 4), torch.arange(100)
    nearest_earlier(features, rows)
    nearest_earlier(features, rows, asked=torch.arange(50, 100))
    nearest_earlier(features, rows, asked=torch.arange(0))
    assert asked_for == [99, 74, 0]


@needs_faiss
@pytest.mark.parametrize("order", ["import torch, faiss", "import faiss, torch"])
def test_both_libraries_live_in_one_process(order) -> None:
    check = (
        f"{order}\n"
        "from tokenreduce import nearest\n"
        "x = torch.nn.functional.normalize(torch.randn(1, 300, 16), dim=-1)\n"
        "y = x @ x.transpose(1, 2)\n"
        "assert nearest(x, x, backend='faiss-flat')[1][0, :, 0].equal(torch.arange(300))\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_faiss
def test_a_device_without_an_index_is_refused() -> None:
    from tokenreduce_integrations.faiss.search import GraphSearch

    with pytest.raises(PipelineError, match="no graph index"):
        GraphSearch()._open(8, 10, 0, torch.device("cuda"))


def test_without_the_package_the_command_is_given(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for name in list(sys.modules):
        if name.startswith("tokenreduce_integrations.faiss."):
            monkeypatch.delitem(sys.modules, name)
    tokens = cloud(10)[None]
    assert choose_backend(10**6, "cpu") == "torch"
    with pytest.raises(MissingExtra, match=r"pip install '.+\[faiss\]'"):
        nearest(tokens, tokens, backend="faiss-ivf")


@pytest.mark.gpu
@needs_faiss
@pytest.mark.parametrize("backend", ["faiss-flat", "faiss-ivf"])
def test_as_on_the_cpu(backend) -> None:
    features = cloud(3000, 256)
    rows = torch.arange(3000)
    value, place = nearest_earlier(features.cuda(), rows.cuda(), backend=backend)
    assert value.is_cuda
    exact = nearest_earlier(features, rows, backend="torch")
    assert (place.cpu() == exact[1]).float().mean() >= 0.85
    keys = features[None].cuda()
    assert (nearest(keys, keys, backend=backend)[1].cpu()[0, :, 0] == rows).float().mean() >= 0.99
