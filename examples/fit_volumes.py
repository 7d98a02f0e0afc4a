"""DINO on volumes, with MONAI, and with the same head, loss and callbacks as for images.

    python examples/fit_volumes.py                       # balls, boxes, tubes and shells that the script generates
    python examples/fit_volumes.py --data scans          # a folder of NIfTI files (.nii, .nii.gz)
    python examples/fit_volumes.py --resume              # resumes the run after Ctrl-C or a crash

The script runs `dino-head fit --config volumes`, with all of its flags, but generates volumes if there is no --data.
Training uses no labels. The kNN accuracy on the generated volumes uses their kinds as labels.

Sizes: B samples, C channels, D, H and W voxels.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head.cli.fit import main as fit
from dino_head.cli.fit import with_recipe
from dino_head.vision import ResumableLoader

SIZE = 24  # voxels of a volume along each axis


def make_volumes(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy volumes (number, 1, D, H, W) in [0, 1] of four kinds, with random position and radius, and their kinds."""
    random = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 3, indexing="ij"))
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


class MadeVolumes(LightningDataModule):
    """Batches of 512 generated volumes (B, 1, D, H, W), with their kinds as labels.

    Args:
        batch_size: Number of volumes in a batch of each process.
        seed: Seed of the order of the volumes.
    """

    description, has_classes = "512 generated volumes", True

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.volumes = TensorDataset(*make_volumes(512))
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> ResumableLoader:
        """The volumes, shuffled in another order in each epoch."""
        assert self.trainer is not None
        return ResumableLoader(self.volumes, self.batch_size, self.trainer, self.seed)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """The volumes, which vote, and 128 held-out volumes."""
        held_out = TensorDataset(*make_volumes(128, seed=1))
        return DataLoader(self.volumes, batch_size=64), DataLoader(held_out, batch_size=64)


def dense_net(width: int = 16) -> nn.Sequential:
    """A small DenseNet of MONAI: volumes (B, 1, D, H, W) of at least 12 voxels per side -> features (B, 3 * width)."""
    from monai.networks.nets import DenseNet

    features = DenseNet(3, 1, 1, init_features=width, growth_rate=width // 2, block_config=(2, 4)).features
    return nn.Sequential(features, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def generate_without_data(flags: argparse.Namespace) -> list[str]:
    """The arguments that select generated volumes if the command has no --data."""
    return [] if flags.data else ["--data.class_path=dino_head.examples.fit_volumes.MadeVolumes"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with the recipe."""
    fit(with_recipe("volumes", arguments, generate_without_data))


if __name__ == "__main__":
    main()
