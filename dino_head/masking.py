"""Random block masks over the patches of a view.

Sizes: V views of all images, d axes of the grid, N patches of a view.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from numbers import Real

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number

MINIMUM_AREA = 4  # patches of a block
LARGEST_LOG_ASPECT = -math.log(0.3)
TRIES = 10  # refused blocks in a row that end a mask
TRIES_AT_ONCE = 512  # one call of torch.rand draws the numbers of many tries


def random_block_masks(
    views: int,
    grid: Sequence[int],
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw random block masks for int(V `probability`) of V views; the other views stay unmasked.

    `ratio` is divided into n equal intervals for the n masked views. View i draws a share u uniformly from interval i
    and requests int(N u) patches. Blocks are added until it has them, each with

        area     uniform between 4 and b, the smaller of int(N / 2) and the number of patches still missing
        side j   round(area^(1/d) e^(a_j)), with log-aspects a_j that sum to 0
        place    uniform among all places in the grid

    A block that masks no new patch, or more than b, is refused. Ten refused blocks in a row end the mask, so it can
    have fewer patches than requested, but never more, and never all N. Finally, the views are shuffled.

    On 2-D grids, this is the rule of BEiT (Bao et al. 2022, arXiv:2106.08254) and DINOv2 (Oquab et al. 2023,
    arXiv:2304.07193): a_1 - a_2 is uniform between ln 0.3 and -ln 0.3, and a block that spans an axis is refused too.
    This would refuse most blocks on narrow grids. If the shorter axis is too short for a block of N / 2 patches that is
    0.3 times as high as wide, each side is clipped to [1, max(1, size - 1)] instead. On 1-D and 3-D grids, sides are
    always clipped, and the a_j are uniform between ln 0.3 and -ln 0.3 before their mean is subtracted.

    Args:
        views: Number V of views, at least 1: 2 B for two global views of B samples.
        grid: Number of patches along each axis, a sequence of 1, 2 or 3 positive integers.
        probability: Share of the views that are masked, in [0, 1].
        ratio: Smallest and largest share of masked patches to request, 0 <= smallest <= largest < 1.
        exact: Whether view i has exactly int(N u) masked patches, where u is the upper end of interval i (DINOv3,
            Siméoni et al. 2025, arXiv:2508.10104). Single patches, chosen at random, are added to the blocks.
        generator: Generator on the CPU, the only source of randomness; by default, PyTorch's global one.

    Returns:
        Boolean tensor (V, *grid) on the CPU, True for masked patches.

    Raises:
        ValueError: Arguments out of range, or a generator on another device.

    >>> masks = random_block_masks(8, (16, 16), exact=True, generator=torch.Generator().manual_seed(0))
    >>> masks.shape, masks.sum(dim=(1, 2)).sort().values
    (torch.Size([8, 16, 16]), tensor([  0,   0,   0,   0,  51,  76, 102, 128]))
    """
    grid = _check(views, grid, probability, ratio, generator)
    patches, masked_views = math.prod(grid), int(views * probability)
    if probability and not masked_views:
        warnings.warn(
            f"random_block_masks masks none of {views} views, because int({views} * {probability}) is 0: raise the "
            "probability, or use larger batches",
            stacklevel=2,
        )
    with torch.device("cpu"):  # whatever the default device is
        edges = torch.linspace(*ratio, masked_views + 1, dtype=torch.float64)
        shares = edges[1:]
        if not exact:
            uniform = torch.rand(masked_views, generator=generator, dtype=torch.float64)
            shares = edges[:-1].lerp(shares, uniform)
        requests = [int(patches * share) for share in shares.tolist()] + [0] * (views - masked_views)
        blocks = _Blocks(grid, generator)
        masks = [blocks.mask(request) for request in requests]
        if exact:
            masks = [blocks.fill(mask, request) for mask, request in zip(masks, requests, strict=True)]
        return _unpack(masks, patches)[torch.randperm(views, generator=generator)].view(views, *grid)


