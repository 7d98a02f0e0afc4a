"""DINO on real images in a few minutes on a CPU: scikit-learn's handwritten digits (1,797 grey images of 8 x 8).

    python examples/fit_digits.py                 # writes to runs/digits
    python examples/fit_digits.py --resume        # resumes the run after Ctrl-C or a crash, bitwise

The script runs `dino-head fit --config digits`, with all of its flags, and adds comparisons to summary.json. Training
uses no labels: to measure the features, the labels of the 1,400 images vote on the 397 held-out ones (kNN).
"""

import json
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dino_head
from dino_head import DINOLoss, DINOProjectionHead
from dino_head._extras import packages_of_extras
from dino_head.cli.fit import fit, with_recipe
from dino_head.examples.dino_module import DINO
from dino_head.metrics import KNNAccuracy
from dino_head.vision.augment import MultiCrop
from dino_head.vision.loaders import ResumableLoader

with packages_of_extras("dino_head.examples.fit_digits"):
    import kornia.augmentation as K
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

Labelled = tuple[Tensor, Tensor]


def digits(size: int = 16) -> tuple[Labelled, Labelled]:
    """1,400 training and 397 held-out images (N, 1, size, size) in [0, 1] with labels (N,), in a fixed split."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), the original size
    images = F.interpolate(images, size, mode="bilinear")
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=397, random_state=2, stratify=data.target)
    return (images[train], labels[train]), (images[test], labels[test])


class Digits(LightningDataModule):
    """The 1,400 training images, in batches of (images (B, 1, 16, 16), labels (B,)).

    Args:
        batch_size: Number of images in a batch.
        seed: Seed of the order of the images.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def labelled(self) -> tuple[Labelled, Labelled]:
        """Training and held-out images."""
        return digits()

    def train_dataloader(self) -> ResumableLoader:
        """The training images, shuffled in another order in each epoch."""
        assert self.trainer is not None
        return ResumableLoader(TensorDataset(*self.labelled()[0]), self.batch_size, self.trainer, self.seed)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training images that vote on the held-out ones, for KNNProbeCallback and ReportCallback."""
        train, test = (DataLoader(TensorDataset(*labelled), batch_size=256) for labelled in self.labelled())
        return train, test


def digit_views(global_size: int = 16, local_size: int = 8) -> MultiCrop:
    """Two global and four local views for grey images of digits with values in [0, 1].

    They keep the shape of a digit recognisable: rotation by up to 0.4 rad, crops, stretching, contrast, brightness and
    noise, but no mirroring.
    """

    def view(size: int, scale: tuple[float, float]) -> nn.Module:
        steps: nn.Module = K.ImageSequential(
            K.RandomRotation(degrees=math.degrees(0.4), p=1.0),
            K.RandomResizedCrop((size, size), scale=scale, ratio=(3 / 4, 4 / 3), cropping_mode="resample"),
            K.RandomContrast(contrast=(0.6, 1.4), clip_output=False, p=1.0),  # gain
            K.RandomBrightness(brightness=(0.9, 1.1), clip_output=False, p=1.0),  # offset of up to 0.1
            K.RandomGaussianNoise(std=0.05, p=1.0),
        )
        return steps

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
    """The model of the recipe `digits`, in Python.

    Args:
        output_dim: Number K of prototypes.
        seed: Seed of the augmentation.
    """
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


@torch.no_grad()
def knn_top1(features: Callable[[Tensor], Tensor], size: int = 16) -> float:
    """Accuracy on the held-out images of a vote of their ten nearest training images."""
    (train, labels), (test, test_labels) = digits(size)
    accuracy = KNNAccuracy(features(train), labels, k=10)
    accuracy.update(features(test), test_labels)
    return round(accuracy.compute().item(), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with the recipe, and add comparisons to the summary."""
    cli = fit(with_recipe("digits", arguments))
    seed_everything(cli.config.seed_everything, verbose=False)
    summary = {
        "knn_top1_raw_pixels": knn_top1(lambda images: images.flatten(1), size=8),
        "knn_top1_untrained": knn_top1(build().eval()),
        "seed": cli.config.seed_everything,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "dino_head": dino_head.__version__,
        },
    }
    file = cli.out / "summary.json"
    summary = {"knn_top1": round(cli.results["knn_history"][-1]["top1"], 4), **summary, **cli.results}
    file.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
