"""The built-in strategies, one file each."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_strategies(register: Register) -> None:
    """Register the built-in strategies."""
    here = "tokenreduce_strategies"
    register(
        "lftr",
        f"{here}.lftr:LFTR",
        summary="Merges along time, groups around representatives, drops what says least.",
        kind="merge",
        cost="neighbor",
        parity="none",
        paper="2501.17391",
    )
    register(
        "norm-topk",
        f"{here}.norm_topk:NormTopK",
        summary="Keeps the tokens of largest norm.",
        kind="prune",
        cost="score",
        parity="none",
    )
    register(
        "divprune",
        f"{here}.divprune:DivPrune",
        summary="Keeps the most diverse tokens: greedy max-min cosine distance.",
        kind="prune",
        cost="greedy",
        parity="official",
        paper="2503.02175",
    )
    register(
        "tome",
        f"{here}.tome:ToMe",
        summary="Merges similar tokens by rounds of bipartite soft matching.",
        kind="merge",
        cost="bipartite",
        parity="official",
        paper="2210.09461",
    )
    register(
        "random",
        f"{here}.random_keep:RandomKeep",
        summary="Control: keeps random tokens, seeded by content.",
        kind="prune",
        cost="score",
    )
    register(
        "uniform",
        f"{here}.uniform:Uniform",
        summary="Control: keeps evenly spaced tokens.",
        kind="prune",
        cost="score",
    )
    register(
        "avg-pool",
        f"{here}.avg_pool:AvgPool",
        summary="Control: averages neighbouring tokens of the grid.",
        kind="merge",
        count="layout",
        cost="score",
        needs_grid=True,
    )
    register(
        "bilinear-pool",
        f"{here}.bilinear_pool:BilinearPool",
        summary="Resizes the token grid by bilinear interpolation.",
        kind="merge",
        count="layout",
        cost="score",
        needs_grid=True,
        paper="2602.05275",
    )
    for name, wrapper, summary, count in (
        ("per-frame", "PerFrame", "Applies an image strategy to each frame.", "exact"),
        ("per-tile", "PerTile", "Applies a strategy to each tile or crop.", "exact"),
        ("per-segment", "PerSegment", "Applies a video strategy to runs of frames.", "exact"),
        ("chain", "Chain", "Applies strategies one after another.", "adaptive"),
    ):
        register(
            name,
            f"tokenreduce.wrappers:{wrapper}",
            summary=summary,
            kind="merge",
            count=count,
            wraps=True,
        )
