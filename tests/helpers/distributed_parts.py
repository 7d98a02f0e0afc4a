"""Parts of the core in several processes. Importable by name, so that started processes find them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss, dino_loss
from dino_head.metrics import DINOStatistics, KNNAccuracy, RankMe
from helpers.processes import in_gloo_group


def objective(loss: DINOLoss, teacher: torch.Tensor, student: torch.Tensor) -> dict[str, Any]:
    """Three training calls."""
    student = student.clone().requires_grad_()
    for _ in range(3):
        value = loss(teacher, student)
    (gradient,) = torch.autograd.grad(value, student)
    return {"loss": value.detach(), "gradient": gradient, "center": loss.center}


@in_gloo_group
def objective_of_my_samples(rank: int, folder: Path) -> dict[str, Any]:
    """The first process takes 2 samples, the second the others."""
    centering, teacher, student = torch.load(folder / "input.pt")
    part = slice(0, 2) if rank == 0 else slice(2, None)
    return objective(DINOLoss(teacher.shape[-1], centering=centering), teacher[:, part], student[:, part])


def patch_objective(loss: IBOTPatchLoss, calls: list[Any]) -> dict[str, Any]:
    """Training calls with (teacher, student, masks)."""
    losses, gradients = [], []
    for teacher, student, masks in calls:
        student = student.clone().requires_grad_()
        losses.append(loss(teacher, student, masks))
        gradients += torch.autograd.grad(losses[-1], student)
    return {"losses": [value.detach() for value in losses], "gradients": gradients, "center": loss.center}


@in_gloo_group
def patch_objective_of_my_views(rank: int, folder: Path) -> dict[str, Any]:
    """Each process takes its part of each call."""
    centering, calls = torch.load(folder / "input.pt")
    return patch_objective(IBOTPatchLoss(16, centering=centering), [call[rank] for call in calls])


class Objective(nn.Module):
    """A student's logits beside given teacher logits, as one module that DDP can wrap."""

    def __init__(self):
        super().__init__()
        self.shift, self.loss = nn.Parameter(torch.zeros(16)), DINOLoss(16)
        self.loss.defer_center_update = True

    def forward(self, teacher: torch.Tensor) -> torch.Tensor:
        return self.loss(teacher, teacher + self.shift)


@in_gloo_group
def deferred_center(rank: int, folder: Path) -> torch.Tensor:
    """The center after two forwards and backwards under DDP, which broadcasts buffers before each."""
    logits = torch.load(folder / "logits.pt")  # (forwards, processes, T, B, K)
    module = nn.parallel.DistributedDataParallel(Objective())
    for of_forward in logits:
        module(of_forward[rank]).backward()
    module.module.loss.apply_center_update()
    return module.module.loss.center


@in_gloo_group
def sharded_heads(rank: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Full gradients of sharded heads, normed and plain, on this process's half of the samples."""
    results = []
    for norm_last_layer in (True, False, None):
        head, views = sharded_case(norm_last_layer)
        fully_shard(head)
        head_loss(head, views[:, 2 * rank : 2 * rank + 2]).backward()
        results.append({name: p.grad.full_tensor() for name, p in head.named_parameters() if p.requires_grad})
    return results


def sharded_case(norm_last_layer: bool | None) -> tuple[DINOProjectionHead, torch.Tensor]:
    torch.manual_seed(0)
    head = DINOProjectionHead(8, 8, 4, 32, batch_norm=False, norm_last_layer=norm_last_layer)
    for parameter in head.layers.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    return head, torch.randn(3, 4, 8)


def head_loss(head: DINOProjectionHead, views: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        teacher = head.factored_logits(views[:2].flip(0))
    return dino_loss(teacher, head.factored_logits(views))


def measure(part: slice, folder: Path) -> dict[str, Any]:
    """All metrics of some of the samples."""
    teacher, student, voters, (features, labels) = torch.load(folder / "input.pt", weights_only=False)
    statistics, rank, knn = DINOStatistics(24), RankMe(6), KNNAccuracy(*voters)
    statistics.update(teacher.logits()[:, part], student.logits()[:, part])
    rank.update(features[part])
    knn.update(features[part], labels[part])
    return {**statistics.compute(), "rank": rank.compute(), "knn": knn.compute()}


@in_gloo_group
def metrics_of_my_samples(rank: int, folder: Path) -> dict[str, Any]:
    return measure(slice(0, 2) if rank == 0 else slice(2, None), folder)
