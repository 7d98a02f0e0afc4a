"""Measures each probability of the published recipe, on images where no other augmentation has the same effect."""

import math

import pytest
import torch
from kornia.augmentation import RandomGaussianBlur

from dino_head.vision.augment import dino_views

N = 2000
SMALL = {
    "global_size": 16,
    "local_size": 8,
    "local_views": 1,
    "value_range": (0.0, 1.0),
    "mean": (0.0,) * 3,
    "std": (1.0,) * 3,
}
VIEWS = ("first", "second", "local")


def views_of(images, **options):
    """The two global views and a local one of each image."""
    torch.manual_seed(0)
    return dict(zip(VIEWS, dino_views(**SMALL | options)(images), strict=True))


def constant(*values):
    return torch.tensor(values).reshape(1, 3, 1, 1).expand(N, 3, 16, 16)


def assert_share(happened, probability):
    """Within four standard errors."""
    error = math.sqrt(probability * (1 - probability) / N)
    assert abs(happened.float().mean().item() - probability) <= 4 * error, happened.float().mean()


@pytest.mark.parametrize("name", VIEWS)
def test_colours_are_jittered_with_probability_0_8(name):
    view = views_of(constant(0.3, 0.3, 0.3))[
        name
    ]  # grey stays grey; contrast and blur leave it, too dark for solarising
    jittered = (view.mean(dim=(1, 2, 3)) - 0.3).abs() > 1e-4
    assert_share(jittered, 0.8)
    assert 0.3 * 0.6 - 1e-3 < view.amin() < 0.3 * 0.65
    assert 0.3 * 1.35 < view.amax() < 0.3 * 1.4 + 1e-3


@pytest.mark.parametrize("name", VIEWS)
def test_images_become_grey_with_probability_0_2(name):
    view = views_of(constant(0.2, 0.3, 0.4))[name]
    assert_share(view.amax(dim=1).sub(view.amin(dim=1)).amax(dim=(1, 2)) < 1e-4, 0.2)


@pytest.mark.parametrize("name", VIEWS)
def test_images_are_mirrored_with_probability_0_5(name):
    ramp = torch.linspace(0.1, 0.3, 16).expand(N, 3, 16, 16)  # too dark for solarising
    view = views_of(ramp)[name]
    assert_share(view[..., -1].mean(dim=(1, 2)) < view[..., 0].mean(dim=(1, 2)), 0.5)


@pytest.mark.parametrize(("name", "probability"), [("first", 0.0), ("second", 0.2), ("local", 0.0)])
def test_images_are_solarised_with_probability(name, probability):
    view = views_of(constant(0.95, 0.95, 0.95))[name]  # at least 0.57 after the jitter, and at most 0.43 if solarised
    assert_share(view.mean(dim=(1, 2, 3)) < 0.5, probability)


@pytest.mark.parametrize(("name", "probability"), [("first", 1.0), ("second", 0.1), ("local", 0.5)])
def test_images_are_blurred_with_probability(name, probability):
    """At sigma 0.451 a checkerboard loses half its contrast: (1 - 2a)^2 / (1 + 2a)^2, a = exp(-1 / (2 sigma^2))."""
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(N, 3, 16, 16)
    recipe = dino_views(**SMALL)
    view = {"first": recipe.global_views[0], "second": recipe.global_views[1], "local": recipe.local_view}[name]
    (blur,) = [module for module in view if isinstance(module, RandomGaussianBlur)]
    torch.manual_seed(0)
    middle = blur(board)[:, 0, 7:9, 7:9].flatten(1)
    assert_share(middle.amax(dim=1) - middle.amin(dim=1) < 0.5, probability * (2.0 - 0.451) / 1.9)


@pytest.mark.parametrize(("name", "scale"), [("first", (0.4, 1.0)), ("second", (0.4, 1.0)), ("local", (0.05, 0.4))])
def test_the_area_of_a_crop(name, scale):
    x, y = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="xy")
    images = torch.stack([x, y, x]).expand(200, 3, 64, 64)
    recipe = dino_views(**SMALL)
    view = {"first": recipe.global_views[0], "second": recipe.global_views[1], "local": recipe.local_view}[name]
    torch.manual_seed(0)
    crop = view[0](images)
    width, height = (crop[:, c].amax(dim=(1, 2)) - crop[:, c].amin(dim=(1, 2)) for c in (0, 1))
    area = width * height
    assert scale[0] * 0.8 < area.amin() < scale[0] * 1.3
    assert scale[1] * 0.8 < area.amax() < scale[1] * 1.1
    # Older versions of kornia redraw crops that do not fit into the image, as torchvision does: fewer are large.
    assert area.mean().item() == pytest.approx(sum(scale) / 2, rel=0.15)
    ratio = (width / height).log()
    assert ratio.abs().amax() < math.log(4 / 3) + 0.1
    assert ratio.amax() > 0.15
    assert ratio.amin() < -0.15


def test_sizes_and_numbers_of_the_published_recipe():
    views = dino_views()(torch.zeros(2, 3, 256, 256, dtype=torch.uint8))
    assert [tuple(view.shape) for view in views] == [(2, 3, 224, 224)] * 2 + [(2, 3, 96, 96)] * 8
    means = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])  # black, by the statistics of ImageNet
    torch.testing.assert_close(views[0].mean(dim=(0, 2, 3)), means)


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_any_number_of_channels_and_range_of_values(channels):
    recipe = dino_views(32, 16, 2, channels=channels, value_range=(-1000.0, 3000.0))
    images = torch.randint(-1000, 3000, (4, channels, 40, 50), generator=torch.Generator().manual_seed(0)).short()
    views = recipe(images)
    assert [tuple(view.shape) for view in views] == [(4, channels, 32, 32)] * 2 + [(4, channels, 16, 16)] * 2
    values = torch.cat([view.flatten() for view in views])
    assert values.min() >= -2
    assert values.max() <= 2
    assert values.std() > 0.1


def test_each_sample_has_its_own_random_draw_which_depends_on_the_seed():
    images = torch.rand(1, 3, 32, 32).expand(8, 3, 32, 32)
    one, again = (views_of(images) for _ in range(2))
    for name in VIEWS:
        assert torch.equal(one[name], again[name])
        assert len(one[name].flatten(1).unique(dim=0)) == 8


def test_statistics_of_another_number_of_channels_raise():
    with pytest.raises(ValueError, match=r"one value for each of 4 channels, got 3 and 4"):
        dino_views(channels=4, mean=(0.5,) * 3)
