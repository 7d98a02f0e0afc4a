"""Image files of many kinds, good and bad, for the tests of vision."""

import io

import numpy as np
from PIL import Image

RED = (250, 10, 10)


def picture(mode="RGB", size=(48, 32), color=RED, **options):
    return Image.new("RGB", size, color).convert(mode, **options)


def grey16():
    return Image.fromarray(np.linspace(0, 4095, 48 * 32).reshape(32, 48).astype(np.uint16))  # from a 12-bit camera


def half(size=(48, 32)):
    """Red on the left, black on the right."""
    image = Image.new("RGB", size)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image


def rotated(file):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    half().save(file, exif=exif)


def truncated(file):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(data, "JPEG")
    file.write_bytes(data.getvalue()[: data.tell() // 2])


GOOD = {
    "jpeg": lambda file: picture().save(file.with_suffix(".jpg")),
    "png": lambda file: picture().save(file.with_suffix(".png")),
    "cmyk": lambda file: picture("CMYK").save(file.with_suffix(".jpg")),
    "palette": lambda file: picture("P").save(file.with_suffix(".png")),
    "transparent": lambda file: picture("RGBA").save(file.with_suffix(".png")),
    "gif": lambda file: picture("P").save(file.with_suffix(".gif")),
}
BAD = {
    "truncated": lambda file: truncated(file.with_suffix(".jpg")),
    "zero bytes": lambda file: file.with_suffix(".jpg").touch(),
    "text": lambda file: file.with_suffix(".jpg").write_text("no image"),
    "1 x 1": lambda file: picture(size=(1, 1)).save(file.with_suffix(".png")),
    "web page": lambda file: file.with_suffix(".png").write_text("<html>"),
}


def written(write, folder):
    write(folder / "image")
    (file,) = folder.iterdir()
    return str(file)
