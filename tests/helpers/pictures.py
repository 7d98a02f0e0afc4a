"""Image files of many kinds, good and bad, for the tests of vision."""

import io
import struct
import zlib

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


def png(pixels, bits=16, transparent=()):
    """A PNG file of (H, W), grey, or (H, W, C), grey and opacity, RGB or RGBA. Pillow writes only grey in 16 bits."""
    pixels = np.asarray(pixels)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = pixels.shape
    if bits >= 8:
        rows = [row.astype(f">u{bits // 8}").tobytes() for row in pixels]
    else:
        shifts = np.arange(bits)[::-1]
        rows = [np.packbits(row.astype(np.uint8) >> shifts & 1).tobytes() for row in pixels]
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
        if data or name == b"IEND"
    )


def tiff(pixels, order="<", compressed=False, planes=False, extra=None):
    """A TIFF file of 16 bits a channel (H, W, C), which Pillow cannot write. `extra` is the kind of a 4th channel."""
    pixels = np.asarray(pixels).astype(f"{order}u2")
    height, width, channels = pixels.shape
    parts = [part.tobytes() for part in (np.moveaxis(pixels, 2, 0) if planes else [pixels])]
    parts = [zlib.compress(part) if compressed else part for part in parts]
    tags = {256: width, 257: height, 258: [16] * channels, 259: 8 if compressed else 1, 262: 2, 273: [0] * len(parts)}
    tags |= {277: channels, 278: height, 279: [len(part) for part in parts], 284: 2 if planes else 1}
    tags |= {} if extra is None else {338: extra}
    values = {tag: value if isinstance(value, list) else [value] for tag, value in tags.items()}
    rest = b"".join(parts)
    first = 8 + 2 + 12 * len(values) + 4
    values[273] = [first + sum(map(len, parts[:index])) for index in range(len(parts))]
    entries = b""
    for tag, numbers in values.items():
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(data) > 4:
            data, rest = struct.pack(f"{order}I", first + len(rest)), rest + data
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + data
    begin = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(values))
    return begin + entries + bytes(4) + rest


def ppm(pixels):
    height, width, _ = np.shape(pixels)
    return f"P6 {width} {height} 65535\n".encode() + np.asarray(pixels).astype(">u2").tobytes()


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
