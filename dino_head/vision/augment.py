"""Views for DINO, made in batches on the device with kornia.

Sizes: B samples, C channels, H and W pixels.
"""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MultiCrop(nn.Module):
    """Global views, then local ones, each sample with its own random draw.

    Args:
        global_views: for each global view a module, images (B, C, H, W) in [0, 1] -> that view.
        local_view: images (B, C, H, W) in [0, 1] -> one local view.
        local_views: how many local views.
        value_range: what is 0 and what is 1 in the images that come in; (0, 255) for bytes.
    """

    def __init__(
        self,
        global_views: Sequence[nn.Module],
        local_view: nn.Module,
        local_views: int = 8,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.global_views = nn.ModuleList(global_views)
        self.local_view = local_view
        self.local_views = local_views
        self.value_range = value_range

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W), of bytes or floating point -> global views, then local views."""
        low, high = self.value_range
        images = (images.to(torch.float32) - low) / (high - low)
        views = [*self.global_views, *[self.local_view] * self.local_views]
        return [view(images) for view in views]


def dino_views(
    global_size: int = 224,
    local_size: int = 96,
    local_views: int = 8,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    channels: int = 3,
    value_range: tuple[float, float] = (0.0, 255.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> MultiCrop:
    """The published recipe: two global and eight local views (Caron et al. 2021, section 3.2, and their main_dino.py).

    A random crop, mirrored in half of the cases, with its colours jittered (0.8) or gone (0.2); blurred (first global
    view 1.0, second 0.1, local views 0.5); solarised (second global view 0.2).

    Args:
        global_size: The height and width of the global views.
        local_size: The height and width of the local views; for a ViT a multiple of its patches.
        local_views: The number of local views.
        global_scale: The share of the image's area that a global view shows, from and to.
        local_scale: The share of the image's area that a local view shows; it should end where global_scale begins.
        channels: The number C of channels. Saturation, hue and grey are for 3 alone; others are jittered in brightness
            and contrast.
        value_range: The values that are black and white in the images; (0, 255) for bytes.
        mean: The mean of each channel, in [0, 1]; without it, ImageNet's for 3 channels, 0.5 for others.
        std: The standard deviation of each channel; without it, ImageNet's for 3 channels, 0.25 for others.
    """
    mean = mean or (IMAGENET_MEAN if channels == 3 else (0.5,) * channels)
    std = std or (IMAGENET_STD if channels == 3 else (0.25,) * channels)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std need a value for each of {channels} channels, got {len(mean)} and {len(std)}")

    def view(size: int, scale: tuple[float, float], blur: float, solarise: float = 0.0) -> nn.Module:
        if channels == 3:
            colours = [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
        else:
            colours = [K.ColorJitter(0.4, 0.4, p=0.8)]
        return nn.Sequential(
            # Bilinear: kornia's bicubic crops mix in what is beyond the border.
            K.RandomResizedCrop((size, size), scale=scale, cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            *colours,
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur),
            K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=solarise),
            K.Normalize(torch.tensor(mean), torch.tensor(std)),
        )

    first, second = view(global_size, global_scale, 1.0), view(global_size, global_scale, 0.1, solarise=0.2)
    return MultiCrop([first, second], view(local_size, local_scale, 0.5), local_views, value_range)
