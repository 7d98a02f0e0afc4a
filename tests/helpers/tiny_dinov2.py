"""The example module DINOv2 at a tiny size, on random images.

Importable by name, so that processes started with spawn find it.

Sizes: B images, N = 16 patches of a global view, V = 2B global views.
"""

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss
from dino_head.examples.dinov2_module import DINOv2
from dino_head.vision import ResumableLoader
from helpers.tiny_dino import crops

PATCHES = 16
LOSS_OPTIONS = ("centering", "teacher_temp", "student_temp", "warmup_teacher_temp_epochs")
BOTH_HEADS = ("student.head.last_layer", "student.patch_head.last_layer")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.norm(nn.functional.gelu(self.attn(4 * tokens.mean(dim=1, keepdim=True) - tokens)))


class TokenBackbone(nn.Module):
    """Images (B, 1, H, W), masks (B, N) -> class tokens (B, 8) and patch tokens (B, N, 8); patches of 2 x 2."""

    patch_size = (2, 2)

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 8, 2, 2)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 8)), nn.Parameter(torch.zeros(1, 8))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(PATCHES, 8))
        self.blocks, self.norm, self.drop = nn.Sequential(Block(), Block()), nn.LayerNorm(8), nn.Dropout(drop)

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token, patches)
        patches = patches + self.pos_embed[: patches.shape[1]]
        tokens = torch.cat([self.cls_token.expand(len(images), 1, 8), patches], dim=1)
        tokens = self.norm(self.blocks(self.drop(tokens)))
        return tokens[:, 0], tokens[:, 1:]


class TinyDINOv2(DINOv2):
    """The example with an optimizer of choice, and masks that a test may replace."""

    make_optimizer: Any = None

    def views(self, batch: Any, batch_idx: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        views, masks = super().views(batch, batch_idx)
        return views, self.masks(masks, batch, batch_idx)

    def masks(self, masks: torch.Tensor, batch: Any, batch_idx: int) -> torch.Tensor:
        """The masks (V, 4, 4) of the example -> masks (V, 4, 4) or (V, N)."""
        return masks

    def terms(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        """The terms of the loss, without logging them."""
        seen: dict[str, torch.Tensor] = {}
        self.log_dict = lambda terms, **_: seen.update(terms)
        DINOv2.training_step(self, batch, batch_idx)
        del self.log_dict
        return seen

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            return super().configure_optimizers()
        return self.make_optimizer([p for p in self.student.parameters() if p.requires_grad])


class GivenMasks(TinyDINOv2):
    """Takes the masks (B, 2, N) of both global views from the batch, so that they follow the images."""

    def masks(self, masks: torch.Tensor, batch: Any, batch_idx: int) -> torch.Tensor:
        return batch[1].transpose(0, 1).flatten(0, 1).cpu()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.04)  # more would amplify rounding


def tiny_dinov2(
    kind: type[TinyDINOv2] = TinyDINOv2,
    *,
    shared_head: bool = False,
    freeze: int = 2,
    make_optimizer: Any = adamw,
    backbone: nn.Module | None = None,
    **options: Any,
) -> TinyDINOv2:
    """The same weights each time.

    Args:
        kind: Class of the module.
        shared_head: Whether the head of the class tokens is also that of the patches.
        freeze: Number of epochs in which the heads' last layers are frozen.
        make_optimizer: Function of the parameters; None for the example's optimizer.
        backbone: Backbone in place of a TokenBackbone.
        options: Options of the module, and of both losses.
    """
    torch.manual_seed(0)
    backbone = TokenBackbone() if backbone is None else backbone
    heads = [DINOProjectionHead(8, 8, 4, 16, False, freeze, norm_last_layer=False) for _ in range(2 - shared_head)]
    of_losses = {name: options.pop(name) for name in LOSS_OPTIONS if name in options}
    losses = [objective(16, **of_losses) for objective in (DINOLoss, IBOTPatchLoss)]
    module = kind(backbone, heads[0], *losses, crops, *heads[1:], **{"warmup_epochs": 1, "seed": 3, **options})
    module.make_optimizer = make_optimizer
    return module


def with_masks(batches: int = 4, batch_size: int = 4, none_in: Any = ()) -> TensorDataset:
    """Images and masks, in very different numbers; the images `none_in` have none."""
    generator = torch.Generator().manual_seed(1)
    count = batches * batch_size
    images = torch.randn(count, 1, 8, 8, generator=generator)
    shares = torch.rand(count, 2, 1, generator=generator)
    masks = torch.rand(count, 2, PATCHES, generator=generator) < shares
    masks[..., 0] = False
    masks[list(none_in)] = False
    return TensorDataset(images, masks)


def masked_loader(batches: int = 4, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(with_masks(batches, batch_size, **options), batch_size=batch_size)


class Shuffled(LightningDataModule):
    """Images in an order that a resumed run continues."""

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(with_masks(), 4 // self.trainer.world_size, self.trainer, seed=3)


def halves(dataset: TensorDataset, batch_size: int = 4) -> DataLoader[Any]:
    """Each process's part of the batches that one process would have: of 0 1 2 3 the first takes 0 2."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world, rank, shuffle=False)
    return DataLoader(dataset, batch_size // world, sampler=sampler)
