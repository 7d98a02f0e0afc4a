"""A loader whose order is the same in an uninterrupted and in a resumed run.

Lightning saves no random state, so the loader has none: its order depends only on the seed and on the Trainer's
counters. Random numbers that a dataset draws in `__getitem__` are not covered: seed them with `derived_seed`.
"""

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, DistributedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ResumableLoader(DataLoader[Any]):
    """A shuffled DataLoader whose order depends only on (seed, epoch) and starts at the Trainer's current batch.

    Create it in `train_dataloader()`, where the Trainer knows its processes: each process loads its own share of the
    samples. Incomplete batches are dropped. With `Trainer(overfit_batches=...)`, each epoch has the order of the
    dataset. Worker processes ignore the signals that stop a run, so that it can finish its batch.

    Args:
        dataset: Dataset with a length.
        batch_size: Number of samples in a batch of one process.
        trainer: Trainer that trains on the batches.
        seed: Seed of the order.
        options: Options of DataLoader, such as num_workers.

    Raises:
        ValueError: If a process has fewer samples than a batch.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, trainer: "Trainer", seed: int = 0, **options: Any
    ) -> None:
        samples = len(dataset) // trainer.world_size  # type: ignore[arg-type]
        if samples < batch_size:
            raise ValueError(
                f"{samples} samples for each process are fewer than a batch of {batch_size}: use a smaller batch size"
            )
        overfits = bool(getattr(trainer, "overfit_batches", 0))
        if overfits:  # Lightning creates the loader again, from its attributes and with another sampler
            for name in ("sampler", "batch_sampler", "shuffle", "drop_last"):
                options.pop(name, None)
        sampler = _RestOfEpoch(dataset, trainer.world_size, trainer.global_rank, not overfits, seed, drop_last=True)
        sampler.loader, sampler.trainer, sampler.batch_size = self, trainer, batch_size
        self.trainer, self.seed = trainer, seed
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=True, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start at the first batch, because the Trainer of a resumed run does not know its epoch earlier."""
        with stop_signals_blocked():
            batches = super().__iter__()
        yield from batches

    def state_dict(self) -> dict[str, Any]:
        """Empty, as the Trainer's counters suffice. Lightning only resumes loaders with this method inside an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _RestOfEpoch(DistributedSampler[Any]):
    """DistributedSampler that skips the batches on which the Trainer has already trained in this epoch."""

    loader: ResumableLoader
    trainer: "Trainer"
    batch_size: int

    def __iter__(self) -> Iterator[Any]:
        trained_on = getattr(self.trainer, "train_dataloader", None)
        if trained_on is not None and all(loader is not self.loader for loader in tree_leaves(trained_on)):
            return super().__iter__()  # a callback that reads the training data
        # 0, except in a run that is resumed inside an epoch. The Trainer repeats a shorter loader beside a longer one.
        batches = (self.trainer.fit_loop.batch_idx + 1) % (self.num_samples // self.batch_size)
        return itertools.islice(super().__iter__(), batches * self.batch_size, None)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Context for starting worker processes, which then ignore Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2.

    A terminal or a scheduler sends these to the workers as well. The main process receives them after the context.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
