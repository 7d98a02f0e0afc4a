"""LightningDataModules of images, from a folder or from a data set of the Hugging Face Hub.

Images that cannot be decoded are skipped, counted, and listed in bad_files.txt in the Trainer's default_root_dir.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader

from dino_head.vision import imagenet
from dino_head.vision.file_data import FileData
from dino_head.vision.files import ReplaceUnreadable, fingerprint, printable
from dino_head.vision.images import Images, image_paths, open_images
from dino_head.vision.loaders import ResumableLoader
from dino_head.vision.streams import ImageStream, StreamLoader


class ImageData(FileData):
    """Datamodule of images as bytes (B, 3, image_size, image_size), with labels if there are any.

    Args:
        data: Folder of image files, or name of a data set on the Hugging Face Hub.
        batch_size: Number of images in a batch of each process.
        workers: Number of worker processes that decode images, for each training process.
        image_size: Height and width to which images are scaled and cropped before augmentation.
        eval_size: Height and width of the images for the kNN accuracy.
        seed: Seed of the order of the images.
        background: Colour behind transparent pixels, as in `read_image`.
    """

    def __init__(
        self,
        data: str,
        batch_size: int = 64,
        workers: int = 2,
        image_size: int = 256,
        eval_size: int = 224,
        seed: int = 0,
        background: str = "white",
    ) -> None:
        super().__init__()
        self.rows = open_images(data)
        labels = self.rows.features.get("label")
        self.has_classes = labels is not None and labels.num_classes > 1
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.image_size, self.eval_size, self.background = image_size, eval_size, background
        self.description = fingerprint(image_paths(self.rows))

    def setup(self, stage: str) -> None:
        """Hold out every tenth image, if there are at least two classes."""
        super().setup(stage)
        held_out = set(range(0, len(self.rows), 10)) if self.has_classes else set()
        train = self.rows.select([i for i in range(len(self.rows)) if i not in held_out])
        test = self.rows.select(sorted(held_out))
        bad = self.bad_files
        self.train = ReplaceUnreadable(Images(train, self.image_size, None, self.background), bad)
        self.voters = ReplaceUnreadable(Images(train, self.eval_size, imagenet.normalize, self.background), bad)
        self.held_out = ReplaceUnreadable(Images(test, self.eval_size, imagenet.normalize, self.background), bad)

    def train_dataloader(self) -> ResumableLoader:
        """The training images, shuffled in another order in each epoch."""
        assert self.trainer is not None
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available()}
        return ResumableLoader(self.train, self.batch_size, self.trainer, self.seed, **options)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """The training images, which vote, and the held-out images."""
        voters, held_out = (
            DataLoader(images, batch_size=self.batch_size, num_workers=self.workers)
            for images in (self.voters, self.held_out)
        )
        return voters, held_out


class StreamData(FileData):
    """Datamodule of streamed images, without held-out images.

    The number of batches in an epoch is the Trainer's `limit_train_batches`.

    Args:
        data: Folder of image files, or name of a data set on the Hugging Face Hub.
        batch_size: Number of images in a batch of each process.
        workers: Number of worker processes that decode images, at most one for each file of the data set.
        image_size: Height and width to which images are scaled and cropped before augmentation.
        seed: Seed of the order of the images.
        background: Colour behind transparent pixels, as in `read_image`.
    """

    def __init__(
        self,
        data: str,
        batch_size: int = 64,
        workers: int = 2,
        image_size: int = 256,
        seed: int = 0,
        background: str = "white",
    ) -> None:
        super().__init__()
        self.rows = open_images(data, streaming=True)
        self.batch_size, self.workers, self.image_size, self.seed = batch_size, workers, image_size, seed
        self.background = background
        self.description = printable(f"a stream from {data}")

    def train_dataloader(self) -> StreamLoader:
        """The images, shuffled in another order in each epoch."""
        run = self.trainer
        assert run is not None
        if not isinstance(run.limit_train_batches, int):
            raise ValueError(
                f"a stream has no end, got limit_train_batches={run.limit_train_batches}: set it in the Trainer to the "
                "number of batches in an epoch"
            )
        part = (self.bad_files, run.global_rank, run.world_size, self.seed)
        stream = ImageStream(self.rows, self.image_size, *part, background=self.background)
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available(), "drop_last": True}
        return StreamLoader(stream, self.batch_size, run, **options)
