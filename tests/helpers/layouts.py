"""LightningModules with student and teacher in the layouts that people use, trained with a DINOLoss."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dino_head import DINOLoss, DINOProjectionHead


def batches(count: int = 6, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.randn(count * batch_size, 8, generator=torch.Generator().manual_seed(1)), batch_size)


def backbone(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))


def head() -> DINOProjectionHead:
    return DINOProjectionHead(8, 8, 4, 16, batch_norm=False)


def copied(module: nn.Module) -> Any:
    return copy.deepcopy(module).requires_grad_(False)


class Sides(LightningModule):
    """Base class: `outputs(side, x)` of "student" and "teacher"; all trained parameters are optimized."""

    automatic = True

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.loss = DINOLoss(16, warmup_teacher_temp_epochs=0)

    def outputs(self, side: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        views = torch.stack([x, x.flip(0)])
        with torch.no_grad():
            teacher = self.outputs("teacher", views)
        loss: Tensor = self.loss(teacher, self.outputs("student", views))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class InDicts(Sides):
    """`student` and `teacher`, each a ModuleDict of backbone and head."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student = nn.ModuleDict({"backbone": backbone(), "head": head()})
        self.teacher = copied(self.student)

    def outputs(self, side: str, x: Tensor) -> Tensor:
        modules: Any = getattr(self, side)
        return modules["head"](modules["backbone"](x))


class TwoAttributes(Sides):
    """`student` and `student_head`, `teacher` and `teacher_head`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student, self.student_head = backbone(), head()
        self.teacher, self.teacher_head = copied(self.student), copied(self.student_head)

    def outputs(self, side: str, x: Tensor) -> Tensor:
        return getattr(self, f"{side}_head")(getattr(self, side)(x))


class FlatNames(Sides):
    """`student_backbone` and `student_head`, `momentum_backbone` and `momentum_head`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student_backbone, self.student_head = backbone(), head()
        self.momentum_backbone, self.momentum_head = copied(self.student_backbone), copied(self.student_head)

    def outputs(self, side: str, x: Tensor) -> Tensor:
        name = "momentum" if side == "teacher" else side
        return getattr(self, f"{name}_head")(getattr(self, f"{name}_backbone")(x))


class Wrapped(Sides):
    """Both sides inside a wrapper, `networks.online` and `networks.target`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.networks = nn.Module()
        self.networks.online = nn.Sequential(backbone(), head())
        self.networks.target = copied(self.networks.online)

    def outputs(self, side: str, x: Tensor) -> Tensor:
        modules: Any = self.networks
        return (modules.target if side == "teacher" else modules.online)(x)


class SharedStem(Sides):
    """Both sides begin with one frozen module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        stem = nn.Linear(8, 8).requires_grad_(False)
        self.student = nn.ModuleDict({"stem": stem, "backbone": backbone(), "head": head()})
        self.teacher = nn.ModuleDict(
            {"stem": stem, **{name: copied(self.student[name]) for name in ("backbone", "head")}}
        )

    def outputs(self, side: str, x: Tensor) -> Tensor:
        for module in getattr(self, side).values():
            x = module(x)
        return x


class CopiedStem(SharedStem):
    """Both sides begin with a frozen module, of which each has a copy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.teacher["stem"] = copied(self.student["stem"])


class Predictor(InDicts):
    """The student alone has a predictor."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student["predictor"] = nn.Linear(16, 16)

    def outputs(self, side: str, x: Tensor) -> Tensor:
        out = super().outputs(side, x)
        return self.student["predictor"](out) if side == "student" else out


class Distilled(InDicts):
    """The teacher is another architecture, and fixed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = copied(nn.ModuleDict({"backbone": backbone(width=16), "head": head()}))
