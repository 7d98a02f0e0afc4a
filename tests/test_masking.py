import math
import random

import numpy as np
import pytest
import torch

from dino_head import masking, random_block_masks


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# The rule by hand, with Python's random numbers


def authors_sides(area):
    """Height and width of BEiT's blocks."""
    aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
    return [round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))]


def sides_of_axes(area, axes):
    """The rule for other numbers of axes."""
    logs = [random.uniform(math.log(0.3), math.log(1 / 0.3)) for _ in range(axes)]
    return [round(area ** (1 / axes) * math.exp(log - sum(logs) / axes)) for log in logs]


def mask_by_hand(grid, request, clips):
    mask = np.zeros(grid, dtype=bool)
    failures = 0
    while mask.sum() < request and failures < 10:
        budget = min(request - mask.sum(), mask.size // 2)
        area = random.uniform(4, budget)
        sides = authors_sides(area) if len(grid) == 2 else sides_of_axes(area, len(grid))
        if clips:
            sides = [min(max(side, 1), max(1, size - 1)) for side, size in zip(sides, grid, strict=True)]
        failures += 1
        if any(side >= size for side, size in zip(sides, grid, strict=True) if size > 1):
            continue
        starts = [random.randint(0, size - side) for side, size in zip(sides, grid, strict=True)]
        block = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        if 0 < (~mask[block]).sum() <= budget:
            mask[block] = True
            failures = 0
    return mask


def masks_by_hand(masked_views, grid, clips, ratio=(0.1, 0.5), exact=False):
    edges = np.linspace(*ratio, masked_views + 1)
    masks = []
    for i in range(masked_views):
        share = edges[i + 1] if exact else random.uniform(edges[i], edges[i + 1])
        request = int(math.prod(grid) * share)
        mask = mask_by_hand(grid, request, clips)
        if exact:
            visible = np.flatnonzero(~mask).tolist()
            mask.flat[random.sample(visible, request - int(mask.sum()))] = True
        masks.append(mask)
    return np.stack(masks)


def statistics(masks):
    """Sorted counts, frequency of each cell, share of equal neighbours on each axis, in the masked views of a call."""
    counts = np.sort(masks.reshape(len(masks), -1).sum(axis=1))
    axes = [(axis, size) for axis, size in enumerate(masks.shape) if axis]
    equal = [(masks.take(range(1, size), axis) == masks.take(range(size - 1), axis)).mean() for axis, size in axes]
    return np.concatenate([counts, masks.mean(axis=0).ravel(), equal])


CALLS, MASKED_VIEWS = 400, 8


@pytest.mark.parametrize(("grid", "clips", "options"), [
    ((7, 7), False, {}),
    ((14, 14), False, {}),
    ((16, 16), False, {}),
    ((37, 37), False, {}),
    ((5, 20), False, {}),
    ((3, 8), False, {"exact": True}),
    ((2, 32), True, {}),
    ((60,), True, {}),
    ((5, 7, 9), True, {}),
])  # fmt: skip
@pytest.mark.slow
def test_masks_have_the_distribution_of_a_plain_implementation(grid, clips, options):
    """At most 1,379 differences of two means, each beyond 6.5 standard errors with a probability below 2e-10 (Student's
    t, 798 degrees of freedom): the test fails by chance with a probability below 3e-7."""
    random.seed(0)
    generator = seeded(0)
    ours, by_hand = [], []
    for _ in range(CALLS):
        masks = random_block_masks(2 * MASKED_VIEWS, grid, **options, generator=generator)
        masked_views = masks.flatten(1).sum(dim=1).argsort()[MASKED_VIEWS:]
        ours.append(statistics(masks[masked_views].numpy()))
        by_hand.append(statistics(masks_by_hand(MASKED_VIEWS, grid, clips, **options)))
    difference = np.mean(ours, axis=0) - np.mean(by_hand, axis=0)
    error = np.sqrt((np.var(ours, axis=0) + np.var(by_hand, axis=0)) / (CALLS - 1))
    assert (np.abs(difference) <= 6.5 * error).all()


@pytest.mark.parametrize(
    ("grid", "half"), [((7, 7), 24), ((14, 14), 98), ((16, 16), 128), ((37, 37), 684), ((3, 3, 3), 13)]
)
def test_no_block_has_more_than_half_of_the_patches(grid, half, monkeypatch):
    budgets, block = [], masking._Blocks._block
    monkeypatch.setattr(masking._Blocks, "_block", lambda *args: budgets.append(args[1]) or block(*args))
    random_block_masks(4, grid, ratio=(0.9, 0.9), generator=seeded(0))
    assert max(budgets) == half


def test_ten_refused_blocks_end_a_mask(monkeypatch):
    refused = []
    monkeypatch.setattr(masking._Blocks, "_block", lambda *args: refused.append(args) or 0)
    assert not random_block_masks(6, (8, 8), generator=seeded(0)).any()
    assert len(refused) == 3 * 10


def test_single_patches_of_exact_masks_are_uniform(monkeypatch):
    """20 shares, each beyond 6.5 standard deviations with a probability below 1e-10."""
    monkeypatch.setattr(masking, "TRIES", 0)  # no blocks
    masks = random_block_masks(4000, (4, 5), probability=1, ratio=(0.4, 0.4), exact=True, generator=seeded(0))
    assert (masks.sum(dim=(1, 2)) == 8).all()
    share = masks.float().mean(dim=0)
    assert (share - 0.4).abs().max() < 6.5 * (0.4 * 0.6 / 4000) ** 0.5


# Counts


def counts_of(masks):
    return masks.flatten(1).sum(dim=1).sort().values.tolist()


@pytest.mark.parametrize(
    "grid", [(16, 16), (7, 7), (37, 37), (1, 40), (2, 32), (60,), (5, 7, 9), (3, 3), (2,), (1, 1, 1)]
)
@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.0, 0.97), (0.3, 0.3)])
def test_exact_masks_have_the_patches_of_the_upper_edge_and_others_at_most_as_many(grid, ratio):
    edges = np.linspace(*ratio, 9)[1:]
    expected = [0] * 8 + [int(math.prod(grid) * edge) for edge in edges]
    masks = random_block_masks(16, grid, ratio=ratio, exact=True, generator=seeded(0))
    assert (masks.shape, masks.dtype, masks.device.type) == ((16, *grid), torch.bool, "cpu")
    assert counts_of(masks) == expected
    blocks = counts_of(random_block_masks(16, grid, ratio=ratio, generator=seeded(0)))
    assert all(count <= most for count, most in zip(blocks, expected, strict=True))


