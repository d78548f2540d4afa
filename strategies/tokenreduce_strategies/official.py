"""What the options ``official=True`` have in common: ratios as the authors' code reads them."""

from tokenreduce.reducer import Reducer


def stated_ratio(reducer: Reducer, tokens: int) -> float:
    """The share of ``tokens`` to keep, as the user stated it, before any rounding."""
    if reducer.keep_ratio is not None:
        return float(reducer.keep_ratio)
    if reducer.reduction is not None:
        return 1 / float(reducer.reduction)
    return reducer.count(tokens) / tokens
