"""Reading one image file."""

import io
import sys
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageFile, ImageOps
from torch import Tensor

SMALLEST = 8  # pixels; smaller images are tracking pixels and similar
GDAL_NODATA = 42113  # the TIFF tag that names the value of missing pixels, as text
OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
GREY_LEVELS = {"1": 2, "L;2": 4, "L;4": 16}

# Pillow warns about each large image and about each one with damaged metadata, in every worker: thousands of lines for
# one folder. These filters are appended, so that a program's own come first.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, module=r"PIL\.", append=True)


def read_image(source: str | bytes, size: int, *, background: str = "white") -> Tensor:
    """Read an image of any mode as bytes (3, size, size), upright and cropped to its central square.

    Transparent pixels show the background, whatever colour the file stores for them. Only the first frame is read.

    Grey images of 16 bits or more are scaled so that the 0.1th percentile of the valid pixels becomes 0 and the 99.9th
    becomes 255. Missing pixels become 0. They are NaN, infinite or beyond 1e30, or have the value of the tag
    GDAL_NODATA. Without the tag, pixels with the smallest or largest value, such as -9999 or 65535, are also missing if
    they are more than 0.1% of the image, the value is not 0, there are at least 32 other values, and it is farther from
    all of these than they are from each other.

    Colour images of 16 bits keep their brightness. But if the 99.9th percentile is in the lower half of the range, as
    in images of a 12-bit camera, one factor for all channels scales it to 255, so hues do not change.

    Args:
        source: Path of the file, or its content.
        size: Height and width in pixels to which the image is scaled.
        background: Colour behind transparent pixels, as a name or in another form that `PIL.ImageColor` understands,
            such as "#808080".

    Returns:
        Tensor of dtype uint8 and shape (3, size, size).

    Raises:
        Exception: Any error of Pillow if it cannot decode the file.
        ValueError: If the image is less than 8 pixels high or wide, has no valid pixel, or is a dark colour image of 16
            bits of which Pillow reads only the upper 8; if the background is not a colour.
    """
    ImageColor.getrgb(background)
    with _open(source) as opened:
        if min(opened.size) < SMALLEST:
            raise ValueError(
                f"image of {opened.size[0]} x {opened.size[1]} pixels, expected at least {SMALLEST} each way"
            )
        opened.draft("", (size, size))  # decodes a JPEG at 1/2, 1/4 ... of its size if that is enough
        tiles = opened.tile = [_tile(*tile) for tile in opened.tile]  # how Pillow is going to decode the file
        image = _upright(opened)
        if image.mode.startswith(("I", "F")):
            image = _scaled_grey(image, _missing_value(opened))
        elif image.mode in ("RGB", "RGBA") and tiles and _raw_mode(tiles[0])[-4:] in OTHER_BYTE:
            image = _scaled_colours(image, source, tiles)
        elif tiles and (levels := GREY_LEVELS.get(_raw_mode(tiles[0]))):
            _scale_transparency(image, levels)
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        image = Image.new("RGB", image.size, background)
        image.paste(visible, mask=visible)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _open(source: str | bytes) -> Any:  # ImageFile, whose `tile` Pillow types differently in each version
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _upright(opened: Any) -> Image.Image:
    opened.load()
    try:
        return ImageOps.exif_transpose(opened)
    except Exception:  # damaged metadata; the pixels have been decoded
        image: Image.Image = opened.copy()
        return image


def _missing_value(opened: Any) -> float:
    """The value of GDAL_NODATA, or NaN."""
    try:
        return float(str(getattr(opened, "tag_v2", {})[GDAL_NODATA]).strip("\0 "))
    except (KeyError, ValueError):
        return float("nan")


