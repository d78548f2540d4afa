"""How large a matrix of tokens by tokens may be."""

from tokenreduce.errors import TokensError

#: Most tokens whose pairwise matrix is held: 16384 need 1 GiB in float32.
MATRIX_LIMIT = 16384


def require_matrix(tokens: int, what: str) -> None:
    """Check that a matrix of tokens by tokens fits.

    Raises:
        TokensError: if there are more than :data:`MATRIX_LIMIT`.
    """
    if tokens > MATRIX_LIMIT:
        raise TokensError(
            f"{what} of {tokens} tokens need a matrix of that size squared, and no more than "
            f"{MATRIX_LIMIT} tokens are compared at once. Cut the item up (per_tile, per_segment), "
            "or use a strategy of cost 'score', such as evs or vcast."
        )
