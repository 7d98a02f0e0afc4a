"""A tiny DINOv2 on random images: class tokens and masked patches, each with a head and a loss.

Importable by name, so that processes started with spawn find it.

Sizes: B images, N = 16 patches of a global view, V = 2B global views.
"""

import copy
import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss, derived_seed
from dino_head.vision import ResumableLoader
from helpers.tiny_dino import crops

PATCHES = 16
BOTH_HEADS = ("student.head.last_layer", "student.patch_head.last_layer")


class TokenBackbone(nn.Module):
    """Images (B, 1, H, W), masks (B, N) -> class tokens (B, 8) and patches (B, N, 8)."""

    patch_size = (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(1, 8, 2, 2), nn.Linear(8, 8)
        self.cls_norm, self.norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mask_token = nn.Parameter(torch.zeros(8))
        self.positions = nn.Parameter(torch.randn(PATCHES, 8))

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        if masks is not None:
            patches = torch.where(masks.to(images.device)[..., None], self.mask_token, patches)
        cls = self.cls_norm(patches.mean(dim=1) - patches[:, 0])
        patches = patches + self.positions[: patches.shape[1]]
        return cls, self.norm(patches + self.mix(nn.functional.gelu(cls))[:, None])


class TinyDINOv2(LightningModule):
    """Student and teacher as `student` and `teacher`, losses as `loss` and `patch_loss`; random masks.

    Args:
        shared_head: Whether the head of the class tokens is also that of the patches.
        centering: Centering of both losses.
        freeze: Number of epochs in which the heads' last layers are frozen.
    """

    seed = 3
    make_optimizer: Any = staticmethod(lambda parameters: torch.optim.AdamW(parameters, lr=0.01))

    def __init__(self, *, shared_head: bool = False, centering: str = "mean", freeze: int = 2, **loss: Any) -> None:
        super().__init__()
        parts = {"backbone": TokenBackbone()}
        for name in ("head",) if shared_head else ("head", "patch_head"):
            parts[name] = DINOProjectionHead(8, 8, 4, 16, batch_norm=False, freeze_last_layer=freeze)
        self.student = nn.ModuleDict(parts)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss, self.patch_loss = (kind(16, centering=centering, **loss) for kind in (DINOLoss, IBOTPatchLoss))

    def on_train_start(self) -> None:
        """The teacher does not act randomly. Earlier, Lightning would warn of modules in evaluation mode."""
        self.teacher.eval()

    def masks(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Masks (V, N) on the CPU. The first half of the views has none."""
        seed = derived_seed(self.seed, self.global_rank, self.current_epoch, batch_idx)
        masks = torch.rand(2 * len(batch[0]), PATCHES, generator=torch.Generator().manual_seed(seed)) < 0.4
        masks[: len(batch[0])] = False
        masks[:, 0] = False  # something stays visible
        return masks

    def terms(self, batch: Any, masks: torch.Tensor) -> dict[str, torch.Tensor]:
        """The values of both losses."""
        *globals_, local = crops(batch[0])
        views = torch.cat(globals_)
        indices = masks.flatten().nonzero().squeeze(1).to(self.device)

        def outputs(side: nn.ModuleDict, masks: torch.Tensor | None, *locals_: torch.Tensor) -> Any:
            tokens, patches = side["backbone"](views, masks)
            tokens = torch.cat([tokens, *(side["backbone"](images)[0] for images in locals_)])
            patch_head = side["patch_head" if "patch_head" in side else "head"]
            masked = patches.flatten(0, 1).index_select(0, indices)
            rows = tokens.unflatten(0, (-1, len(batch[0])))
            return side["head"].factored_logits(rows), patch_head.factored_logits(masked)

        with torch.no_grad():
            teacher = outputs(self.teacher, None)
        student = outputs(self.student, masks, local)
        dino = self.loss(teacher[0], student[0], self.current_epoch)
        return {"dino": dino, "ibot": self.patch_loss(teacher[1], student[1], masks, self.current_epoch)}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        terms = self.terms(batch, self.masks(batch, batch_idx))
        koleo = torch.tensor(0.5, device=self.device)
        loss = terms["dino"] + terms["ibot"] + 0.1 * koleo
        for name, value in {"loss": loss, **terms, "koleo": koleo}.items():
            self.log(name, value, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.student.parameters() if p.requires_grad])


class GivenMasks(TinyDINOv2):
    """Takes the masks (B, 2, N) of both global views from the batch, so that they follow the images."""

    def masks(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return batch[1].transpose(0, 1).flatten(0, 1).cpu()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.04)  # more would amplify rounding


def tiny_dinov2(kind: type[TinyDINOv2] = TinyDINOv2, **options: Any) -> TinyDINOv2:
    """The same weights each time."""
    torch.manual_seed(0)
    return kind(**options)


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
