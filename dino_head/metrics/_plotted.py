"""Base class of the metrics."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric


class PlottedMetric(Metric):
    """A metric with a plot of its own results, whose values do not depend on the precision of the module around it."""

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the result of `compute`, or `val` (a result or a list of results); returns figure and axes."""
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # Metric.half() and similar calls do nothing, but those of a module around the metric, and .to(dtype), would
        # round sums and counts: follow them only to another device. `set_dtype` still converts.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(fn if self._dtype_convert else move, exclude_state)
