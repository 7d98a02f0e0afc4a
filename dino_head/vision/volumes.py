"""Volumes: scans in NIfTI files, and small ones that are made, enough to see that features tell shapes apart."""

from typing import Any

import torch
from monai import transforms as mt
from torch import Tensor, nn
from torch.utils.data import Dataset

from dino_head.vision.files import walk


def make_volumes(number: int, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy volumes (number, 1, size, size, size) in [0, 1] of four kinds, anywhere, of any radius; and the kinds."""
    random = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij"))
    volumes, kinds = [], torch.arange(number) % 4
    for kind in kinds.tolist():
        offset = (torch.rand(3, 1, 1, 1, generator=random) - 0.5) * 0.8
        radius = 0.25 + 0.25 * torch.rand(1, generator=random)
        x, y, z = grid - offset
        distance = (x**2 + y**2 + z**2).sqrt()
        inside = [
            distance < radius,
            torch.stack([x, y, z]).abs().amax(dim=0) < 0.8 * radius,
            ((x**2 + y**2).sqrt() < 0.6 * radius) & (z.abs() < 1.6 * radius),
            (distance < radius) & (distance > 0.6 * radius),
        ][kind]
        brightness = 0.5 + 0.3 * torch.rand(1, generator=random)
        volumes.append(brightness * inside + 0.1 * torch.randn(inside.shape, generator=random).abs())
    return torch.stack(volumes)[:, None].clamp(0, 1), kinds


class Scans(Dataset[Any]):
    """The NIfTI files of a folder, however deep, as (1, size, size, size) in [0, 1], each by its own percentiles."""

    def __init__(self, folder: str, size: int) -> None:
        self.files = [file for file in walk(folder) if file.lower().endswith((".nii", ".nii.gz"))]
        if not self.files:
            raise SystemExit(f"{folder} has no NIfTI file (.nii, .nii.gz), or is no folder")
        self.read = mt.Compose(
            [
                mt.LoadImage(image_only=True, ensure_channel_first=True),
                mt.Orientation(axcodes="RAS"),
                mt.ScaleIntensityRangePercentiles(1, 99, 0.0, 1.0, clip=True),
                mt.Resize((size,) * 3, mode="trilinear"),
                mt.ToTensor(track_meta=False),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        volume: Tensor = self.read(self.files[index])
        if len(volume) != 1:
            raise ValueError(f"it has {len(volume)} channels, expected 1")
        if not volume.isfinite().all():
            raise ValueError("it has voxels that are not finite")
        return volume

    def name(self, index: int) -> str:
        """The path of the file."""
        return self.files[index]


class VolumeViews(nn.Module):
    """Two global and several local views, each sample with its own draw; it follows from torch's random state.

    Args:
        global_size: The number of voxels of a global view, each way.
        local_size: The number of voxels of a local view, each way.
        local_views: The number of local views.
        global_scale: The smallest and largest side of a global view, as shares of the volume's side.
        local_scale: The smallest and largest side of a local view, as shares of the volume's side.
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
        """Volumes (B, C, D, H, W) -> global views, then local ones."""
        self.appearance.set_random_state(int(torch.randint(2**31, (1,))))
        return [torch.stack([self.view(volume, *view) for volume in volumes]) for view in self.views]

    def view(self, volume: Tensor, size: int, smallest: float, largest: float) -> Tensor:
        """A volume (C, D, H, W) -> a part of it, (C, size, size, size)."""
        sides = torch.tensor(volume.shape[1:]).float() * torch.empty(1).uniform_(smallest, largest)
        crop = mt.RandSpatialCrop(sides.round().int().clamp(min=1).tolist(), random_size=False)
        crop.set_random_state(int(torch.randint(2**31, (1,))))
        view = mt.Resize((size,) * 3, mode="trilinear")(crop(volume))
        result: Tensor = self.appearance(view).as_tensor()
        return result
