"""Augmentation of images: views for DINO, computed in batches on the device with kornia.

Sizes: B samples, C channels, H and W pixels.
"""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from torch import Tensor, nn

from dino_head.vision import imagenet


class MultiCrop(nn.Module):
    """Global and local views of a batch of images; random parameters are drawn for each sample.

    Args:
        global_views: One module for each global view, which maps images (B, C, H, W) in [0, 1] to the view.
        local_view: Module that maps images (B, C, H, W) in [0, 1] to a local view.
        local_views: Number of local views.
        value_range: Values of the images that are scaled to 0 and 1; (0, 255) for bytes.
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
        """Images (B, C, H, W), bytes or floating point -> global views, then local views."""
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
    """The augmentation of DINO: two global and eight local views (Caron et al. 2021, section 3.2; main_dino.py).

    Each view is a random crop. It is flipped horizontally with probability 0.5, its colours are jittered with 0.8, and
    it is converted to grey with 0.2. The first global view is blurred with probability 1.0, the second with 0.1 and
    local views with 0.5. The second global view is solarised with probability 0.2.

    Args:
        global_size: Height and width of the global views.
        local_size: Height and width of the local views; for a ViT, a multiple of its patch size.
        local_views: Number of local views.
        global_scale: Smallest and largest share of the image's area in a global view.
        local_scale: Smallest and largest share of the image's area in a local view, usually up to the smallest share
            of a global view.
        channels: Number C of channels. Only images with 3 channels are jittered in saturation and hue and converted to
            grey; all others are jittered only in brightness and contrast.
        value_range: Values of black and white in the images; (0, 255) for bytes.
        mean: Mean of each channel, in [0, 1]. By default ImageNet's for 3 channels, and 0.5 for other numbers.
        std: Standard deviation of each channel. By default ImageNet's for 3 channels, and 0.25 for other numbers.

    Returns:
        A module that maps images (B, C, H, W) to a list of views (B, C, height, width), the global ones first.

    Raises:
        ValueError: If mean or std does not have one value for each channel.
    """
    mean = mean or (imagenet.MEAN if channels == 3 else (0.5,) * channels)
    std = std or (imagenet.STD if channels == 3 else (0.25,) * channels)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std need one value for each of {channels} channels, got {len(mean)} and {len(std)}")

    def view(size: int, scale: tuple[float, float], blur: float, solarise: float = 0.0) -> nn.Module:
        if channels == 3:
            colours = [K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
        else:
            colours = [K.ColorJitter(0.4, 0.4, p=0.8)]
        return nn.Sequential(
            # Bilinear, because kornia's bicubic crops mix in values from outside the image.
            K.RandomResizedCrop((size, size), scale=scale, cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            *colours,
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur),
            K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=solarise),
            K.Normalize(torch.tensor(mean), torch.tensor(std)),
        )

    first, second = view(global_size, global_scale, 1.0), view(global_size, global_scale, 0.1, solarise=0.2)
    return MultiCrop([first, second], view(local_size, local_scale, 0.5), local_views, value_range)
