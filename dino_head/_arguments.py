"""Argument checks, with messages that name the given and the expected value."""

from numbers import Integral, Real


def check_integer(name: str, value: object, minimum: int, hint: str = "") -> None:
    """Raise ValueError unless `value` is an integer (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}{hint}, got {value!r}")


def check_number(name: str, value: object, minimum: float, maximum: float, *, exclude_minimum: bool = False) -> None:
    """Raise ValueError unless `value` is a number in [minimum, maximum], or (minimum, maximum]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not minimum <= float(value) <= maximum
        or (exclude_minimum and float(value) == minimum)
    ):
        interval = f"{'(' if exclude_minimum else '['}{minimum}, {maximum}]"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
