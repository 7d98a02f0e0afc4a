"""Reading one image file."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SMALLEST = 8  # pixels; smaller images are tracking pixels and similar


def read_image(source: str | bytes, size: int) -> Tensor:
    """Read an image of any mode as bytes (3, size, size), upright and cropped to its central square.

    Grey images of 16 bits or more are scaled so that the 0.1th percentile becomes 0 and the 99.9th becomes 255.

    Args:
        source: Path of the file, or its content.
        size: Height and width in pixels to which the image is scaled.

    Raises:
        Exception: Any error of Pillow if it cannot decode the file.
        ValueError: If the image is less than 8 pixels high or wide.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        if min(opened.size) < SMALLEST:
            raise ValueError(
                f"image of {opened.size[0]} x {opened.size[1]} pixels, expected at least {SMALLEST} each way"
            )
        opened.draft("", (size, size))  # decodes a JPEG at 1/2, 1/4 ... of its size if that is enough
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            pixels = np.asarray(image, dtype=np.float64)
            valid = pixels[np.abs(pixels) < 1e30]  # missing pixels are NaN, infinite or -3.4e38
            dark, bright = np.percentile(valid, (0.1, 99.9))
            pixels = np.nan_to_num((pixels - dark) / ((bright - dark) or 1.0))
            image = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
