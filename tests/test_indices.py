from dino_head._indices import spaced_indices


def test_spaced_indices_hold_the_first_and_the_last():
    assert [spaced_indices(total, total) for total in range(1, 400)] == [list(range(total)) for total in range(1, 400)]
    assert spaced_indices(41, 4) == [0, 13, 26, 40]
    assert spaced_indices(7, 1) == [0]
