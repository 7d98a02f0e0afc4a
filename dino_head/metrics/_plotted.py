"""Base class of the metrics."""

from typing import Any

from torchmetrics import Metric


class PlottedMetric(Metric):
    """A metric with a plot of its own results."""

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the result of `compute`, or `val` (a result or a list of results); returns figure and axes."""
        return self._plot(val, ax)
