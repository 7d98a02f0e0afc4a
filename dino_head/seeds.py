"""Seeds that follow from where a run stands, as Lightning saves no random state."""


def derived_seed(*key: int) -> int:
    """Seed derived from non-negative integers, such as (seed, rank, epoch, batch).

    Two processes, or a run and its continuation, that pass the same integers get the same seed; any other integers
    lead to an unrelated one (NumPy's `SeedSequence`).

    Args:
        key: Non-negative integers.

    Returns:
        An integer in [0, 2**64), for `torch.manual_seed`.

    >>> derived_seed(0, 1, 2) == derived_seed(0, 1, 2), derived_seed(0, 1, 2) == derived_seed(0, 2, 1)
    (True, False)
    """
    import numpy as np  # not needed to import dino_head

    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
