"""VTW and DyVTE: all visual tokens, or none."""

import pytest
import torch
from safetensors.torch import save_file

from tokenreduce import PackedTokens, VisualTokens, reduce_packed
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce_strategies.dyvte import DyVTE
from tokenreduce_strategies.vtw import VTW


def image(states=None, batch=2):
    features = torch.randn(batch, 12, 4, generator=torch.Generator().manual_seed(0))
    signals = {} if states is None else {"prompt_states": states}
    return VisualTokens.from_grid(features, (3, 4), signals=signals)


@pytest.mark.parametrize("budget", [{}, {"keep": 0}])
def test_withdraws_all(budget):
    reduction = VTW(**budget)(image())
    assert reduction.kept == 0
    assert (reduction.assignment == -1).all()


def test_takes_no_other_budget():
    with pytest.raises(BudgetError, match="fastv"):
        VTW(keep=3)
    with pytest.raises(BudgetError, match="no budget"):
        DyVTE(keep_ratio=0.5)


@pytest.fixture
def router(tmp_path):
    """Votes exit where the first channel of the last state exceeds that of the mean."""
    first = torch.zeros(2, 8)
    first[0, 0], first[1, 4] = 1, 1
    path = tmp_path / "router.safetensors"
    save_file({"fc1.weight": first, "fc2.weight": torch.eye(2)}, path)
    return str(path)


def test_router(router):
    strategy = DyVTE(weights=router)
    strategy.prepare(torch.device("cpu"), torch.float32)
    rising, falling = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]])
    states = torch.stack([rising, falling]).expand(2, 2, 4).contiguous()
    exits, stays = (image(states).item(i) for i in range(2))
    assert strategy(exits).kept == 0
    kept = strategy(stays)
    assert kept.kept == 12
    assert kept.reason == "the router votes to stay"
    packed = reduce_packed(PackedTokens.from_items([exits, stays]), [strategy] * 2)
    assert [one.kept for one in packed] == [0, 12]
    with pytest.raises(PipelineError, match="1 of 2"):
        strategy(image(states))


def test_weights_are_needed(router, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(PipelineError, match="or use vtw"):
        DyVTE().prepare(cpu, torch.float32)
    with pytest.raises(PipelineError, match="cannot be read"):
        DyVTE(weights=str(tmp_path / "none.safetensors")).prepare(cpu, torch.float32)
    with pytest.raises(PipelineError, match=r"'fc1.weight' of shape any x 6, got \(2, 8\)"):
        DyVTE(weights=router)(image(torch.zeros(2, 2, 3)))
    other = tmp_path / "other.safetensors"
    save_file({"fc1.weight": torch.zeros(2, 8)}, other)
    with pytest.raises(PipelineError, match="no such tensor"):
        DyVTE(weights=str(other)).prepare(cpu, torch.float32)
