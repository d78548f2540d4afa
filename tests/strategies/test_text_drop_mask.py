"""ADEM-VL's drop mask: what each word leaves out, word by word and token by token."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies.text_drop_mask import TextDropMask


def image(n=40, words=3, seed=0, width=8):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, n, 8, generator=generator)
    text = torch.randn(1, words, width, generator=generator)
    return VisualTokens.from_grid(features, (1, n), signals={"prompt_embeddings": text})


def silu(x):
    return x / (1 + (-x).exp())


def similarity(tokens):
    """``a[l][i]``, in float64."""
    words, visual = tokens.signal("prompt_embeddings")[0], tokens.features[0]
    return [[float((silu(t.double()) * silu(x.double())).sum()) for x in visual] for t in words]


def left_out(row, count):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return set(order[len(row) - count :])


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 0.6, 0.9])
@pytest.mark.parametrize("words", [1, 3])
def test_without_a_budget_what_all_words_leave_out_goes(share, words):
    tokens = image(words=words)
    a = similarity(tokens)
    count = int((0.1 if share is None else share) * 40)
    unread = set.intersection(*(left_out(row, count) for row in a))
    reduction = TextDropMask(share=share)(tokens)
    assert reduction.positions[0].tolist() == [i for i in range(40) if i not in unread]
    # The masked attention of each word reads the same as before.
    for row in a:
        masked = left_out(row, count)
        before = sum(row[i] * tokens.features[0, i].double() for i in set(range(40)) - masked)
        kept = set(reduction.positions[0].tolist())
        after = sum(row[i] * tokens.features[0, i].double() for i in kept - masked)
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("k", [1, 7, 25, 39])
def test_with_a_budget_what_most_words_leave_in_stays(share, k):
    tokens = image(words=5, seed=k)
    a = similarity(tokens)
    count = 40 - k if share is None else int(share * 40)
    masks = [left_out(row, count) for row in a]
    votes = [sum(i not in mask for mask in masks) for i in range(40)]
    mean = [sum(row[i] for row in a) / 5 for i in range(40)]
    best = sorted(range(40), key=lambda i: (-votes[i], -mean[i], i))[:k]
    assert TextDropMask(keep=k, share=share)(tokens).positions[0].tolist() == sorted(best)


def test_one_word_keeps_its_best():
    tokens = image(words=1)
    [row] = similarity(tokens)
    expected = sorted(sorted(range(40), key=lambda i: -row[i])[:10])
    assert TextDropMask(keep=10)(tokens).positions[0].tolist() == expected


def test_every_count_is_met():
    # A share that follows from a budget rounds without error.
    for k in range(1, 49):
        tokens = image(n=49, words=1)
        [row] = similarity(tokens)
        expected = sorted(range(49), key=lambda i: -row[i])[:k]
        assert TextDropMask(keep=k)(tokens).positions[0].tolist() == sorted(expected)


def test_refusals():
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(PipelineError, match="share"):
            TextDropMask(share=share)
    with pytest.raises(TokensError, match="12 channels cannot be compared"):
        TextDropMask(keep=3)(image(width=12))
