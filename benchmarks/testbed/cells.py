"""Values as the cells of the tables in the results pages have them."""


def percent(value: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * value:.1f}"


def interval(estimate: dict[str, float]) -> str:
    """A value with its interval, in percent."""
    return f"{percent(estimate['value'])} [{percent(estimate['low'])}, {percent(estimate['high'])}]"


def difference(estimate: dict[str, float] | None) -> str:
    """A difference in points with its interval."""
    if estimate is None:
        return "-"
    value, low, high = (100 * estimate[end] for end in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