class _Blocks:
    """Masks as integers whose bit n is patch n: adding a block then takes few operations."""

    def __init__(self, grid: tuple[int, ...], generator: torch.Generator | None) -> None:
        self.grid, self.patches = grid, math.prod(grid)
        self.strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        lowest = math.sqrt(self.patches / 2 * math.exp(-LARGEST_LOG_ASPECT))  # height of the flattest block of N / 2
        self.clips = len(grid) != 2 or lowest > min(grid) - 1
        self.tries = _tries(len(grid), generator)

    def mask(self, request: int) -> int:
        """A mask of up to `request` patches."""
        mask = 0
        while (masked := mask.bit_count()) < request:
            budget = min(request - masked, self.patches // 2)
            for numbers in islice(self.tries, TRIES):
                block = self._block(budget, numbers)
                if 0 < (mask | block).bit_count() - masked <= budget:
                    mask |= block
                    break
            else:
                break
        return mask

    def fill(self, mask: int, request: int) -> int:
        """The mask with single patches added at random, up to `request` patches."""
        while mask.bit_count() < request:
            mask |= 1 << int(self.patches * next(self.tries)[0])
        return mask

    def _block(self, budget: int, numbers: list[float]) -> int:
        """One block, or 0 if it spans an axis and is not clipped."""
        dims = len(self.grid)
        length = (MINIMUM_AREA + (budget - MINIMUM_AREA) * numbers[0]) ** (1 / dims)
        block, offset = 1, 0
        for axis, size in enumerate(self.grid):
            side = round(length * numbers[1 + axis])
            if side >= size and not self.clips:
                return 0
            side = max(1, min(side, size - 1))
            stride = self.strides[axis]
            block *= ((1 << stride * side) - 1) // ((1 << stride) - 1)  # `side` bits, a stride apart
            offset += stride * int((size - side + 1) * numbers[1 + dims + axis])
        return block << offset


def _tries(dims: int, generator: torch.Generator | None) -> Iterator[list[float]]:
    """For each block, a uniform number for its area, e^(a_j) and a uniform number for its place on each axis."""
    while True:
        numbers = torch.rand(TRIES_AT_ONCE, 1 + 2 * dims, generator=generator, dtype=torch.float64)
        log_aspects = LARGEST_LOG_ASPECT * (2 * numbers[:, 1 : 1 + dims] - 1)
        if dims == 2:
            log_aspects[:, 1] = 0  # so that a_1 - a_2 is uniform
        numbers[:, 1 : 1 + dims] = (log_aspects - log_aspects.mean(dim=1, keepdim=True)).exp()
        yield from numbers.tolist()


def _unpack(masks: list[int], patches: int) -> Tensor:
    """Integers -> boolean (V, N)."""
    length = -(-patches // 8)  # bytes of a mask
    packed = torch.frombuffer(bytearray().join(mask.to_bytes(length, "little") for mask in masks), dtype=torch.uint8)
    bits = packed.view(len(masks), length, 1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :patches].bool()


def _check(
    views: int,
    grid: Sequence[int],
    probability: float,
    ratio: tuple[float, float],
    generator: torch.Generator | None,
) -> tuple[int, ...]:
    check_integer("views", views, 1, " (2 B for two global views of B samples)")
    if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) not in (1, 2, 3):
        raise ValueError(
            "grid must be a sequence of 1, 2 or 3 integers, the number of patches along each axis, "
            f"got {grid!r}: pass (16, 16) for 16 x 16 patches"
        )
    for axis, size in enumerate(grid):
        check_integer(f"grid[{axis}]", size, 1)
    check_number("probability", probability, 0, 1)
    if (
        not isinstance(ratio, Sequence)
        or len(ratio) != 2
        or not all(isinstance(share, Real) for share in ratio)
        or not 0 <= ratio[0] <= ratio[1] < 1
    ):
        raise ValueError(
            f"ratio must be (smallest, largest) with 0 <= smallest <= largest < 1, got {ratio!r}: "
            "pass shares of the patches, such as (0.1, 0.5)"
        )
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        given = f"one on {generator.device}" if isinstance(generator, torch.Generator) else repr(generator)
        raise ValueError(
            f"generator must be a torch.Generator on the CPU, or None, got {given}: masks are drawn on the CPU, pass "
            "torch.Generator().manual_seed(seed)"
        )
    return tuple(int(size) for size in grid)
