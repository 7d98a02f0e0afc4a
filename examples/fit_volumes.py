"""DINO in three dimensions: volumes through MONAI, with the same head, loss and callbacks as in two.

    python examples/fit_volumes.py                       # balls, boxes, tubes and shells that the script generates
    python examples/fit_volumes.py --data scans          # a folder of NIfTI files (.nii, .nii.gz)
    python examples/fit_volumes.py --resume              # continues after Ctrl-C or a crash

Training uses no labels. The kNN accuracy of the generated volumes uses their kinds as labels.

Sizes: B samples, C channels, D, H and W voxels.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    TeacherUpdateCallback,
)
from dino_head.cli.run_folder import StopAtBatchEnd, WholeCheckpoints, check_same_data, checkpoints, parse_run
from dino_head.examples.dino_module import DINO
from dino_head.vision import ResumableLoader, VolumeData, check_backbone
from dino_head.vision.volume_views import VolumeViews

SIZE = 24  # voxels of a volume along each axis


def make_volumes(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy volumes (number, 1, D, H, W) in [0, 1] of four kinds, of random place and radius; and their kinds."""
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
        """The volumes, which vote, and 128 other volumes."""
        held_out = TensorDataset(*make_volumes(128, seed=1))
        return DataLoader(self.volumes, batch_size=64), DataLoader(held_out, batch_size=64)


def dense_net(width: int = 16) -> nn.Sequential:
    """A small DenseNet of MONAI: volumes (B, 1, D, H, W) of at least 12 voxels a side -> features (B, 3 * width)."""
    from monai.networks.nets import DenseNet  # after VolumeViews, whose import names the extra to install

    features = DenseNet(3, 1, 1, init_features=width, growth_rate=width // 2, block_config=(2, 4)).features
    return nn.Sequential(features, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def build(prototypes: int = 512, seed: int = 0) -> DINO:
    """The LightningModule."""
    width = dense_net()(torch.zeros(2, 1, 12, 12, 12)).shape[1]
    return DINO(
        dense_net(),
        DINOProjectionHead(width, 256, 64, prototypes, freeze_last_layer=1),
        DINOLoss(prototypes, warmup_teacher_temp_epochs=0, teacher_temp=0.04),
        VolumeViews(),
        learning_rate=2e-3,
        warmup_epochs=2,
        seed=seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write the summary."""
    parser = argparse.ArgumentParser(description="Train DINO on volumes, without labels.")
    parser.add_argument("--data", help="folder of NIfTI files (default: volumes that the script generates)")
    parser.add_argument("--out", type=Path, default=Path("runs/volumes"), help="folder of the run (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its own settings")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the volumes (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="volumes in a batch (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=512, help="width of the head's output (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation (%(default)s)")
    least = {"epochs": 1, "batch_size": 2, "prototypes": 2, "workers": 0, "seed": 0}
    args = parse_run(parser, {name: (limit, math.inf) for name, limit in least.items()}, arguments)
    seed_everything(args.seed, workers=True, verbose=False)
    model = build(args.prototypes, args.seed)
    data: MadeVolumes | VolumeData
    if args.data is None:
        data = MadeVolumes(args.batch_size, args.seed)
    else:
        data = VolumeData(args.data, args.batch_size, args.workers, SIZE, args.seed)
    check_same_data(args.out, data.description, args.resume)
    with torch.random.fork_rng():
        views = model.augment(torch.zeros(2, 1, SIZE, SIZE, SIZE))
    check_backbone(model.student["backbone"], model.student["head"], views)  # type: ignore[arg-type]
    probe = [KNNProbeCallback(every_n_epochs=5)] if data.has_classes else []
    trainer = Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=3.0,
        callbacks=[
            FreezeLastLayerCallback(),
            TeacherUpdateCallback(base_momentum=0.98),
            CollapseMonitorCallback(every_n_steps=5),
            *probe,
            ModelCheckpoint(args.out / "checkpoints", filename="{epoch}"),
            StopAtBatchEnd(args.out / "checkpoints" / "interrupted.ckpt"),
        ],
        plugins=[WholeCheckpoints()],
        logger=CSVLogger(args.out, name="metrics"),
        default_root_dir=args.out,  # where bad_files.txt is written
        log_every_n_steps=1,
    )
    trainer.fit(model, data, ckpt_path=checkpoints(args.out)[-1] if args.resume else None)
    summary = {
        "epochs": trainer.current_epoch,
        "knn_top1": [round(entry["top1"], 4) for p in probe for entry in p.history],
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
