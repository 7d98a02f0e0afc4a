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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from monai.networks.nets import DenseNet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    TeacherUpdateCallback,
)
from dino_head.cli.run_folder import (
    StopAtBatchEnd,
    WholeCheckpoints,
    check_same_data,
    checkpoints,
    fingerprint,
    parse_run,
)
from dino_head.examples.dino_module import DINO
from dino_head.vision.backbones import check_backbone
from dino_head.vision.files import FileData, Readable
from dino_head.vision.loaders import ResumableLoader
from dino_head.vision.volumes import Scans, VolumeViews, make_volumes


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