def _scaled_grey(image: Image.Image, missing_value: float) -> Image.Image:
    """Grey values of any range -> bytes, with their opacity if one value is transparent."""
    pixels = np.asarray(image, dtype=np.float64)
    opaque = pixels != image.info.get("transparency", np.nan)
    valid = opaque & (np.abs(pixels) < 1e30) & ~np.isclose(pixels, missing_value, rtol=1e-6, atol=0)
    if not valid.any():
        raise ValueError("image without a valid pixel: all are missing or transparent")
    low, high = _range(pixels[valid])
    for value in {low, high} - {0.0} if np.isnan(missing_value) else ():
        others = pixels[valid & (pixels != value)]
        if others.size and np.abs(others - value).min() > np.ptp(others) and len(np.unique(others)) >= 32:
            valid &= pixels != value
    low, high = _range(pixels[valid])
    pixels = np.where(valid, (pixels - low) / ((high - low) or 1.0), 0).clip(0, 1) * 255
    bands = [pixels] if opaque.all() else [pixels, opaque * 255]
    return Image.merge("LA"[: len(bands)], [Image.fromarray(band.astype(np.uint8)) for band in bands])


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """The range without 0.1% of the values on each side; for sparse values, which would vanish, the whole range."""
    low, high = np.percentile(values, (0.1, 99.9)).tolist()
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def _tile(codec: str, extents: Any, offset: int, args: Any) -> Any:
    """A tile, with both bytes of a PPM file instead of bytes that Pillow computes."""
    if (codec, args) == ("ppm", ("RGB", 65535)):
        codec, args = "raw", ("RGB;16B", 0, 1)
    return getattr(ImageFile, "_Tile", lambda *parts: parts)(codec, extents, offset, args)  # tuples before Pillow 11


def _raw_mode(tile: Any) -> str:
    return str(tile[3] if isinstance(tile[3], str) else (tile[3] or [""])[0])


def _scaled_colours(image: Image.Image, source: str | bytes, tiles: list[Any]) -> Image.Image:
    """Colours of 16 bits, of which Pillow has read the upper 8."""
    upper, hidden = np.asarray(image), image.info.get("transparency")
    opaque = upper[..., 3] if image.mode == "RGBA" else np.full(upper.shape[:2], 255, np.uint8)
    if not opaque.any() or (hidden is None and np.percentile(upper[opaque > 0, :3], 99.9) >= 128):
        return image
    pixels = upper[..., :3] * 256.0 + _lower_bytes(source, tiles)
    if hidden is not None:
        opaque = (pixels != hidden).any(axis=2) * np.uint8(255)
    visible = pixels[opaque > 0]
    bright = (np.percentile(visible, 99.9) or visible.max()) if visible.any() else 1.0
    pixels = (pixels / (bright if bright < 2**15 else 2**16 - 1)).clip(0, 1) * 255
    return Image.fromarray(np.dstack([pixels.astype(np.uint8), opaque]))


def _lower_bytes(source: str | bytes, tiles: list[Any]) -> NDArray[np.uint8]:
    """The lower 8 bits: Pillow reads them as the upper ones if it is told the other byte order."""
    with _open(source) as opened:
        modes = {_raw_mode(tile) for tile in tiles}
        if "RGBa" in str(modes) or getattr(opened, "tag_v2", {}).get(284) == 2:  # planes, or colours times opacity
            raise ValueError(
                "dark image of 16 bits a channel, stored in planes or multiplied by its opacity, of which Pillow "
                "reads only the upper 8 bits: save it as PNG"
            )
        opened.tile = [_of_lower_bytes(tile) for tile in tiles]
        lower = np.asarray(_upright(opened))
    return lower[..., 1:2] if modes == {"LA;16B"} else lower[..., :3]


def _of_lower_bytes(tile: Any) -> Any:
    codec, extents, offset, args = tile
    mode = _raw_mode(tile)
    # Four bytes as they are, the lower one of the grey value in second place; or the same mode in the other order.
    other = "RGBA" if mode == "LA;16B" else mode[:-4] + OTHER_BYTE[mode[-4:]]
    return _tile(codec, extents, offset, other if isinstance(args, str) else (other, *args[1:]))


def _scale_transparency(image: Image.Image, levels: int) -> None:
    """Pillow scales grey values of 1, 2 and 4 bits to bytes, but not the value that is transparent."""
    value = image.info.get("transparency")
    if isinstance(value, int) and value < levels:
        image.info["transparency"] = value * 255 // (levels - 1)
