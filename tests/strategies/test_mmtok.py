"""MMTok: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies.mmtok import MMTok

TIE = 2.5e-7


def slow(x, t, v, k, alpha=0.5, text_temperature=0.01, image_temperature=0.2):
    """Greedy maximum coverage of words and patches, by definition; times N, as ties are told."""
    n, words = len(x), len(t)
    x, t, v = (torch.nn.functional.normalize(part.double(), dim=-1, eps=1e-8) for part in (x, t, v))
    rows = torch.cat(
        [
            ((t @ x.T) / text_temperature).softmax(1) / words,
            ((v @ v.T) / image_temperature).softmax(1) * alpha / n,
        ]
    )
    rows, picked, covered = rows * n, [], torch.zeros(words + n).double()
    while len(picked) < k:
        gain = (rows - covered[:, None]).clamp(min=0).sum(0)
        gain[picked] = -1
        tie = TIE * max(1.0, float(gain.max()))
        picked.append(int((gain >= gain.max() - tie).nonzero()[0]))
        covered = torch.maximum(covered, rows[:, picked[-1]])
    return picked


def tokens_of(cloud, seed=0, words=3, **signals):
    generator = torch.Generator().manual_seed(seed)
    signals["prompt_embeddings"] = torch.randn(
        cloud.shape[0], words, cloud.shape[2], generator=generator
    )
    return VisualTokens.from_grid(cloud, (1, cloud.shape[1]), signals=signals)


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    # Not too sharp: float32 tells apart what the temperature blows up.
    options = {
        "alpha": data.draw(st.sampled_from([0.0, 0.5, 2.0])),
        "text_temperature": data.draw(st.sampled_from([0.2, 1.0])),
    }
    own = torch.randn(*cloud.shape[:2], 5, generator=torch.Generator().manual_seed(3))
    image = data.draw(st.sampled_from(["", "vision_features"]))
    tokens = tokens_of(cloud, data.draw(st.integers(0, 100)), vision_features=own)
    picks = MMTok(keep=k, image=image, **options).select(tokens, k)
    text = tokens.signal("prompt_embeddings")
    v = own if image else cloud
    expected = [slow(*item, k, **options) for item in zip(cloud, text, v, strict=True)]
    assert picks.tolist() == expected


def test_another_width():
    cloud = torch.randn(1, 9, 4)
    tokens = VisualTokens.from_grid(
        cloud, (3, 3), signals={"prompt_embeddings": torch.randn(1, 2, 5)}
    )
    with pytest.raises(TokensError, match="LLM's space"):
        MMTok(keep=3)(tokens)


@pytest.mark.parametrize(
    "options", [{"alpha": -1.0}, {"text_temperature": 0.0}, {"image_temperature": 0.01}]
)
def test_options(options):
    with pytest.raises(PipelineError):
        MMTok(keep=4, **options)
