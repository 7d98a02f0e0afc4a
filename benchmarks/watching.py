"""Cost of monitoring a run: the digits with and without CollapseMonitorCallback and KNNProbeCallback.

Each round has one run without, two runs with, and one run without the callbacks, so that drift of the machine affects
both. As such runs differ by several percent anyway, the time spent in the callbacks is measured too. The time of the
report is listed separately, as it does not depend on the length of the run.
"""

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer

from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    TeacherUpdateCallback,
)
from dino_head.callbacks.collapse_monitor import Measurement
from dino_head.examples.fit_digits import Digits, build


def seconds(epochs: int, *callbacks: Any) -> float:
    """Training time of the digits example."""
    seed_everything(0, verbose=False)
    timer = Timer()
    trainer = Trainer(
        max_epochs=epochs,
        gradient_clip_val=3.0,
        callbacks=[FreezeLastLayerCallback(), TeacherUpdateCallback(base_momentum=0.98), *callbacks, timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(), Digits())
    return timer.time_elapsed("train")


def watching() -> list[Any]:
    """The callbacks, with the options of examples/fit_digits.py."""
    return [CollapseMonitorCallback(every_n_steps=10), KNNProbeCallback(k=10, every_n_epochs=5)]


class Spent:
    """Sums up the time spent in some methods."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def count(self, owner: Any, *names: str) -> None:
        """From now on, add the time of the owner's methods with these names."""
        for name in names:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return counted


def main() -> None:
    """Print the median of the ratios of all rounds, and the time of a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each run; 1, 5 and 10 are probed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    seconds(1, *watching())  # work that is done once per process
    ratios, shares = [], []
    spent = Spent()
    spent.count(Measurement, "_measure")  # within the forward of the loss
    for index in range(args.rounds):
        spent.seconds, (monitor, probe) = 0.0, watching()
        spent.count(monitor, "on_train_start", "on_train_batch_start", "on_train_batch_end")
        spent.count(probe, "on_train_start", "on_train_epoch_end")
        order: list[list[Any]] = [[], [monitor, probe], [monitor, probe], []]
        first, *watched, last = (seconds(args.epochs, *callbacks) for callbacks in order)
        ratios.append(sum(watched) / (first + last))
        shares.append(spent.seconds / (sum(watched) - spent.seconds))
        print(f"round {index + 1}: {first + last:.2f} s alone, {sum(watched):.2f} s watched, ratio {ratios[-1]:.3f}")
    print(f"watched / alone: {statistics.median(ratios):.3f}, median of {args.rounds} rounds of {args.epochs} epochs")
    print(f"time in the callbacks / all other: {statistics.median(shares):.3f}, median of the same runs")
    with tempfile.TemporaryDirectory() as folder:
        report = ReportCallback(folder, every_n_epochs=1)
        seconds(3, *watching(), report)
        print((report.receipt or "").replace(folder, ""))


if __name__ == "__main__":
    main()
