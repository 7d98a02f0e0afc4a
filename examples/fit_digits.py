"""DINO on real images in a few minutes on a CPU: scikit-learn's handwritten digits (1,797 grey images of 8 x 8).

    python examples/fit_digits.py                 # writes to runs/digits
    python examples/fit_digits.py --resume        # goes on after Ctrl-C or a crash, as if nothing had happened

No label is used in training; the labels of 1,400 images vote on the 397 held-out ones (kNN) to show what was learnt.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import lightning
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dino_head
from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    TeacherUpdateCallback,
)
from dino_head.cli.run_folder import StopAtBatchEnd, WholeCheckpoints, checkpoints, parse_run
from dino_head.examples.dino_module import DINO
from dino_head.metrics import KNNAccuracy
from dino_head.vision.augment import MultiCrop
from dino_head.vision.loaders import ResumableLoader

Labelled = tuple[Tensor, Tensor]


def digits(size: int = 16) -> tuple[Labelled, Labelled]:
    """1,400 training and 397 held-out images (N, 1, size, size) in [0, 1] with labels (N,): always the same split."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), the original size
    images = F.interpolate(images, size, mode="bilinear")
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=397, random_state=2, stratify=data.target)
    return (images[train], labels[train]), (images[test], labels[test])


class Digits(LightningDataModule):
    """The 1,400 training images, in batches of (images (B, 1, 16, 16), labels (B,)).

    Args:
        batch_size: The number of images in a step.
        seed: The seed of the order in which images come.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def labelled(self) -> tuple[Labelled, Labelled]:
        """Training and held-out images."""
        return digits()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, anew in each epoch."""
        assert self.trainer is not None
        return ResumableLoader(TensorDataset(*self.labelled()[0]), self.batch_size, self.trainer, self.seed)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training images that vote on the held-out ones, for KNNProbeCallback and ReportCallback."""
        train, test = (DataLoader(TensorDataset(*labelled), batch_size=256) for labelled in self.labelled())
        return train, test


def digit_views(global_size: int = 16, local_size: int = 8) -> MultiCrop:
    """Two global and four local views for grey images of digits with values in [0, 1].

    A digit is what it is through its shape: rotated by up to 0.4 rad, cropped and stretched, brighter or darker,
    noisy; never mirrored.
    """

    def view(size: int, scale: tuple[float, float]) -> nn.Module:
        return K.ImageSequential(
            K.RandomRotation(degrees=math.degrees(0.4), p=1.0),
            K.RandomResizedCrop((size, size), scale=scale, ratio=(3 / 4, 4 / 3), cropping_mode="resample"),
            K.RandomContrast(contrast=(0.6, 1.4), clip_output=False, p=1.0),  # gain
            K.RandomBrightness(brightness=(0.9, 1.1), clip_output=False, p=1.0),  # offset of up to 0.1
            K.RandomGaussianNoise(std=0.05, p=1.0),
        )

    large = [view(global_size, (0.6, 1.0)) for _ in range(2)]
    return MultiCrop(large, view(local_size, (0.3, 0.7)), local_views=4)


def conv_net() -> nn.Sequential:
    """Images (B, 1, H, W) of any size from 8 x 8 -> features (B, 128)."""
    layers: list[nn.Module] = []
    for width_in, width_out, stride in ((1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1)):
        layers += [nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build(output_dim: int = 512, seed: int = 0) -> DINO:
    """The model: 128 features, a head of width 256 with a bottleneck of 64, K = output_dim prototypes."""
    return DINO(
        conv_net(),
        DINOProjectionHead(128, 256, 64, output_dim, freeze_last_layer=1),
        DINOLoss(output_dim, warmup_teacher_temp=0.04, teacher_temp=0.04),
        digit_views(),
        learning_rate=3e-3,
        min_learning_rate=3e-6,
        warmup_epochs=5,
        seed=seed,
    )


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The options; a resumed run takes up those that it was started with."""
    parser = argparse.ArgumentParser(description="Train DINO on scikit-learn's digits, without labels.")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of the run (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the 1,400 images (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=512, help="width of the head's output (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    limits = {"epochs": (1, math.inf), "batch_size": (2, 1400), "prototypes": (2, math.inf), "seed": (0, math.inf)}
    return parse_run(parser, limits, arguments)


@torch.no_grad()
def knn_top1(features: Callable[[Tensor], Tensor], size: int = 16) -> float:
    """Accuracy of the labels that the ten nearest of 1,400 training images vote for the held-out ones."""
    (train, labels), (test, test_labels) = digits(size)
    accuracy = KNNAccuracy(features(train), labels, k=10)
    accuracy.update(features(test), test_labels)
    return round(accuracy.compute().item(), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write summary and report."""
    args = parse(arguments)
    seed_everything(args.seed, workers=True, verbose=False)
    model, data = build(args.prototypes, args.seed), Digits(args.batch_size, args.seed)
    untrained = knn_top1(model.eval())
    freeze, timer = FreezeLastLayerCallback(), Timer()
    monitor, probe = CollapseMonitorCallback(every_n_steps=10), KNNProbeCallback(k=10, every_n_epochs=5)
    trainer = Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=3.0,
        callbacks=[
            freeze,
            TeacherUpdateCallback(base_momentum=0.98),
            monitor,
            probe,
            ReportCallback(args.out),
            timer,
            ModelCheckpoint(args.out / "checkpoints", filename="last", enable_version_counter=False),
            StopAtBatchEnd(args.out / "checkpoints" / "interrupted.ckpt"),
        ],
        plugins=[WholeCheckpoints()],
        logger=CSVLogger(args.out, name="metrics"),
        log_every_n_steps=1,
    )
    trainer.fit(model.train(), data, ckpt_path=checkpoints(args.out)[-1] if args.resume else None)

    summary = {
        "knn_top1": round(probe.history[-1]["top1"], 4),
        "knn_top1_raw_pixels": knn_top1(lambda images: images.flatten(1), size=8),
        "knn_top1_untrained": untrained,
        "diagnoses": monitor.diagnoses,
        "seconds": round(timer.time_elapsed("train"), 1),
        "seed": args.seed,
        "freeze": freeze.receipt,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "dino_head": dino_head.__version__,
        },
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
