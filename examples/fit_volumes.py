"""DINO in three dimensions: volumes through MONAI, with the same head, loss and callbacks as in two.

    python examples/fit_volumes.py                       # on volumes that it makes: balls, boxes, tubes and shells
    python examples/fit_volumes.py --data scans          # a tree of NIfTI files (.nii, .nii.gz)
    python examples/fit_volumes.py --resume              # goes on after Ctrl-C or a crash

No label is used in training; of the volumes that it makes, the kinds tell how well the features know them (kNN).

Sizes: B samples, C channels, D, H and W voxels.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from backbones import check_backbone
from bad_files import FileData, Readable
from data import ResumableLoader
from dino_module import DINO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from monai import transforms as mt
from monai.networks.nets import DenseNet
from run_folder import StopAtBatchEnd, WholeCheckpoints, check_same_data, checkpoints, fingerprint, parse_run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from volumes import Scans, make_volumes

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    TeacherUpdateCallback,
)


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


class Volumes(FileData):
    """Batches of volumes (B, 1, D, H, W): those of a folder, or 512 that are made, with their kinds.

    Args:
        data: The folder of NIfTI files; without one, volumes are made.
        batch_size: The number of volumes in a step of each process.
        workers: The number of processes that read files, beside each training process.
        size: The number of voxels, each way, to which volumes are resized.
        seed: The seed of the order in which volumes come.
    """

    def __init__(self, data: str | None = None, batch_size: int = 32, workers: int = 0, size: int = 24, seed: int = 0):
        super().__init__()
        self.is_made = data is None
        self.volumes: Any = TensorDataset(*make_volumes(512, size)) if data is None else Scans(data, size)
        self.batch_size, self.workers, self.size, self.seed = batch_size, workers, size, seed

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, anew in each epoch."""
        assert self.trainer is not None
        volumes = self.volumes if self.is_made else Readable(self.volumes, self.bad_files)
        return ResumableLoader(volumes, self.batch_size, self.trainer, self.seed, num_workers=self.workers)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Volumes that vote on 128 others."""
        if not self.is_made:
            raise MisconfigurationException(
                "scans have no labels here, which a KNNProbeCallback needs: take it out of the callbacks"
            )
        held_out = TensorDataset(*make_volumes(128, self.size, seed=1))
        return DataLoader(self.volumes, batch_size=64), DataLoader(held_out, batch_size=64)


def dense_net(width: int = 16) -> nn.Sequential:
    """A small DenseNet of MONAI: volumes (B, 1, D, H, W) from 12 voxels each way -> features (B, 3 * width)."""
    features = DenseNet(3, 1, 1, init_features=width, growth_rate=width // 2, block_config=(2, 4)).features
    return nn.Sequential(features, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def build(prototypes: int = 512, seed: int = 0) -> DINO:
    """The model."""
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
    parser.add_argument("--data", help="folder of NIfTI files (default: volumes that the script makes)")
    parser.add_argument("--out", type=Path, default=Path("runs/volumes"), help="folder of the run (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the volumes (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="volumes in a step (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=512, help="width of the head's output (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    least = {"epochs": 1, "batch_size": 2, "prototypes": 2, "workers": 0, "seed": 0}
    args = parse_run(parser, {name: (limit, math.inf) for name, limit in least.items()}, arguments)
    seed_everything(args.seed, workers=True, verbose=False)
    model, data = build(args.prototypes, args.seed), Volumes(args.data, args.batch_size, args.workers, seed=args.seed)
    check_same_data(args.out, fingerprint([] if data.is_made else data.volumes.files), args.resume)
    with torch.random.fork_rng():
        views = model.augment(torch.zeros(2, 1, data.size, data.size, data.size))
    check_backbone(model.student["backbone"], model.student["head"], views)  # type: ignore[arg-type]
    probe = [KNNProbeCallback(every_n_epochs=5)] if data.is_made else []
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
        default_root_dir=args.out,  # where bad files are listed
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
