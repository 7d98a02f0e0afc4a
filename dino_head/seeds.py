"""Seeds derived from a run's counters, because Lightning saves no random state."""


def derived_seed(*key: int) -> int:
    """Derive a seed from non-negative integers, such as (seed, rank, epoch, batch).

    The same integers give the same seed, in every process and in a resumed run; different integers give unrelated seeds
    (NumPy's `SeedSequence`).

    Args:
        key: Non-negative integers.

    Returns:
        Integer in [0, 2**64), for `torch.manual_seed`.

    >>> derived_seed(0, 1, 2) == derived_seed(0, 1, 2), derived_seed(0, 1, 2) == derived_seed(0, 2, 1)
    (True, False)
    """
    import numpy as np  # not needed to import dino_head

    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
