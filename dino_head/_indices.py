"""Indices of a sample that needs no randomness."""


def spaced_indices(total: int, count: int) -> list[int]:
    """`count` of the indices 0 to total - 1, spaced evenly, with the first and the last among them.

    >>> spaced_indices(41, 4)
    [0, 13, 26, 40]
    """
    return [index * (total - 1) // max(1, count - 1) for index in range(count)]
