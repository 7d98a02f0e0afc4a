"""DINOv2 as a LightningModule: the method on one screen (Oquab et al. 2023, arXiv:2304.07193, section 4).

Callbacks do the rest: add `FreezeLastLayerCallback(steps=1250)`, `TeacherUpdateCallback(base_momentum=0.992)` and
`ScheduleCallback("weight_decay", (0.04, 0.4))` to the Trainer.

Sizes: B samples, V views of which the first T are global, N patches of a global view, M masked patches, D features.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dino_head import (
    DINOLoss,
    DINOProjectionHead,
    IBOTPatchLoss,
    cosine_schedule,
    derived_seed,
    koleo_loss,
    multicrop_forward,
    parameter_groups,
    random_block_masks,
)


class DINOv2(LightningModule):
    """A student predicts its moving average's output, for other views (DINO) and for masked patches (iBOT).

        loss = DINO + iBOT + koleo_weight * (KoLeo of the class tokens of each global view, before the head)

    The teacher runs in evaluation mode and sees the global views without masks, so drop path acts on the student alone.

    Args:
        backbone: Vision transformer, `backbone(images, masks=None)` -> class tokens (B, D) and patch tokens (B, N, D),
            with `patch_size`, such as `dino_head.vision.TokenFeatures`.
        head: Head for class tokens. DINOv2 sets `batch_norm=False` and `norm_last_layer=False`.
        loss: Objective of the class tokens, with as many prototypes as `head`.
        patch_loss: Objective of the masked patches, with as many prototypes as the patches' head.
        augment: Augmentation that maps images (B, C, H, W) to V views; it runs on the device, only in training.
        patch_head: Head for masked patches; by default, they share `head`.
        global_views: Number T of global views; they are the first views, and the teacher sees no others.
        mask_probability: Share of the global views that are masked.
        mask_ratio: Smallest and largest share of masked patches in a masked view.
        koleo_weight: Weight of KoLeo.
        learning_rate: Learning rate of the heads and the last norm after the warm-up, from which it falls along a
            cosine: 4e-3 sqrt(images per step / 1024) in DINOv2.
        min_learning_rate: Learning rate at the end of the run.
        warmup_epochs: Number of epochs in which the learning rate rises linearly. In a run of fewer epochs, it rises in
            the first tenth of the run instead, with a warning.
        layer_decay: Factor of the learning rate for each layer further from the heads; the last block has it once.
        patch_embed_lr_mult: Factor of the learning rate of the patch embedding.
        weight_decay: Weight decay of matrices; biases, norms and layer scale have none.
        clip: Maximum norm of the gradients of the backbone and of each head, each by itself.
        seed: Seed of augmentation, masks and drop path. With process, epoch and batch it determines all random draws,
            so that a resumed run equals an uninterrupted one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOProjectionHead,
        loss: DINOLoss,
        patch_loss: IBOTPatchLoss,
        augment: Callable[[Tensor], list[Tensor]],
        patch_head: DINOProjectionHead | None = None,
        global_views: int = 2,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        koleo_weight: float = 0.1,
        learning_rate: float = 1e-3,
        min_learning_rate: float = 1e-6,
        warmup_epochs: int = 10,
        layer_decay: float = 0.9,
        patch_embed_lr_mult: float = 0.2,
        weight_decay: float = 0.04,
        clip: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        heads = {"head": head} if patch_head is None else {"head": head, "patch_head": patch_head}
        self.student = nn.ModuleDict({"backbone": backbone, **heads}).train()  # `from_pretrained` sets evaluation mode
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.student.modules()):
            raise ValueError(
                "DINOv2 got a backbone or head with batch norm, which fails without masked patches and keeps its first "
                "statistics in a teacher in evaluation mode: set batch_norm=False in DINOProjectionHead"
            )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss, self.patch_loss, self.augment, self.global_views = loss, patch_loss, augment, global_views
        self.mask_options: Any = {"probability": mask_probability, "ratio": mask_ratio}
        self.learning_rate, self.min_learning_rate, self.weight_decay = learning_rate, min_learning_rate, weight_decay
        self.layer_rates: Any = {"layer_decay": layer_decay, "patch_embed_lr_mult": patch_embed_lr_mult}
        self.warmup_epochs, self.koleo_weight, self.clip, self.seed = warmup_epochs, koleo_weight, clip, seed
        self.patch_size: Any = backbone.patch_size

    def train(self, mode: bool = True) -> "DINOv2":
        """Set the mode of everything except the teacher, which is always in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def on_train_start(self) -> None:
        """Set the teacher to evaluation mode; before training starts, Lightning would warn about this."""
        self.teacher.eval()

    def images(self, batch: Any) -> Any:
        """The images (B, C, H, W) of a batch: the first item of a tuple. Override it for batches of another form."""
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def views(self, batch: Any, batch_idx: int) -> tuple[list[Tensor], Tensor]:
        """A batch -> V views (B, C, H', W'), the global ones first, and masks (T B, *grid) of these, on the CPU."""
        torch.manual_seed(derived_seed(self.seed, self.global_rank, self.current_epoch, batch_idx))
        with torch.autocast(self.device.type, enabled=False):
            views = [view.to(self.dtype) for view in self.augment(self.images(batch))]
        grid = [size // patch for size, patch in zip(views[0].shape[2:], self.patch_size, strict=True)]
        return views, random_block_masks(self.global_views * len(views[0]), grid, **self.mask_options)

    def outputs(self, side: nn.ModuleDict, views: list[Tensor], indices: Tensor, masks: Tensor | None = None) -> Any:
        """Views -> class tokens (V, B, D), their FactoredLogits, and those of the patches with these indices (M,)."""
        tokens, patches = multicrop_forward(side["backbone"], views, masks)
        masked = torch.cat(patches[: self.global_views]).flatten(0, 1).index_select(0, indices)  # (T B N, D) -> (M, D)
        heads: Any = side["head"], side["patch_head" if "patch_head" in side else "head"]
        return tokens, heads[0].factored_logits(tokens), heads[1].factored_logits(masked)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The student predicts the teacher: a batch of images (B, C, H, W) -> the loss, a scalar."""
        views, masks = self.views(batch, batch_idx)
        indices = masks.flatten().nonzero().squeeze(1).to(self.device, non_blocking=True)
        tokens, student, student_patches = self.outputs(self.student, views, indices, masks)
        with torch.no_grad():
            _, teacher, teacher_patches = self.outputs(self.teacher, views[: self.global_views], indices)
        dino = self.loss(teacher, student, self.current_epoch)
        ibot = self.patch_loss(teacher_patches, student_patches, masks, self.current_epoch)
        koleo = sum(koleo_loss(view) for view in tokens[: self.global_views])
        loss: Tensor = dino + ibot + self.koleo_weight * koleo
        terms = {"loss": loss, "dino": dino, "ibot": ibot, "koleo": koleo}  # logged as means over each epoch
        self.log_dict(terms, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(views[0]))
        return loss

    def forward(self, images: Tensor) -> Any:
        """Features of the teacher, which are better than the student's: (B, C, H, W) -> class tokens (B, D)."""
        return self.teacher["backbone"](images)[0]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
        """Clip the gradients of the backbone and of each head, then all by the Trainer's gradient_clip_val."""
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), self.clip)
        self.clip_gradients(optimizer, *args, **options)

    def configure_optimizers(self) -> Any:
        """AdamW with learning rates by layer, all multiplied by a warm-up and a cosine by optimizer steps."""
        groups = parameter_groups(self.student, self.weight_decay, lr=self.learning_rate, **self.layer_rates)
        optimizer = torch.optim.AdamW(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Factor of the learning rates at an optimizer step."""
        if step == 0:  # called before the data are loaded: counting them here would break resuming the loader
            return float(self.warmup_epochs == 0)
        run = self.trainer
        total, end = int(run.estimated_stepping_batches), self.min_learning_rate / self.learning_rate
        warmup = self.warmup_epochs * math.ceil(run.num_training_batches / run.accumulate_grad_batches)
        if warmup > total:
            rank_zero_warn(f"warmup_epochs={self.warmup_epochs} is longer than the run: warming up in its first tenth")
            warmup = total // 10
        return cosine_schedule(step, 1.0, end, total, warmup_steps=warmup)
