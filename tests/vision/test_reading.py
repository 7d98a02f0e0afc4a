import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.pictures import BAD, GOOD, RED, grey16, half, picture, png, ppm, rotated, tiff, written
from PIL import Image, ImageCms, TiffImagePlugin, TiffTags

from dino_head.vision import read_image


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_image_becomes_bytes_of_one_size(kind, tmp_path):
    image = read_image(written(GOOD[kind], tmp_path), 16)
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
    assert (image.float().mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 8


def test_16_bits_are_scaled_to_8(tmp_path):
    image = read_image(written(lambda file: grey16().save(file.with_suffix(".tif")), tmp_path), 32)
    assert image.min() < 10
    assert image.max() > 245
    assert image[0, -1].float().mean() > image[0, 0].float().mean() + 150


@pytest.mark.parametrize("missing", [np.nan, np.inf, -3.4e38])
def test_missing_pixels_do_not_darken_the_others(missing, tmp_path):
    pixels = np.linspace(0, 1e-3, 64 * 64, dtype=np.float32).reshape(64, 64)
    pixels[0] = missing
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    image = read_image(str(tmp_path / "a.tif"), 64).float()
    assert image[0, -4:].mean() > 230
    assert 100 < image[0, 30:34].mean() < 155
    assert image[0, 2:6].mean() < 20


def test_a_photo_is_turned_upright(tmp_path):
    image = read_image(written(lambda file: rotated(file.with_suffix(".jpg")), tmp_path), 16).float()
    assert image[0, :6].mean() > 200  # red is on top now
    assert image[0, -6:].mean() < 50


def test_images_are_cropped_to_the_central_square():
    data = io.BytesIO()
    half((320, 80)).save(data, "PNG")
    image = read_image(data.getvalue(), 40).float()
    assert image[0, :, :18].mean() > 240
    assert image[0, :, -18:].mean() < 10


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    sizes = []
    fit = read_image.__globals__["ImageOps"].fit
    monkeypatch.setattr(
        "dino_head.vision.reading.ImageOps.fit", lambda image, *args: sizes.append(image.size) or fit(image, *args)
    )
    read_image(written(lambda file: picture(size=(1600, 1200)).save(file.with_suffix(".jpg")), tmp_path), 100)
    assert sizes == [(200, 150)]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_raises(kind, tmp_path):
    with pytest.raises((OSError, ValueError)):
        read_image(written(BAD[kind], tmp_path), 16)


def saved(image, kind, **options):
    """The content of a file."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


GREY = np.linspace(0, 1, 32 * 32).reshape(32, 32)
COLOURS = np.stack([GREY, GREY / 2, GREY / 4], axis=2)  # of one hue
OPAQUE = np.ones((32, 32, 1))
DEEP = {  # files of 16 bits a channel, of values from 0 to 1 times the largest
    "png": lambda largest: png(COLOURS * largest),
    "png with opacity": lambda largest: png(np.dstack([COLOURS * largest, OPAQUE * 65535])),
    "png with a transparent colour": lambda largest: png(COLOURS * largest, transparent=(1, 1, 0)),
    "tiff, II": lambda largest: tiff(COLOURS * largest, "<"),
    "tiff, MM": lambda largest: tiff(COLOURS * largest, ">"),
    "tiff, II, compressed": lambda largest: tiff(COLOURS * largest, "<", compressed=True),
    "tiff, MM, compressed": lambda largest: tiff(COLOURS * largest, ">", compressed=True),
    "tiff with opacity": lambda largest: tiff(np.dstack([COLOURS * largest, OPAQUE * 65535]), extra=2),
    "tiff with a fourth channel": lambda largest: tiff(np.dstack([COLOURS * largest, OPAQUE * 7]), extra=0),
    "ppm": lambda largest: ppm(COLOURS * largest),
}


@pytest.mark.parametrize("largest", [65535, 4095, 1023, 200])
@pytest.mark.parametrize("kind", DEEP)
def test_colours_of_16_bits_become_bytes_of_the_same_hue(kind, largest):
    image = read_image(DEEP[kind](largest), 32)
    expected = torch.tensor(COLOURS * 255).permute(2, 0, 1)
    assert (image - expected).abs().max() < 2 + 255 / largest


@pytest.mark.parametrize("largest", [65535, 4095])
def test_grey_of_16_bits_with_opacity(largest):
    image = read_image(png(np.dstack([GREY * largest, OPAQUE * 65535])), 32)
    assert (image - torch.tensor(GREY * 255)).abs().max() < 2
    half = np.dstack([GREY * largest, OPAQUE * 32768])
    assert (read_image(png(half), 32) - torch.tensor(GREY * 127 + 128)).abs().max() < 2


@pytest.mark.parametrize("options", [{"planes": True, "compressed": True}, {"extra": 1}])
def test_dark_colours_of_16_bits_that_pillow_cannot_read_raise(options):
    pixels = np.dstack([COLOURS, OPAQUE])[..., : 4 if "extra" in options else 3]
    assert read_image(tiff(pixels * 65535, **options), 32).max() == 255
    with pytest.raises(ValueError, match=r"dark image of 16 bits a channel.*only the upper 8 bits: save it as PNG"):
        read_image(tiff(pixels * [4095, 4095, 4095, 65535][: pixels.shape[2]], **options), 32)


def test_colours_of_16_bits_that_are_all_black_stay_black():
    assert read_image(png(COLOURS * 0), 32).eq(0).all()


def test_a_few_bright_pixels_of_16_bits_are_kept():
    """Both percentiles are 0, and the smallest value becomes 0, the largest 255."""
    for channels in (1, 3):
        pixels = np.zeros((64, 64, channels))
        pixels[32, 32], pixels[40, 40] = 1000, 500
        image = read_image(png(pixels), 64).int()
        assert image[0, 32, 32] > image[0, 40, 40] + 50
        assert image[0, 40, 40] > 50


def ink(mode, hidden=0):
    """A black square on transparent pixels of the colour `hidden`."""
    square = Image.new("L", (32, 32))
    square.paste(255, (8, 8, 24, 24))
    black = Image.composite(Image.new("L", (32, 32)), Image.new("L", (32, 32), hidden), square)
    return Image.merge(mode, [*[black] * (len(mode) - 1), square])


def palette(hidden=0):
    image = ink("LA").getchannel("A").point(lambda value: value // 255).convert("P")
    image.putpalette([hidden] * 3 + [0] * 3)
    return image


INK = {
    "png": lambda hidden: saved(ink("RGBA", hidden), "PNG"),
    "grey png": lambda hidden: saved(ink("LA", hidden), "PNG"),
    "png of 16 bits": lambda hidden: png(np.asarray(ink("RGBA", hidden)) * 257.0),
    "grey png of 16 bits": lambda hidden: png(np.asarray(ink("LA", hidden)) * 257.0),
    "webp": lambda hidden: saved(ink("RGBA", hidden), "WEBP", lossless=True, exact=True),
    "tiff": lambda hidden: saved(ink("RGBA", hidden), "TIFF"),
    "tga": lambda hidden: saved(ink("RGBA", hidden), "TGA"),
    "palette": lambda hidden: saved(palette(hidden), "PNG", transparency=0),
    "palette with opacities": lambda hidden: saved(palette(hidden), "PNG", transparency=b"\0\xff"),
    "gif": lambda hidden: saved(palette(hidden), "GIF", transparency=0),
    "grey with a transparent value": lambda hidden: png(9 - np.asarray(palette()) * 9, 8, transparent=(9,)),
    "1 bit": lambda hidden: png(1 - np.asarray(palette()), 1, transparent=(1,)),
    "2 bits": lambda hidden: png(3 - np.asarray(palette()) * 3, 2, transparent=(3,)),
    "4 bits": lambda hidden: png(15 - np.asarray(palette()) * 15, 4, transparent=(15,)),
    "16 bits": lambda hidden: png(9 - np.asarray(palette()) * 9, 16, transparent=(9,)),
    "colours with a transparent one": lambda hidden: png(
        np.stack([9 - np.asarray(palette()) * 9] * 3, axis=2), 8, transparent=(9, 9, 9)
    ),
    "16 bits with a transparent colour": lambda hidden: png(
        np.stack([9 - np.asarray(palette()) * 9] * 3, axis=2), 16, transparent=(9, 9, 9)
    ),
}


@pytest.mark.parametrize("kind", INK)
def test_transparent_pixels_show_the_background_and_not_their_hidden_colour(kind):
    images = [read_image(INK[kind](hidden), 32) for hidden in (0, 90, 255)]
    assert all(torch.equal(image, images[0]) for image in images)
    assert images[0][:, :6].eq(255).all()
    assert images[0][:, 10:22, 10:22].lt(10).all()
    smaller = [read_image(INK[kind](hidden), 20) for hidden in (0, 90, 255)]
    assert all(torch.equal(image, smaller[0]) for image in smaller)  # no hidden colour at the edges
    red = read_image(INK[kind](90), 32, background="#ff0000")
    assert red[:, 2, 2].tolist() == [255, 0, 0]
    assert red[:, 16, 16].lt(10).all()


def test_a_half_transparent_pixel_is_mixed_with_the_background():
    image = saved(Image.new("RGBA", (32, 32), (200, 0, 0, 128)), "PNG")
    assert read_image(image, 8)[:, 4, 4].tolist() == [227, 127, 127]
    assert read_image(image, 8, background="black")[:, 4, 4].tolist() == [100, 0, 0]


def test_a_background_that_is_no_colour_raises():
    with pytest.raises(ValueError, match="unknown color specifier: 'whit'"):
        read_image(saved(picture(), "PNG"), 16, background="whit")


def in_modes():
    lab = ImageCms.profileToProfile(
        picture(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    other = {"save_all": True, "append_images": [picture(color="blue")]}
    yield from [(picture("CMYK"), "TIFF", {}), (picture("YCbCr"), "TIFF", {"compression": "jpeg"}), (lab, "TIFF", {})]
    yield from [(picture("PA"), "TIFF", {}), (picture("RGBX"), "TIFF", {}), (picture("RGBA"), "JPEG2000", {})]
    yield from [(picture(), "TIFF", other), (picture(), "GIF", other), (picture(), "PNG", other)]
    yield (picture(), "WEBP", other)


@pytest.mark.parametrize("image", [*in_modes()], ids=lambda image: f"{image[1]} {image[0].mode} {len(image[2])}")
def test_every_mode_and_the_first_of_several_frames(image):
    image, kind, options = image
    pixels = read_image(saved(image, kind, **options), 16)
    assert (pixels.float().mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 8


def test_white_of_1_bit_is_white():
    for kind in ("PNG", "TIFF", "BMP"):
        assert read_image(saved(Image.new("1", (32, 32), 1), kind), 16).eq(255).all()


def raster(values, tag=None):
    """A TIFF file of one band whose first rows are missing, with the tag GDAL_NODATA."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if tag is not None:
        info[42113] = tag
        info.tagtype[42113] = TiffTags.ASCII
    return saved(Image.fromarray(values), "TIFF", tiffinfo=info)


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    ("kind", "scale", "value", "tag"),
    [
        ("f4", 1, -9999, "-9999"),
        ("f4", 1, -32768, "-32768"),
        ("f4", 1, -3.4028235e38, "-3.4028234663852886e+38"),
        ("f4", 1, np.nan, "nan"),
        ("f4", 1, np.inf, "inf"),
        ("f4", 1, 1e20, "1e+20"),
        ("u2", 3000, 65535, "65535"),
        ("i2", 3000, -32768, "-32768 "),
        ("i4", 3000, -(2**31), "-2147483648"),
        ("i4", 3000, 2**31 - 1, "2147483647"),
    ],
)
def test_missing_pixels_do_not_affect_the_scaling(kind, scale, value, tag, tagged):
    values = np.tile(np.linspace(0, 1, 64), (64, 1)) * scale
    expected = read_image(raster(values.astype(kind)), 64)
    values[:5] = value
    image = read_image(raster(values.astype(kind), tag if tagged else None), 64)
    assert torch.equal(image[:, 8:], expected[:, 8:])
    assert image[:, :3].eq(0).all()


