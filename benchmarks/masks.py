"""Time of the masks of 128 views, beside the rule by hand: interleaved rounds, medians.

By hand: a NumPy array for each mask and Python's random numbers, as in the authors' code.
"""

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from dino_head import random_block_masks

VIEWS = 128
GRIDS = [(14, 14), (16, 16), (37, 37), (12, 12, 12)]
Mask = npt.NDArray[np.bool_]


def block_by_hand(grid: tuple[int, ...], budget: int) -> tuple[slice, ...] | None:
    """One block, or None if it spans an axis of a 2-D grid."""
    area = random.uniform(4, budget)
    if len(grid) == 2:
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        sides = [round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))]
        if any(side >= size for side, size in zip(sides, grid, strict=True)):
            return None
    else:
        logs = [random.uniform(math.log(0.3), -math.log(0.3)) for _ in grid]
        sides = [round(area ** (1 / len(grid)) * math.exp(log - sum(logs) / len(grid))) for log in logs]
        sides = [max(1, min(side, size - 1)) for side, size in zip(sides, grid, strict=True)]
    starts = [random.randint(0, size - side) for side, size in zip(sides, grid, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


def mask_by_hand(grid: tuple[int, ...], request: int) -> Mask:
    """Blocks up to `request` patches."""
    mask = np.zeros(grid, dtype=bool)
    masked = refused = 0
    while masked < request and refused < 10:
        budget = min(request - masked, mask.size // 2)
        block = block_by_hand(grid, budget)
        new = 0 if block is None else mask[block].size - int(mask[block].sum())
        refused += 1
        if block is not None and 0 < new <= budget:
            mask[block] = True
            masked, refused = masked + new, 0
    return mask


def masks_by_hand(views: int, grid: tuple[int, ...]) -> torch.Tensor:
    """The masks of half of the views, and empty ones."""
    edges = np.linspace(0.1, 0.5, views // 2 + 1).tolist()
    shares = [random.uniform(low, high) for low, high in itertools.pairwise(edges)]
    masks = [mask_by_hand(grid, int(math.prod(grid) * share)) for share in shares]
    masks += [np.zeros(grid, dtype=bool) for _ in range(views - len(masks))]
    random.shuffle(masks)
    return torch.from_numpy(np.stack(masks))


def milliseconds(draw: Callable[[int, tuple[int, ...]], torch.Tensor], grid: tuple[int, ...]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    draw(VIEWS, grid)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print a line for each grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (%(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)  # as in the worker of a DataLoader
    torch.manual_seed(0)
    random.seed(0)
    for grid in GRIDS:
        milliseconds(random_block_masks, grid)  # what is done once per process
        pairs = [(milliseconds(masks_by_hand, grid), milliseconds(random_block_masks, grid)) for _ in range(rounds)]
        by_hand, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(by_hand / ours for by_hand, ours in pairs)
        size = " x ".join(map(str, grid))
        print(f"{VIEWS} views of {size}: {ours:.2f} ms; by hand {by_hand:.2f} ms; by hand / ours: {ratio:.2f}")
    print(f"medians of {rounds} interleaved rounds")


if __name__ == "__main__":
    main()
