"""The example module at a tiny size, on random images."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.examples.dino_module import DINO


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


class TinyViT(nn.Module):
    """Images (B, C, H, W) -> features (B, 16), with the methods of the authors' models; patches of 4 x 4."""

    patch_size = 4

    def __init__(self, channels: int = 1, registers: int = 0):
        super().__init__()
        self.embed = nn.Conv2d(channels, 16, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, 1 + registers, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(images), -1, -1), patches], dim=1)
        mixed, attention = self.attention(tokens, tokens, tokens, average_attn_weights=False)
        return self.norm(tokens + mixed), attention

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens(images)[0][:, 0]

    def get_intermediate_layers(self, images: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        return [self.tokens(images)[0]]

    def get_last_selfattention(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens(images)[1]


class TinyTokens(TinyViT):
    """The same backbone, but returns its class tokens (B, 16) and patch tokens (B, N, 16)."""

    def forward(self, images: torch.Tensor) -> Any:
        tokens = self.tokens(images)[0]
        return tokens[:, 0], tokens[:, 1:]
