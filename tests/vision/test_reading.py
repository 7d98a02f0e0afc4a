import io

import numpy as np
import pytest
import torch
from helpers.pictures import BAD, GOOD, RED, grey16, half, picture, rotated, written
from PIL import Image

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
