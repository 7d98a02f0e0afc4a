"""Streams of images, for data sets that do not fit on the disk."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset

from dino_head.vision.files import BadFiles
from dino_head.vision.images import Images, image_path
from dino_head.vision.loaders import stop_signals_blocked

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ImageStream(IterableDataset[Any]):
    """An endless stream of images, whose files are divided among processes and workers. It skips unreadable images.

    A buffer shuffles the images, in another order in each epoch (`rows.set_epoch`).

    Args:
        rows: Rows of `open_images(data, streaming=True)`.
        size: Height and width of the images.
        bad_files: List of unreadable images.
        rank: Rank of this process.
        world_size: Number of processes.
        seed: Seed of the order.
        buffer: Number of rows, not decoded, in the shuffle buffer.
        background: Colour behind transparent pixels, as in `read_image`.
    """

    def __init__(
        self,
        rows: Any,
        size: int,
        bad_files: BadFiles,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        buffer: int = 10_000,
        background: str = "white",
    ) -> None:
        self.rows = split_dataset_by_node(rows, rank, world_size).shuffle(seed=seed, buffer_size=buffer)
        self.images, self.bad_files = Images(self.rows, size, background=background), bad_files

    def __iter__(self) -> Iterator[Any]:
        """Endless, because processes have shares of unequal length, and would wait for the shortest."""
        while True:
            rows = good = 0
            for rows, row in enumerate(self.rows, 1):  # noqa: B007
                try:
                    sample = self.images.sample(row)
                except Exception as error:  # an unreadable file must not end a run
                    self.bad_files.add(image_path(row) or "an image without a name", error)
                    continue
                good += 1
                yield sample
            if not rows:  # more workers than files
                return
            if not good:
                raise ValueError(f"none of {rows} images can be decoded: see the reasons in {self.bad_files.file}")


class StreamLoader(DataLoader[Any]):
    """A DataLoader of an `ImageStream` whose order depends only on seed and epoch.

    A run that is resumed inside an epoch starts the stream of this epoch from the beginning. With
    `Trainer(overfit_batches=...)`, all epochs have the order of the first.

    Args:
        dataset: Stream whose `rows` have a method `set_epoch`.
        batch_size: Number of images in a batch of one process.
        trainer: Trainer that trains on the batches.
        options: Options of DataLoader, such as num_workers.
    """

    def __init__(self, dataset: Any, batch_size: int, trainer: "Trainer", **options: Any) -> None:
        super().__init__(dataset, batch_size, **options)
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start at the first batch, because the Trainer of a resumed run does not know its epoch earlier."""
        epoch = 0 if getattr(self.trainer, "overfit_batches", 0) else self.trainer.current_epoch
        self.dataset.rows.set_epoch(epoch)  # type: ignore[attr-defined]
        with stop_signals_blocked():
            batches = super().__iter__()
        yield from batches
