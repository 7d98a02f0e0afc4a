"""Images from a folder, or from a data set of Hugging Face, decoded in workers."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dino_head.vision.augment import IMAGENET_MEAN, IMAGENET_STD
from dino_head.vision.files import BadFiles, walk

SMALLEST = 8  # pixels; smaller ones are tracking pixels and the like


def open_images(data: str, streaming: bool = False) -> Any:
    """The images of a folder, however deep, labelled by the folder they are in; or the training part of a Hub data set.

    Columns: `image`, not decoded, and `label` where there is one. With `streaming`, nothing of a Hub data set is kept.
    """
    if Path(data).is_dir():
        rows = _folder(data)
        return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows
    if Path(data).exists():
        raise ValueError(f"{data} is a file, expected a folder of images or the name of a data set on the Hub")
    try:
        rows = datasets.load_dataset(data, split="train", streaming=streaming)
    except Exception as error:  # of the network, the Hub, its files
        raise ValueError(f"{data} is no folder here, and no data set on the Hub that can be read: {error}") from error
    kinds = {name: type(feature) for name, feature in rows.features.items()}
    image = next((name for name, kind in kinds.items() if kind is datasets.Image), None)
    label = next((name for name, kind in kinds.items() if kind is datasets.ClassLabel), None)
    if image is None:
        raise ValueError(f"{data} has no column of images, but {', '.join(kinds)}")
    rows = rows.select_columns([image] + ([label] if label else []))
    for name, ours in ((image, "image"), (label, "label")):
        if name not in (ours, None):
            rows = rows.rename_column(name, ours)
    return rows.cast_column("image", datasets.Image(decode=False))


def _folder(folder: str) -> datasets.Dataset:
    """Its image files by their paths; not by load_dataset, which takes names such as train and test for splits."""
    known = tuple(Image.registered_extensions())
    files = [file for file in walk(folder) if file.lower().endswith(known)]
    if not files:
        raise ValueError(f"{folder} has no file that is called as an image ({', '.join(known[:5])}, ...)")
    folders = [os.path.basename(os.path.dirname(os.path.abspath(file))) for file in files]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=sorted({*folders}))}
    images = [{"path": file, "bytes": None} for file in files]
    return datasets.Dataset.from_dict({"image": images, "label": folders}, datasets.Features(features))


def paths(rows: datasets.Dataset) -> list[str]:
    """Of all images, in their order."""
    # Chunk by chunk: they may hold the files' bytes as well, which are not to be read.
    return [path for chunk in rows.data["image"].chunks for path in chunk.field("path").to_pylist()]


def decode(source: str | bytes, size: int) -> Tensor:
    """An image file of any mode -> bytes (3, size, size): upright, the middle of its shorter side.

    Raises:
        Exception: whatever is wrong with it.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        if min(opened.size) < SMALLEST:
            raise ValueError(f"{opened.size[0]} x {opened.size[1]} pixels")
        opened.draft("", (size, size))  # a JPEG is decoded at the half, the quarter ... if that is enough
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):  # 16 bits a pixel or more: from the darkest to the brightest
            pixels = np.asarray(image, dtype=np.float64)
            seen = pixels[np.abs(pixels) < 1e30]  # what is missing is NaN, or -3.4e38
            dark, bright = np.percentile(seen, (0.1, 99.9))
            pixels = np.nan_to_num((pixels - dark) / ((bright - dark) or 1.0))
            image = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalized(image: Tensor) -> Tensor:
    """Bytes (3, H, W) -> as the views of `dino_views` are: for the kNN probe, which augments nothing."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image / 255 - mean) / std


class Images(Dataset[Any]):
    """Images (3, size, size), with their labels where there are some; raises whatever is wrong with a file.

    Args:
        rows: of `open_images`.
        size: height and width.
        transform: after decoding.
    """

    def __init__(self, rows: Any, size: int, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.rows, self.size, self.transform = rows, size, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.sample(self.rows[index])

    def sample(self, row: dict[str, Any]) -> Any:
        """A row -> its image, with its label where there is one."""
        image = decode(row["image"]["bytes"] or row["image"]["path"], self.size)
        image = self.transform(image) if self.transform else image
        return (image, row["label"]) if "label" in row else image

    def name(self, index: int) -> str:
        """The path of the file, if it is known."""
        return self.rows[index]["image"]["path"] or f"image {index}"


class Stream(IterableDataset[Any]):
    """Images of a data set that is read as it comes: for what does not fit on the disk.

    It has no end, is shuffled in a buffer, anew in each epoch (`rows.set_epoch`), and divided among processes and
    workers by its files. Images that cannot be decoded are passed by.

    Args:
        rows: of `open_images(data, streaming=True)`.
        size: height and width.
        bad_files: to which those that cannot be decoded are added.
        rank: of this process.
        world_size: how many there are.
        seed: of the order.
        buffer: how many rows, not decoded, are shuffled at a time.
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
    ) -> None:
        self.rows = split_dataset_by_node(rows, rank, world_size).shuffle(seed=seed, buffer_size=buffer)
        self.images, self.bad_files = Images(self.rows, size), bad_files

    def __iter__(self) -> Iterator[Any]:
        """Without end: the shares of processes are unlike, and one that ended first would keep the others waiting."""
        while True:
            rows = good = 0
            for rows, row in enumerate(self.rows, 1):  # noqa: B007
                try:
                    sample = self.images.sample(row)
                except Exception as error:  # of what a file may hold, nothing is worth a run
                    self.bad_files.add(row["image"]["path"] or "an image without a name", error)
                    continue
                good += 1
                yield sample
            if not rows:  # more workers than files
                return
            if not good:
                raise ValueError(f"not one of {rows} images can be decoded; they are listed in {self.bad_files.file}")