def test_a_missing_value_inside_the_range_of_the_others_needs_the_tag():
    values = np.tile(np.linspace(-1, 1, 64), (64, 1)).astype("f4")
    expected = read_image(raster(values), 64)
    values[:5] = 0.5
    assert read_image(raster(values, "0.5"), 64)[:, :3].eq(0).all()
    assert read_image(raster(values), 64)[:, :3].gt(180).all()
    assert torch.equal(read_image(raster(values, "0.5"), 64)[:, 8:], expected[:, 8:])
    assert torch.equal(read_image(raster(values, "none"), 64)[:, 8:], expected[:, 8:])


@pytest.mark.parametrize(
    "values",
    [
        np.where(GREY > 0.5, 1, 0),  # a mask
        np.where(GREY > 0.5, 60000, (GREY * 9).astype(int)),  # labels
        np.where(GREY > 0.5, 40000 + GREY * 900, 0),  # objects on black
        np.where(GREY > 0.9, 60000, GREY * 40000),  # overexposed
    ],
    ids=["mask", "labels", "black", "overexposed"],
)
def test_an_extreme_value_that_belongs_to_the_image_is_kept(values):
    image = read_image(saved(Image.fromarray(values.astype("u2")), "PNG"), 32)
    assert image[:, -1].eq(255).all() or image[:, -1].gt(245).all()
    assert image[:, 0].lt(10).all()


