"""Neighbour search with FAISS."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_neighbor_backends(register: Register) -> None:
    """The three kinds of index."""
    for name, kind, summary in (
        ("faiss-flat", "FlatSearch", "exact for nearest; CPU and GPU"),
        ("faiss-ivf", "InvertedListSearch", "inverted lists; approximate; CPU and GPU"),
        ("faiss-hnsw", "GraphSearch", "a graph of neighbours; approximate; CPU"),
    ):
        register(
            name,
            f"tokenreduce_integrations.faiss.search:{kind}",
            summary=summary,
            extra="faiss",
        )
