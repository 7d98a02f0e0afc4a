"""DINO as a LightningModule: the method on one screen (Caron et al. 2021, arXiv:2104.14294, algorithm 1).

Callbacks do the rest: add `FreezeLastLayerCallback` and `TeacherUpdateCallback` to the Trainer, and
`ScheduleCallback("weight_decay", (0.04, 0.4))` for the published increase of weight decay.

Sizes: B samples, V views of which the first T are global, D features, K prototypes.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dino_head import (
    DINOLoss,
    DINOProjectionHead,
    FactoredLogits,
    cosine_schedule,
    derived_seed,
    multicrop_forward,
    parameter_groups,
)


class DINO(LightningModule):
    """A student learns to predict, from each view of an image, its moving average's output for the global views.

    Args:
        backbone: Network that maps images (B, C, H, W) of each view's size to features (B, D), or to a pair of class
            tokens (B, D), which are the features, and patch tokens (B, N, D).
        head: Projection head that maps features (..., D) to logits of K prototypes.
        loss: Objective, with as many prototypes as the head.
        augment: Augmentation that maps images (B, C, H, W) to V views; it runs on the device, only in training.
        global_views: Number T of global views; they are the first views, and the teacher sees no others.
        learning_rate: Learning rate after the warm-up, from which it falls along a cosine.
        min_learning_rate: Learning rate at the end of the run.
        warmup_epochs: Number of epochs in which the learning rate rises linearly. In a run of fewer epochs, it rises in
            the first tenth of the run instead, with a warning.
        weight_decay: Weight decay of matrices; biases, norms and scales have none.
        clip_per_parameter: Maximum norm of each parameter's gradient (3.0 in the authors' code); by default, only the
            Trainer's gradient_clip_val clips.
        seed: Seed of augmentation and dropout. With process, epoch and batch it determines all random draws, so that a
            resumed run equals an uninterrupted one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOProjectionHead,
        loss: DINOLoss,
        augment: Callable[[Tensor], list[Tensor]],
        global_views: int = 2,
        learning_rate: float = 5e-4,
        min_learning_rate: float = 1e-6,
        warmup_epochs: int = 10,
        weight_decay: float = 0.04,
        clip_per_parameter: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss, self.augment, self.global_views = loss, augment, global_views
        self.learning_rate, self.min_learning_rate, self.weight_decay = learning_rate, min_learning_rate, weight_decay
        self.warmup_epochs, self.clip_per_parameter, self.seed = warmup_epochs, clip_per_parameter, seed

    def images(self, batch: Any) -> Tensor:
        """The images (B, C, H, W) of a batch: the first item of a tuple. Override it for batches of another form."""
        images: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
        return images

    def views(self, batch: Any, batch_idx: int) -> list[Tensor]:
        """A batch -> V views (B, C, H', W'), the global ones first; seed, process, epoch and batch determine them."""
        torch.manual_seed(derived_seed(self.seed, self.global_rank, self.current_epoch, batch_idx))
        with torch.autocast(self.device.type, enabled=False):
            return [view.to(self.dtype) for view in self.augment(self.images(batch))]

    def outputs(self, side: nn.ModuleDict, views: list[Tensor]) -> FactoredLogits:
        """Views (B, C, H, W) -> z (V, B, bottleneck) and prototypes (K, bottleneck), the factors of the logits."""
        output = multicrop_forward(side["backbone"], views)
        features = output[0] if isinstance(output, tuple) else output  # (V, B, D)
        return side["head"].factored_logits(features)  # type: ignore[operator, no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The student predicts the teacher: a batch of images (B, C, H, W) -> the loss, a scalar."""
        views = self.views(batch, batch_idx)
        student = self.outputs(self.student, views)
        with torch.no_grad():
            teacher = self.outputs(self.teacher, views[: self.global_views])
        loss: Tensor = self.loss(teacher, student, self.current_epoch)  # -sum_k p_t log q_s, mean over t != s and B
        # The mean over an epoch; `dino/loss` of CollapseMonitorCallback is the loss of single batches.
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=views[0].shape[0])
        return loss

    def forward(self, images: Tensor) -> Tensor:
        """Features of the teacher, which are better than the student's: (B, C, H, W) -> (B, D)."""
        output = self.teacher["backbone"](images)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
        """Clip the gradient of each parameter, then all gradients together by the Trainer's gradient_clip_val."""
        if self.clip_per_parameter is not None:
            for parameter in self.student.parameters():
                nn.utils.clip_grad_norm_(parameter, self.clip_per_parameter)
        self.clip_gradients(optimizer, *args, **options)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with weight decay only on matrices, and a learning rate with warm-up and cosine by optimizer steps."""
        optimizer = torch.optim.AdamW(parameter_groups(self.student, self.weight_decay), lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Factor of the learning rate at an optimizer step."""
        if step == 0:  # called before the data are loaded: counting them here would break resuming the loader
            return float(self.warmup_epochs == 0)
        run = self.trainer
        total, end = int(run.estimated_stepping_batches), self.min_learning_rate / self.learning_rate
        warmup = self.warmup_epochs * math.ceil(run.num_training_batches / run.accumulate_grad_batches)
        if warmup > total:
            rank_zero_warn(f"warmup_epochs={self.warmup_epochs} is longer than the run: warming up in its first tenth")
            warmup = total // 10
        return cosine_schedule(step, 1.0, end, total, warmup_steps=warmup)
