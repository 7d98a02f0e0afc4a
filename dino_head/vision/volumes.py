"""Reading volumes from NIfTI files.

Sizes: X, Y and Z voxels of a file, along the axes to the right, front and top (RAS).
"""

from typing import Any, cast

import nibabel
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dino_head.vision.files import select_files


def read_volume(path: str, size: int) -> Tensor:
    """Read a NIfTI file as float32 (1, size, size, size) with values in [0, 1], in the orientation RAS.

    The voxels are scaled so that their 1st percentile becomes 0 and their 99th becomes 1, clipped, and resized by
    trilinear interpolation. If 95% of the voxels have the smallest value, or the largest, as in a sparse volume such as
    a mask, the smallest value becomes 0 and the largest 1. A constant volume becomes 0.

    Args:
        path: Path of the file (.nii, .nii.gz).
        size: Number of voxels along each axis.

    Raises:
        Exception: Any error of nibabel if it cannot read the file.
        ValueError: If the file contains more than one volume, a NaN voxel, or more than a few infinite voxels.
    """
    image = cast(nibabel.Nifti1Image, nibabel.load(path))
    if len(image.shape) < 3 or np.prod(image.shape[3:]) != 1:
        raise ValueError(f"volume of shape {image.shape}, expected (X, Y, Z): save each volume in a file of its own")
    image = nibabel.as_closest_canonical(image)  # type: ignore[no-untyped-call]
    voxels = image.get_fdata(dtype=np.float32)
    with np.errstate(invalid="ignore"):  # of infinite voxels; the range below is NaN then
        low, dark, bright, high = np.percentile(voxels, (1, 5, 95, 99)).tolist()
    if low == bright or dark == high:
        low, high = float(voxels.min()), float(voxels.max())
    if not high - low <= float(np.finfo(np.float32).max):
        raise ValueError(f"volume with values from {low} to {high}, expected a finite range: replace NaN and infinity")
    volume = torch.from_numpy(np.ascontiguousarray(voxels)).reshape(1, 1, *voxels.shape[:3])
    volume = ((volume - low) / ((high - low) or 1.0)).clamp(0, 1)
    return F.interpolate(volume, (size,) * 3, mode="trilinear")[0]


class VolumeFiles(Dataset[Any]):
    """Dataset of the NIfTI files in a folder and its subfolders, read with `read_volume`.

    Args:
        folder: Folder with .nii or .nii.gz files.
        size: Number of voxels along each axis.

    Raises:
        ValueError: If the folder has no NIfTI file.
    """

    def __init__(self, folder: str, size: int) -> None:
        self.files = select_files(folder, lambda file: file.lower().endswith((".nii", ".nii.gz")))
        if not self.files:
            raise ValueError(f"{folder} has no NIfTI file, expected a folder with files .nii or .nii.gz")
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return read_volume(self.files[index], self.size)

    def name(self, index: int) -> str:
        """The path of the file."""
        return self.files[index]