@pytest.mark.parametrize("grid", [
    (1, 40), (40, 1), (2, 32), (32, 2), (3, 40), (14, 200), (40,), (1, 1, 40), (2, 16, 16)
])  # fmt: skip
def test_every_masked_view_of_a_narrow_grid_has_a_mask_near_its_request(grid):
    """BEiT's rule masks nothing on 1 x 40 and a tenth of the requested patches on 2 x 32."""
    masks = random_block_masks(400, grid, generator=seeded(0)).flatten(1)
    assert masks.any(dim=1).sum() == 200
    requested = 200 * 0.3 * masks.shape[1]
    assert masks.sum() > 0.9 * requested


@pytest.mark.parametrize(("views", "probability", "masked_views"), [
    (1, 1.0, 1), (5, 0.5, 2), (10, 0.0, 0), (10, 1.0, 10), (7, 0.4, 2)
])  # fmt: skip
def test_the_share_of_masked_views_is_rounded_down(views, probability, masked_views):
    masks = random_block_masks(views, (8, 8), probability=probability, generator=seeded(0))
    assert masks.shape == (views, 8, 8)
    assert masks.flatten(1).any(dim=1).sum() == masked_views


def test_views_are_shuffled():
    """The largest mask is never in one of the 8 places with a probability of 8 (7/8)^300 < 1e-16."""
    generator = seeded(0)
    masks = [random_block_masks(8, (6, 6), exact=True, generator=generator).flatten(1).sum(dim=1) for _ in range(300)]
    assert {int(counts.argmax()) for counts in masks} == set(range(8))
    assert {int(counts.argmin()) for counts in masks} == set(range(5))


