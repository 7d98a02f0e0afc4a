"""Memory for one block of logits, and the matrix products that fill and use it.

Sizes: b samples of a block, K prototypes, D bottleneck width.
"""

import math

import torch
from torch import Tensor

BLOCK_BYTES = 2**27  # 128 MiB
LN2 = math.log(2)


class LogitsWorkspace:
    """Memory for the logits of one block of samples, within a budget, and the products that fill it.

    Args:
        views: Number of views of each tensor that shares the memory; `split()` returns these tensors.
        samples: Number B of samples in the batch.
        prototypes: Prototypes (K, D), in the type of the products.
        block_bytes: Budget in bytes; a block contains at least one sample.

    Attributes:
        blocks: Slices of samples, all of about the same length; none without samples.
        logits: Buffer (rows, K) for the logits of the longest block, in float32 or higher.
        low_precision: Buffer (rows, K) for products in a lower precision than `logits`; None if not needed.
        gradient_scale: Factor that keeps float16 gradients from vanishing and their sums from overflowing.
    """

    def __init__(self, views: tuple[int, ...], samples: int, prototypes: Tensor, block_bytes: int) -> None:
        outputs, dtype, sum_dtype = len(prototypes), prototypes.dtype, at_least_float32(prototypes.dtype)
        is_low = dtype != sum_dtype
        per_sample = outputs * (sum(views) * sum_dtype.itemsize + is_low * max(views) * dtype.itemsize)
        number = max(1, math.ceil(samples / max(1, block_bytes // per_sample)))
        longest = max(1, math.ceil(samples / number))
        self.blocks = [slice(start, min(start + longest, samples)) for start in range(0, samples, longest)]
        self.logits = prototypes.new_empty(sum(views) * longest, outputs, dtype=sum_dtype)
        self.low_precision = prototypes.new_empty(max(views) * longest, outputs) if is_low else None
        self.gradient_scale = 2.0**14 / (max(views) * longest) if is_low else 1.0
        self._views = views

    def split(self, samples: slice) -> tuple[Tensor, ...]:
        """Contiguous memory (views, b, K) for each of `views`, with the b samples of a block."""
        length = samples.stop - samples.start
        memory = self.logits[: sum(self._views) * length].view(-1, length, self.logits.shape[1])
        return torch.split(memory, list(self._views))

    def multiply_(self, out: Tensor, z: Tensor, prototypes: Tensor, temp: float) -> None:
        """`out` (views, b, K) = z (views b, D) times prototypes (K, D) over `temp`."""
        rows = out.flatten(end_dim=1)
        product = rows if self.low_precision is None else self.low_precision[: len(rows)]
        torch.addmm(product, z, prototypes.T, beta=0, alpha=1 / temp, out=product)
        if self.low_precision is not None:
            rows.copy_(product)

    def scale_for_product_(self, values: Tensor) -> Tensor:
        """(views, b, K) -> (views b, K) in the type of the products, times `gradient_scale`."""
        rows = values.flatten(end_dim=1)
        if self.low_precision is None:
            return rows
        return torch.mul(rows, self.gradient_scale, out=self.low_precision[: len(rows)])

    def add_product_(self, total: Tensor, a: Tensor, b: Tensor, scale: float, *, is_first: bool) -> None:
        """`total` += scale a @ b; the first product overwrites `total`."""
        if self.low_precision is None:
            torch.addmm(total, a, b, beta=0 if is_first else 1, alpha=scale, out=total)
        elif is_first:
            torch.mul(a @ b, total.new_full((1,), scale), out=total)  # a dimension makes it promote to float32
        else:
            total.add_(a @ b, alpha=scale)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, probabilities and gradients for logits of this type."""
    return torch.promote_types(dtype, torch.float32)
