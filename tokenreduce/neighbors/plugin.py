"""Registration of the built-in neighbour backend."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_neighbor_backends(register: Register) -> None:
    """The exact backend."""
    register(
        "torch",
        "tokenreduce.neighbors.exact:ExactSearch",
        summary="exact, tiled, on any device that torch runs on",
    )