# Randomness


@pytest.mark.parametrize("exact", [False, True])
def test_the_generator_alone_determines_the_masks(exact):
    first = random_block_masks(16, (14, 14), exact=exact, generator=seeded(1))
    random.seed(5)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    generator = seeded(1)
    assert torch.equal(random_block_masks(16, (14, 14), exact=exact, generator=generator), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(random_block_masks(16, (14, 14), exact=exact, generator=generator), first)
    assert not torch.equal(random_block_masks(16, (14, 14), exact=exact, generator=seeded(2)), first)


def test_without_a_generator_the_global_one_is_used():
    torch.manual_seed(1)
    assert torch.equal(random_block_masks(16, (7, 7)), random_block_masks(16, (7, 7), generator=seeded(1)))


def test_defaults_of_pytorch_do_not_change_the_masks():
    expected = random_block_masks(16, (7, 7), exact=True, generator=seeded(1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            masks = random_block_masks(16, (7, 7), exact=True, generator=seeded(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(masks, expected)


def test_other_integers_and_sequences_are_a_grid():
    expected = random_block_masks(4, (16, 16), generator=seeded(0))
    for grid in ([16, 16], torch.Size([16, 16]), (np.int64(16), np.int64(16))):
        assert torch.equal(random_block_masks(np.int64(4), grid, generator=seeded(0)), expected)


# Errors


class OnGPU(torch.Generator):
    device = torch.device("cuda:0")


@pytest.mark.parametrize(("arguments", "message"), [
    ({"views": 0}, r"views must be an integer >= 1 \(2 B for two global views of B samples\), got 0"),
    ({"views": 4.0}, r"views must be an integer >= 1 .*, got 4.0"),
    ({"grid": 16}, r"grid must be a sequence of 1, 2 or 3 integers, .*, got 16: pass \(16, 16\)"),
    ({"grid": ()}, r"grid must be .*, got \(\)"),
    ({"grid": (4, 4, 4, 4)}, r"grid must be .*, got \(4, 4, 4, 4\)"),
    ({"grid": "ab"}, "grid must be .*, got 'ab'"),
    ({"grid": (16, 0)}, r"grid\[1\] must be an integer >= 1, got 0"),
    ({"grid": (16.0, 16)}, r"grid\[0\] must be an integer >= 1, got 16.0"),
    ({"probability": 1.5}, r"probability must be a number in \[0, 1\], got 1.5"),
    ({"ratio": 0.3}, r"ratio must be \(smallest, largest\) with 0 <= smallest <= largest < 1, got 0.3: pass shares"),
    ({"ratio": (0.5, 0.1)}, r"ratio must be .*, got \(0.5, 0.1\)"),
    ({"ratio": (-0.1, 0.5)}, r"ratio must be .*, got \(-0.1, 0.5\)"),
    ({"ratio": (0.1, 1.0)}, r"ratio must be .*, got \(0.1, 1.0\)"),
    ({"ratio": (0.1, 0.3, 0.5)}, r"ratio must be .*, got \(0.1, 0.3, 0.5\)"),
    ({"ratio": ("0.1", "0.5")}, r"ratio must be .*, got \('0.1', '0.5'\)"),
    ({"generator": 0}, r"generator must be a torch.Generator on the CPU, or None, got 0: .* pass torch.Generator\(\)"),
    ({"generator": OnGPU()}, "generator must be .*, got one on cuda:0: masks are drawn on the CPU"),
])  # fmt: skip
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_block_masks(**{"views": 4, "grid": (16, 16), **arguments})


@pytest.mark.parametrize("probability", [0.1, 0.12])
def test_a_probability_that_masks_no_view_causes_a_warning(probability):
    with pytest.warns(UserWarning, match=rf"masks none of 8 views, because int\(8 \* {probability}\) is 0: raise the"):
        masks = random_block_masks(8, (4, 4), probability=probability)
    assert not masks.any()
    assert not random_block_masks(8, (4, 4), probability=0).any()  # on purpose
