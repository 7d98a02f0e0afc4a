"""A dataset of images, from a folder or from the Hugging Face Hub, decoded in workers."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageColor
from torch import Tensor
from torch.utils.data import Dataset

from dino_head.vision.files import printable, select_files
from dino_head.vision.reading import read_image

WITHOUT_EXTENSION = {
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
    "TIFF",
    "BMP",
    "JPEG2000",
    "AVIF",
}  # formats that begin with a signature


def open_images(data: str, streaming: bool = False) -> Any:
    """Open a folder of images, labelled by the name of their folder, or the training split of a data set.

    A folder's images are the files with an extension that Pillow knows, and files without any extension whose first
    bytes are those of a JPEG, PNG, GIF, WebP, TIFF, BMP, JPEG 2000 or AVIF file. The other files are counted by
    extension and logged.

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
    formats = [name for name in WITHOUT_EXTENSION if name in Image.OPEN]

    def is_image(file: str) -> bool:
        if os.path.splitext(file)[1]:
            return file.lower().endswith(known)
        try:
            with Image.open(file, formats=formats):
                return True
        except Exception:  # a README, for example
            return False

    files = select_files(folder, is_image)
    if not files:
        raise ValueError(f"{folder} has no file with the extension of an image ({', '.join(known[:5])}, ...)")
    labels = [printable(os.path.basename(os.path.dirname(os.path.abspath(file)))) for file in files]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=sorted({*labels}))}
    images = [{"path": _encoded(file), "bytes": None} for file in files]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, datasets.Features(features))


def _encoded(path: str) -> str:
    """A path that Arrow can store: bytes that are not UTF-8, surrogates in Python, follow a NUL, which no path has."""
    return re.sub("[\ud800-\udfff]", lambda match: f"\0{ord(match[0]):x}", path)


def _decoded(path: str | None) -> str | None:
    return path and re.sub("\0(....)", lambda match: chr(int(match[1], 16)), path)


def image_path(row: dict[str, Any]) -> str | None:
    """The path of the image in a row, or None if it is unknown."""
    return _decoded(row["image"]["path"])


def image_paths(rows: datasets.Dataset) -> list[str | None]:
    """The paths of all images, in the order of the rows."""
    # Chunk by chunk, without reading the files' content, which the chunks may contain as well.
    return [_decoded(path) for chunk in rows.data["image"].chunks for path in chunk.field("path").to_pylist()]


class Images(Dataset[Any]):
    """Images (3, size, size), with labels if there are any. Raises an error for an image that cannot be decoded.

    Args:
        rows: Rows of `open_images`.
        size: Height and width of the images.
        transform: Function that maps decoded images, bytes (3, size, size), to the samples.
        background: Colour behind transparent pixels, as in `read_image`.

    Raises:
        ValueError: If the background is not a colour.
    """

    def __init__(
        self, rows: Any, size: int, transform: Callable[[Tensor], Tensor] | None = None, background: str = "white"
    ) -> None:
        ImageColor.getrgb(background)  # raise now: later, each image would be listed as unreadable
        self.rows, self.size, self.transform, self.background = rows, size, transform, background

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.sample(self.rows[index])

    def sample(self, row: dict[str, Any]) -> Any:
        """The image of a row, or (image, label) if the row has a label."""
        source = row["image"]["bytes"] or image_path(row) or ""
        image = read_image(source, self.size, background=self.background)
        image = self.transform(image) if self.transform else image
        return (image, row["label"]) if "label" in row else image

    def name(self, index: int) -> str:
        """The path of the file, or the index if the path is unknown."""
        return image_path(self.rows[index]) or f"image {index}"
