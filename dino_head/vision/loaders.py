"""A loader whose order is the same in an uninterrupted and in a resumed run.

Lightning saves no random state, so the loader has none: its order depends only on the seed and on the Trainer's
counters. Random numbers that a dataset draws in `__getitem__` are not covered: seed them with `derived_seed`.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ResumableLoader(DataLoader[Any]):
    """A shuffled DataLoader whose order depends only on (seed, epoch) and starts at the Trainer's current batch.

    Create it in `train_dataloader()`, where the Trainer knows its processes: each process loads its own share of the
    samples. Incomplete batches are dropped.

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
        sampler = _RestOfEpoch(dataset, trainer.world_size, trainer.global_rank, seed=seed, drop_last=True)
        sampler.trainer, sampler.batch_size = trainer, batch_size
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=True, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start at the first batch, because the Trainer of a resumed run does not know its epoch earlier."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty, as the Trainer's counters suffice. Lightning only resumes loaders with this method inside an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _RestOfEpoch(DistributedSampler[Any]):
    """DistributedSampler that skips the batches on which the Trainer has already trained in this epoch."""

    trainer: "Trainer"
    batch_size: int

    def __iter__(self) -> Iterator[Any]:
        batches = self.trainer.fit_loop.batch_idx + 1  # 0, except in a run that is resumed inside an epoch
        return itertools.islice(super().__iter__(), batches * self.batch_size, None)
