"""Feature clouds for property tests: random, duplicated, tied and degenerate ones."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Reproducible, and quick enough to run on every commit.
quick = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def clouds(draw, *, min_tokens=1, max_tokens=12, dtypes=DTYPES):
    """``(B, N, D)`` features, contiguous or not."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(min_tokens, max_tokens))
    channels, seed = draw(st.integers(1, 6)), draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["random", "duplicates", "small integers", "zeros", "equal"]))
    generator = torch.Generator().manual_seed(seed)
    if kind == "small integers":
        shape = (batch, n, channels)
        features = torch.randint(-2, 3, shape, generator=generator).float()
    else:
        features = torch.randn(batch, n, channels, generator=generator)
    if kind == "duplicates":
        features = features[:, torch.randint(0, n, (n,), generator=generator) // 2]
    elif kind in ("zeros", "equal"):
        features = torch.full_like(features, float(kind == "equal"))
    features = features.to(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):
        features = torch.stack([features, features + 1], dim=-1)[..., 0]
    return features
