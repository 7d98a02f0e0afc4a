"""A dataset of images, from a folder or from the Hugging Face Hub, decoded in workers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_head.vision.files import list_files
from dino_head.vision.reading import read_image


def open_images(data: str, streaming: bool = False) -> Any:
    """Open a folder of images, labelled by the name of their folder, or the training split of a data set.

    Args:
        data: Folder, searched with all its subfolders, or name of a data set on the Hub.
        streaming: Whether to stream the rows, without storing a data set from the Hub on the disk.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` if streaming, with a column `image` (not decoded) and, if there
        are labels, a column `label`.

    Raises:
        ValueError: If there are no images.
    """
    if Path(data).is_dir():
        rows = _folder(data)
        return rows.to_iterable_dataset(num_shards=min(64, len(rows))) if streaming else rows
    if Path(data).exists():
        raise ValueError(f"{data} is a file, expected a folder of images or the name of a data set on the Hub")
    try:
        rows = datasets.load_dataset(data, split="train", streaming=streaming)
    except Exception as error:  # of the network, the Hub or the files
        raise ValueError(f"{data} is neither a folder nor a data set on the Hub that can be read: {error}") from error
    kinds = {name: type(feature) for name, feature in rows.features.items()}
    image = next((name for name, kind in kinds.items() if kind is datasets.Image), None)
    label = next((name for name, kind in kinds.items() if kind is datasets.ClassLabel), None)
    if image is None:
        raise ValueError(f"{data} has no column of images, only {', '.join(kinds)}")
    rows = rows.select_columns([image] + ([label] if label else []))
    for name, ours in ((image, "image"), (label, "label")):
        if name not in (ours, None):
            rows = rows.rename_column(name, ours)
    return rows.cast_column("image", datasets.Image(decode=False))


def _folder(folder: str) -> datasets.Dataset:
    """The image files of a folder, without load_dataset, which interprets names such as train and test as splits."""
    known = tuple(Image.registered_extensions())
    files = [file for file in list_files(folder) if file.lower().endswith(known)]
    if not files:
        raise ValueError(f"{folder} has no file with the extension of an image ({', '.join(known[:5])}, ...)")
    folders = [os.path.basename(os.path.dirname(os.path.abspath(file))) for file in files]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=sorted({*folders}))}
    images = [{"path": file, "bytes": None} for file in files]
    return datasets.Dataset.from_dict({"image": images, "label": folders}, datasets.Features(features))


def image_paths(rows: datasets.Dataset) -> list[str]:
    """The paths of all images, in the order of the rows."""
    # Chunk by chunk, without reading the files' content, which the chunks may contain as well.
    return [path for chunk in rows.data["image"].chunks for path in chunk.field("path").to_pylist()]


class Images(Dataset[Any]):
    """Images (3, size, size), with labels if there are any. Raises an error for an image that cannot be decoded.

    Args:
        rows: Rows of `open_images`.
        size: Height and width of the images.
        transform: Function that maps decoded images, bytes (3, size, size), to the samples.
    """

    def __init__(self, rows: Any, size: int, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.rows, self.size, self.transform = rows, size, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.sample(self.rows[index])

    def sample(self, row: dict[str, Any]) -> Any:
        """The image of a row, or (image, label) if the row has a label."""
        image = read_image(row["image"]["bytes"] or row["image"]["path"], self.size)
        image = self.transform(image) if self.transform else image
        return (image, row["label"]) if "label" in row else image

    def name(self, index: int) -> str:
        """The path of the file, or the index if the path is unknown."""
        return self.rows[index]["image"]["path"] or f"image {index}"
