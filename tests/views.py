"""The example module at a tiny size, on random images."""

from typing import Any

import torch
from dino_module import DINO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead


def crops(images: torch.Tensor) -> list[torch.Tensor]:
    """Two global and one local view (B, 1, H, W), without randomness."""
    return [images, images.flip(-1), images[..., 2:6, 2:6]]


class TinyDINO(DINO):
    """The example with an optimizer of choice."""

    make_optimizer: Any = None

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            return super().configure_optimizers()
        return self.make_optimizer([p for p in self.student.parameters() if p.requires_grad])


def tiny_dino(make_optimizer: Any = None, **options: Any) -> TinyDINO:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = DINOProjectionHead(4, 8, 4, 16, batch_norm=False, freeze_last_layer=2)
    module = TinyDINO(backbone, head, DINOLoss(16), crops, **{"warmup_epochs": 1, **options})
    module.make_optimizer = make_optimizer
    return module


def view_loader(batches: int = 4, batch_size: int = 4) -> DataLoader[Any]:
    images = torch.randn(batches * batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=batch_size)
