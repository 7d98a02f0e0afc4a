"""DINO as a LightningModule, to be read as the method (Caron et al. 2021, arXiv:2104.14294, algorithm 1).

What DINO does around the step are callbacks: `FreezeLastLayerCallback` and `TeacherUpdateCallback` belong in the
Trainer.

Sizes: B samples, V views of which the first T are global, D features, K prototypes.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dino_head import DINOLoss, DINOProjectionHead, FactoredLogits, cosine_schedule, multicrop_forward


class DINO(LightningModule):
    """A student learns to predict, from any view of an image, what its own slow average says of the global views.

    Args:
        backbone: maps images (B, C, H, W) of each view's size to features (B, D).
        head: scores features (..., D) by K prototypes.
        loss: of the same K.
        augment: images (B, C, H, W) -> V views; runs on the device, in training only.
        global_views: T; the first T views are what the teacher sees.
        learning_rate: at the end of the warm-up; falls to a thousandth of it along a cosine.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: for matrices; biases, norms and scales have none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOProjectionHead,
        loss: DINOLoss,
        augment: Callable[[Tensor], list[Tensor]],
        global_views: int = 2,
        learning_rate: float = 5e-4,
        warmup_epochs: int = 10,
        weight_decay: float = 0.04,
    ) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = loss
        self.augment = augment
        self.global_views = global_views
        self.learning_rate = learning_rate
        self.warmup_epochs = warmup_epochs
        self.weight_decay = weight_decay

    def images(self, batch: Any) -> Tensor:
        """The images (B, C, H, W) of a batch: the first of a tuple. Override it for batches of another form."""
        images: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
        return images

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """In training, images (B, C, H, W) -> V views (B, C, H', W'), the global ones first."""
        return self.augment(self.images(batch)) if self.trainer.training else batch

    def outputs(self, side: nn.ModuleDict, views: list[Tensor]) -> FactoredLogits:
        """Views (B, C, H, W) -> z (V, B, bottleneck) and prototypes (K, bottleneck): logits are never in memory."""
        features = multicrop_forward(side["backbone"], views)  # (V, B, D)
        factored: FactoredLogits = side["head"].factored_logits(features)  # type: ignore[operator]
        return factored

    def training_step(self, views: list[Tensor], batch_idx: int) -> Tensor:
        """The student predicts the teacher: V views (B, C, H, W) -> the loss, a scalar."""
        student = self.outputs(self.student, views)
        with torch.no_grad():
            teacher = self.outputs(self.teacher, views[: self.global_views])
        loss: Tensor = self.loss(teacher, student, self.current_epoch)  # -sum_k p_t log q_s, mean over t != s and B
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=views[0].shape[0])
        return loss

    def forward(self, images: Tensor) -> Tensor:
        """Features of the teacher, the better of the two: (B, C, H, W) -> (B, D)."""
        features: Tensor = self.teacher["backbone"](images)
        return features

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with weight decay on matrices only; warm-up, then a cosine, by optimizer steps."""
        trained = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if p.ndim > 1 and not name.endswith("weight_g")]
        others = [p for name, p in trained if p.ndim <= 1 or name.endswith("weight_g")]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_epochs * math.ceil(
            self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_schedule(step, 1.0, 1e-3, total, warmup_steps=warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
