"""A tiny student and teacher, data and trainers for the tests of the callbacks.

Importable by name, so that processes started with spawn find it.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOProjectionHead
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.04, **options)


class Toy(LightningModule):
    """Student and teacher of width 8 with 16 prototypes; the loss is any number that reaches all parameters."""

    def __init__(self, make_optimizer: Callable[..., Any] = adamw, **head: Any):
        super().__init__()
        options = {"batch_norm": False, "freeze_last_layer": 2, **head}
        self.student = nn.ModuleDict({"backbone": nn.Linear(8, 8), "head": DINOProjectionHead(8, 8, 4, 16, **options)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.make_optimizer = make_optimizer

    def loss(self, batch: Any) -> torch.Tensor:
        logits = self.student["head"](self.student["backbone"](batch[0]))
        return nn.functional.cross_entropy(logits, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.student.parameters() if p.requires_grad])


class Manual(Toy):
    """Manual optimization in one of three ways: how backward is called, and which optimizer steps."""

    def __init__(self, backward: str, optimizer: str = "lightning", **head: Any):
        super().__init__(**head)
        self.automatic_optimization = False
        self.backward_by, self.step_by = backward, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=self.step_by == "lightning")
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss) if self.backward_by == "lightning" else loss.backward()
        optimizer.step()


class Recorder(Callback):
    """Notes the last layer's direction before training and after each batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def note(self, pl_module: LightningModule) -> None:
        self.weights.append(pl_module.student["head"].last_layer.weight_v.detach().clone())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.note(pl_module)

    @property
    def moved(self) -> list[bool]:
        """For each batch, whether the layer was changed by it."""
        return [not torch.equal(a, b) for a, b in zip(self.weights, self.weights[1:], strict=False)]


class SaveRank(Callback):
    """Writes each process's weights and the freezes' receipts at the end of training."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")
        receipts = [callback.receipt for callback in trainer.callbacks if hasattr(callback, "receipt")]
        (self.folder / f"rank{trainer.global_rank}.txt").write_text("\n".join(map(str, receipts)))


class Stateful(DataLoader[Any]):
    """Begins where it was when it was saved, once; without a sampler, so that the order is that of the data."""

    done, begin = 0, 0

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= begin:
                self.done = index + 1
                yield batch

    def state_dict(self):
        return {"done": self.done % len(self)}

    def load_state_dict(self, state_dict):
        self.begin = state_dict["done"]


def loader(batches: int = 4, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * batch_size, 8, generator=generator)
    y = torch.randint(16, (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def rules() -> list[Any]:
    """All of DINO's rules, with values that show in a few steps."""
    return [
        FreezeLastLayerCallback(1),
        TeacherUpdateCallback(base_momentum=0.7),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
    ]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})
