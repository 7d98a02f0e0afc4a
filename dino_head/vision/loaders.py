"""Training data whose order, and whose random draws, are the same in a run that was stopped and resumed.

Lightning saves no random state. So nothing here has any: what is random follows from where the run stands. (What a
dataset draws by itself, in `__getitem__`, is not covered: let it follow from `derived_seed` too.)
"""

import itertools
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableLoader(DataLoader[Any]):
    """A shuffled DataLoader whose order follows from (seed, epoch) and begins at the batch where the run stands.

    For the training loop of a Trainer, with one or several processes; build it in `train_dataloader()`, where the
    Trainer knows them. Incomplete batches are left out.

    Args:
        dataset: any with a length.
        batch_size: samples of one process.
        trainer: the one that trains.
        seed: of the order.
        options: of DataLoader, such as num_workers.

    Raises:
        ValueError: if there is not one whole batch.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, trainer: Trainer, seed: int = 0, **options: Any) -> None:
        samples = len(dataset) // trainer.world_size  # type: ignore[arg-type]
        if samples < batch_size:
            raise ValueError(
                f"{samples} samples for each process are less than a batch of {batch_size}, and there would be nothing "
                "to train on: choose a smaller batch size"
            )
        sampler = _RestOfEpoch(dataset, trainer.world_size, trainer.global_rank, seed=seed, drop_last=True)
        sampler.trainer, sampler.batch_size = trainer, batch_size
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=True, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begin when the first batch is asked for: only then do Trainer and sampler know the epoch of a resumed run."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the Trainer's counters are enough. With these two methods Lightning takes a loader for resumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _RestOfEpoch(DistributedSampler[Any]):
    """DistributedSampler without the batches that this epoch has had already."""

    trainer: Trainer
    batch_size: int

    def __iter__(self) -> Iterator[Any]:
        batches = self.trainer.fit_loop.batch_idx + 1  # 0, but in a run that is resumed in the middle of an epoch
        return itertools.islice(super().__iter__(), batches * self.batch_size, None)


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a Stream, whose order follows from seed and epoch; resumed inside one, a run begins it anew.

    Args:
        stream: with `rows` that have a `set_epoch`.
        batch_size: samples of one process.
        trainer: the one that trains.
        options: of DataLoader, such as num_workers.
    """

    def __init__(self, stream: Any, batch_size: int, trainer: Trainer, **options: Any) -> None:
        super().__init__(stream, batch_size, **options)
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begin when the first batch is asked for: only then does the Trainer know the epoch of a resumed run."""
        self.dataset.rows.set_epoch(self.trainer.current_epoch)  # type: ignore[attr-defined]
        yield from super().__iter__()
