"""LightningDataModules of images: from a folder, or from a data set of the Hugging Face Hub.

Files that cannot be decoded are left out, counted, and listed in bad_files.txt in the Trainer's default_root_dir.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader

from dino_head.vision.files import FileData, Readable, fingerprint
from dino_head.vision.images import Images, Stream, normalized, open_images, paths
from dino_head.vision.loaders import ResumableLoader, StreamLoader


class ImageData(FileData):
    """Batches of bytes (B, 3, image_size, image_size), with labels where there are some.

    Args:
        data: The folder of image files, or the name of a data set on the Hugging Face Hub.
        batch_size: The number of images in a step of each process.
        workers: The number of processes that decode images, beside each training process.
        image_size: The height and width to which images are scaled and cropped before they are augmented.
        eval_size: The height and width of images for the kNN accuracy.
        seed: The seed of the order in which images come.
    """

    def __init__(
        self,
        data: str,
        batch_size: int = 64,
        workers: int = 2,
        image_size: int = 256,
        eval_size: int = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rows = open_images(data)
        labels = self.rows.features.get("label")
        self.has_classes = labels is not None and labels.num_classes > 1
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.image_size, self.eval_size = image_size, eval_size
        self.description = fingerprint(paths(self.rows))

    def setup(self, stage: str) -> None:
        """Hold every tenth image out, if there are classes to tell apart."""
        super().setup(stage)
        held_out = set(range(0, len(self.rows), 10)) if self.has_classes else set()
        train = self.rows.select([i for i in range(len(self.rows)) if i not in held_out])
        bad = self.bad_files
        self.train = Readable(Images(train, self.image_size), bad)
        self.voters = Readable(Images(train, self.eval_size, normalized), bad)
        self.held_out = Readable(Images(self.rows.select(sorted(held_out)), self.eval_size, normalized), bad)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, anew in each epoch."""
        assert self.trainer is not None
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available()}
        return ResumableLoader(self.train, self.batch_size, self.trainer, self.seed, **options)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training images that vote on the held-out ones."""
        voters, held_out = (
            DataLoader(images, batch_size=self.batch_size, num_workers=self.workers)
            for images in (self.voters, self.held_out)
        )
        return voters, held_out


class StreamData(FileData):
    """Batches of images that are read as they come, none held out: an epoch is the Trainer's limit_train_batches.

    Args:
        data: The folder of image files, or the name of a data set on the Hugging Face Hub.
        batch_size: The number of images in a step of each process.
        workers: The number of processes that decode images, at most one for each file of the data set.
        image_size: The height and width to which images are scaled and cropped before they are augmented.
        seed: The seed of the order in which images come.
    """

    has_classes = False

    def __init__(self, data: str, batch_size: int = 64, workers: int = 2, image_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.rows = open_images(data, streaming=True)
        self.batch_size, self.workers, self.image_size, self.seed = batch_size, workers, image_size, seed
        self.description = f"a stream from {data}"

    def train_dataloader(self) -> StreamLoader:
        """Shuffled, anew in each epoch."""
        run = self.trainer
        assert run is not None
        if not isinstance(run.limit_train_batches, int):
            raise ValueError("a stream has no end: give the Trainer the steps of an epoch as limit_train_batches")
        stream = Stream(self.rows, self.image_size, self.bad_files, run.global_rank, run.world_size, self.seed)
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available(), "drop_last": True}
        return StreamLoader(stream, self.batch_size, run, **options)
