"""Augmentation of volumes: views for DINO, computed with MONAI.

Sizes: B samples, C channels, D, H and W voxels.
"""

import torch
from torch import Tensor, nn

from dino_head._extras import packages_of_extras

with packages_of_extras("dino_head.vision.volume_views"):
    from monai import transforms as mt


class VolumeViews(nn.Module):
    """Two global and several local views of each volume: random crops, flips, rotations, blur, noise and intensity.

    Random parameters are drawn for each sample, from torch's random state.

    Args:
        global_size: Number of voxels of a global view along each axis.
        local_size: Number of voxels of a local view along each axis.
        local_views: Number of local views.
        global_scale: Smallest and largest side of a global crop, as shares of the volume's side.
        local_scale: Smallest and largest side of a local crop, as shares of the volume's side.
    """

    def __init__(
        self,
        global_size: int = 24,
        local_size: int = 12,
        local_views: int = 4,
        global_scale: tuple[float, float] = (0.75, 1.0),
        local_scale: tuple[float, float] = (0.4, 0.75),
    ) -> None:
        super().__init__()
        self.views = [(global_size, *global_scale)] * 2 + [(local_size, *local_scale)] * local_views
        self.appearance = mt.Compose(
            [
                *[mt.RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)],
                mt.RandRotate90(prob=0.5, spatial_axes=(0, 1)),
                mt.RandScaleIntensity(factors=0.3, prob=0.8),
                mt.RandShiftIntensity(offsets=0.1, prob=0.8),
                mt.RandGaussianSmooth(sigma_x=(0.25, 1.0), sigma_y=(0.25, 1.0), sigma_z=(0.25, 1.0), prob=0.3),
                mt.RandGaussianNoise(std=0.05, prob=0.5),
            ]
        )

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """Volumes (B, C, D, H, W) -> global views, then local views."""
        self.appearance.set_random_state(int(torch.randint(2**31, (1,))))
        return [torch.stack([self.view(volume, *view) for volume in volumes]) for view in self.views]

    def view(self, volume: Tensor, size: int, smallest: float, largest: float) -> Tensor:
        """A volume (C, D, H, W) -> a random crop of it, resized to (C, size, size, size)."""
        sides = torch.tensor(volume.shape[1:]).float() * torch.empty(1).uniform_(smallest, largest)
        crop = mt.RandSpatialCrop(sides.round().int().clamp(min=1).tolist(), random_size=False)
        crop.set_random_state(int(torch.randint(2**31, (1,))))
        view = mt.Resize((size,) * 3, mode="trilinear")(crop(volume))
        result: Tensor = self.appearance(view).as_tensor()
        return result
