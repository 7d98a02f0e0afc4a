"""The example module DINOv2 at a tiny size, on random images. Importable by name, for processes started with spawn."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss
from dino_head.examples.dinov2_module import DINOv2
from helpers.tiny_dino import crops


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.norm(nn.functional.gelu(self.attn(tokens.mean(dim=1, keepdim=True) - tokens)))


class TinyBackbone(nn.Module):
    """Images (B, 1, H, W), masks (B, N) -> class tokens (B, 8) and patch tokens (B, N, 8); patches of 2 x 2."""

    patch_size = (2, 2)

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 8, 2, 2)
        self.cls_token, self.mask_token = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.zeros(1, 8))
        self.pos_embed = nn.Parameter(torch.randn(16, 8))
        self.blocks, self.norm, self.drop = nn.Sequential(Block(), Block()), nn.LayerNorm(8), nn.Dropout(drop)

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token, patches)
        patches = patches + self.pos_embed[: patches.shape[1]]
        tokens = torch.cat([self.cls_token.expand(len(images), 1, 8), patches], dim=1)
        tokens = self.norm(self.blocks(self.drop(tokens)))
        return tokens[:, 0], tokens[:, 1:]


class Given(DINOv2):
    """The example with given masks, one tensor for each batch."""

    masks: list[torch.Tensor]

    def views(self, batch: Any, batch_idx: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        return super().views(batch, batch_idx)[0], self.masks[batch_idx]


def dinov2(
    *,
    kind: type[DINOv2] = DINOv2,
    shared_head: bool = False,
    centering: str = "mean",
    drop: float = 0.0,
    backbone: nn.Module | None = None,
    **options: Any,
) -> DINOv2:
    """The same weights each time."""
    torch.manual_seed(0)
    heads = [DINOProjectionHead(8, 8, 4, 16, False, 2, norm_last_layer=False) for _ in range(2 - shared_head)]
    losses = [loss(16, centering=centering) for loss in (DINOLoss, IBOTPatchLoss)]
    backbone = TinyBackbone(drop) if backbone is None else backbone
    return kind(backbone, heads[0], *losses, crops, *heads[1:], **{"warmup_epochs": 1, **options})


def image_loader(batches: int = 4, batch_size: int = 4) -> DataLoader[Any]:
    images = torch.randn(batches * batch_size, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=batch_size)
