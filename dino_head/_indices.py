"""Indices of a deterministic subsample."""


def spaced_indices(total: int, count: int) -> list[int]:
    """Evenly spaced `count` of the indices 0 to `total - 1`, including the first and the last.

    >>> spaced_indices(41, 4)
    [0, 13, 26, 40]
    """
    return [index * (total - 1) // max(1, count - 1) for index in range(count)]
