"""Strategies equal the authors' code on recorded cases. A missing case fails."""

import pytest

from tokenreduce import VisualTokens
from tokenreduce_strategies.divprune import DivPrune
from tokenreduce_strategies.tome import ToMe, merge_round


@pytest.mark.parametrize("case", ["n144_k16", "n256_k128", "n576_k64"])
def test_divprune(parity_case, case):
    case = parity_case(f"divprune/{case}")
    tokens = VisualTokens.from_grid(case.inputs["features"], (1, len(case.inputs["features"])))
    keep = case.parameters["keep"]
    strategy = DivPrune(keep=keep)
    case.check(
        kept_indices=strategy.select(tokens, keep)[0],
        kept_indices_sorted=strategy(tokens).positions[0],
    )


@pytest.mark.parametrize("case", ["n196_r40", "n197_cls_r50", "b2_n256_r128_sizes"])
def test_tome_round(parity_case, case):
    case = parity_case(f"tome/{case}")
    features, keys = case.inputs["features"], case.inputs["keys"]
    sizes = case.inputs.get("sizes", features.new_ones(features.shape[:2]))
    done = merge_round(
        features, keys, sizes, case.parameters["r"], class_token=case.parameters["class_token"]
    )
    case.check(
        assignment=done.groups,
        merged_features=done.features,
        sizes=done.sizes,
        unmerged_indices=done.stays[:, : case.expected["unmerged_indices"].shape[1]],
    )


def test_tome_is_its_round(parity_case):
    case = parity_case("tome/n196_r40")
    features = case.inputs["features"]
    tokens = VisualTokens.from_grid(features, (14, 14))
    done = merge_round(features, features, tokens.sizes, 40)
    reduction = ToMe(keep=156)(tokens)
    order = done.stays.argsort(dim=1)[0]
    assert reduction.positions[0].equal(done.stays[0, order])
    assert reduction.features.equal(done.features[:, order])
    assert reduction.group_sizes().equal(done.sizes[:, order])
