"""Volumes: scans in NIfTI files, and small ones that are made, enough to see that features tell shapes apart."""

from typing import Any

import torch
from bad_files import walk
from monai import transforms as mt
from torch import Tensor
from torch.utils.data import Dataset


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
