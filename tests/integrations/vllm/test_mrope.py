"""Positions in time, height and width of reduced prompts, before and after encoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenreduce_integrations.vllm import mrope
from tokenreduce_integrations.vllm.mrope import Span

#: Three words, an image of 2 x 3 of which two stay, two words, one of 1 x 2 that stays, a word.
SPANS = (Span(offset=3, kept=2, full=6), Span(offset=7, kept=2, full=2))
LENGTH = 10


def whole_positions() -> Tensor:
    """``(3, 14)`` by the rule of Qwen2-VL: text goes on after the greatest position."""
    parts, at = [], 0
    for words, (rows, columns) in ((3, (2, 3)), (2, (1, 2)), (1, (0, 0))):
        parts.append(torch.arange(at, at + words).expand(3, -1))
        at += words
        if rows:
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            parts.append(torch.stack([torch.zeros_like(y), y, x]).reshape(3, -1) + at)
            at += max(rows, columns)
    return torch.cat(parts, dim=1)


def test_items_begin_further_on_before_reduction() -> None:
    assert mrope.written_out(SPANS) == [3, 11]


def test_text_is_final_and_items_wait_at_their_base() -> None:
    waiting = mrope.waiting_positions(whole_positions(), SPANS, LENGTH)
    assert waiting.tolist() == [[0, 1, 2, 3, 3, 6, 7, 8, 8, 10]] * 3


def test_a_prompt_of_text_alone_is_as_it_was() -> None:
    positions = torch.arange(5).expand(3, -1)
    assert torch.equal(mrope.waiting_positions(positions, (), 5), positions)


def test_encoded_rows_settle_where_they_stood() -> None:
    whole = whole_positions()
    waiting = mrope.waiting_positions(whole, SPANS, LENGTH)
    relative = (whole[:, 3:9] - whole[:, 3:4]).T
    columns = torch.tensor([3, 4])
    settled = mrope.settled_positions(waiting, waiting, columns, relative[[1, 5]])
    assert torch.equal(settled[:, 3:5], whole[:, [4, 8]])
    untouched = [0, 1, 2, 5, 6, 7, 8, 9]
    assert torch.equal(settled[:, untouched], waiting[:, untouched])
    again = mrope.settled_positions(settled, waiting, columns, relative[[1, 5]])
    assert torch.equal(again, settled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_hold_positions_exactly(dtype: torch.dtype) -> None:
    features = torch.randn(4, 5).to(dtype)
    relative = torch.tensor([[0, 1, 2], [255, 256, 257], [1001, 4095, 65535], [70_000, 3, 0]])
    rows = mrope.with_positions(features, relative, extent=70_001)
    assert rows.shape == (4, 5 + mrope.CHANNELS)
    assert rows.dtype == dtype
    bare, values = mrope.without_positions(rows)
    assert torch.equal(bare, features)
    assert torch.equal(values[:, :3], relative)
    assert values[:, 3].tolist() == [70_001] * 4