def test_one_overexposed_pixel_stays_bright():
    values = np.tile(np.linspace(0, 1, 64), (64, 1)).astype("f4")
    values[20, 20] = 1e6
    image = read_image(raster(values), 64)
    assert image[0, 20, 20] > 200
    assert image[0, 30, 40] > 120


@pytest.mark.parametrize("value", [0, 7, -9999])
def test_a_constant_image_becomes_0(value):
    assert read_image(raster(np.full((32, 32), value, "f4")), 16).eq(0).all()


def test_an_image_of_missing_pixels_alone_raises():
    with pytest.raises(ValueError, match="image without a valid pixel"):
        read_image(raster(np.full((32, 32), np.nan, "f4")), 16)


NOISY = """
import io, struct, torch
from torch.utils.data import DataLoader
from PIL import Image, ImageCms, TiffImagePlugin, TiffTags
from dino_head.vision import read_image
Image.MAX_IMAGE_PIXELS = 40 * 40

class Files(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        data = io.BytesIO()
        image = Image.new("P", (48, 40 + index))
        exif = b"Exif\\0\\0MM\\0*\\0\\0\\0\\x08\\0\\x09" + bytes(8)
        if index % 2:
            image.putpalette([9] * 6)
            image.save(data, "PNG", transparency=b"\\0\\xff")
        else:
            image.convert("RGB").save(data, "JPEG", exif=exif)
        return read_image(data.getvalue(), 16)

if __name__ == "__main__":
    assert len([*DataLoader(Files(), 2, num_workers=2)]) == 4
    print("read")
"""


def test_many_images_about_which_pillow_warns_print_nothing(tmp_path):
    """Large images, palettes with opacities and truncated EXIF data; in a process without pytest's filters."""
    (tmp_path / "noisy.py").write_text(NOISY)
    result = subprocess.run([sys.executable, str(tmp_path / "noisy.py")], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("read\n", "")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("exif", [b"", b"no EXIF", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\xff\xff\xff\xff"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_does_not_matter(kind, exif):
    image = read_image(saved(picture(), kind, exif=b"Exif\0\0" + exif), 16)
    assert (image.float().mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 8
