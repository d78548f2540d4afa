"""Registration of HiPrune; read whenever strategies are listed."""

from tokenreduce import hookimpl

#: The version of the plugin interface that this package was written for.
tokenreduce_api = 1


@hookimpl
def register_strategies(register):
    """HiPrune."""
    register(
        "hiprune",
        "tokenreduce_hiprune.hiprune:HiPrune",
        summary="Keeps attended tokens of a middle layer, their neighbours, and deep ones.",
        kind="prune",
        cost="score",
        needs=("received_attention", "shallow_class_attention"),
        needs_grid=True,
        parity="official",
        paper="2508.00553",
    )
