"""Views for DINO, made in batches on the device with kornia.

Sizes: B samples, C channels, H and W pixels.
"""

import math

import kornia.augmentation as K
from torch import Tensor, nn


class MultiCrop(nn.Module):
    """Global views, then local ones, each sample with its own random draw.

    Args:
        global_view: images (B, C, H, W) -> one global view.
        local_view: images (B, C, H, W) -> one local view.
        global_views: how many global views.
        local_views: how many local views.
    """

    def __init__(self, global_view: nn.Module, local_view: nn.Module, global_views: int = 2, local_views: int = 8):
        super().__init__()
        self.global_view = global_view
        self.local_view = local_view
        self.global_views = global_views
        self.local_views = local_views

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> global views, then local views."""
        views = [self.global_view] * self.global_views + [self.local_view] * self.local_views
        return [view(images) for view in views]


def digit_views(global_size: int = 16, local_size: int = 8) -> MultiCrop:
    """Two global and four local views for grey images of digits with values in [0, 1].

    A digit is what it is through its shape: rotated by up to 0.4 rad, cropped and stretched, brighter or darker,
    noisy; never mirrored.
    """

    def view(size: int, scale: tuple[float, float]) -> nn.Module:
        return K.ImageSequential(
            K.RandomRotation(degrees=math.degrees(0.4), p=1.0),
            K.RandomResizedCrop((size, size), scale=scale, ratio=(3 / 4, 4 / 3), cropping_mode="resample"),
            K.RandomContrast(contrast=(0.6, 1.4), clip_output=False, p=1.0),  # gain
            K.RandomBrightness(brightness=(0.9, 1.1), clip_output=False, p=1.0),  # offset of up to 0.1
            K.RandomGaussianNoise(std=0.05, p=1.0),
        )

    return MultiCrop(view(global_size, (0.6, 1.0)), view(local_size, (0.3, 0.7)), global_views=2, local_views=4)
