"""All callbacks in a Trainer of the package pytorch_lightning, which has classes of its own."""

import copy

import pytest
import pytorch_lightning
import torch
from helpers.toy_training import loader
from lightning_utilities.core.imports import RequirementCache
from torch import nn

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)


class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        head = DINOProjectionHead(8, 8, 4, 16, batch_norm=False, freeze_last_layer=2)
        self.student = nn.ModuleDict({"backbone": nn.Linear(8, 8), "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = DINOLoss(16)

    def training_step(self, batch, batch_idx):
        views = torch.stack([batch[0], batch[0] + 0.1])
        teacher, student = (side["head"](side["backbone"](views)) for side in (self.teacher, self.student))
        return self.loss(teacher, student, self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=0.01, weight_decay=0.04)


@pytest.mark.skipif(
    not RequirementCache("pytorch-lightning>=2.6"), reason="older versions take no callback of lightning.pytorch"
)
def test_every_callback_runs_in_it(tmp_path):
    module = Module()
    before = copy.deepcopy(module.teacher.state_dict())
    callbacks = [
        FreezeLastLayerCallback(),
        TeacherUpdateCallback(base_momentum=0.5),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
        CollapseMonitorCallback(5, patience=1000),
        KNNProbeCallback(loader(), loader(), k=1),
        ReportCallback(tmp_path),
    ]
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader())
    freeze, teacher, schedule, monitor, probe, report = (callback.receipt for callback in callbacks)
    assert freeze.startswith("student.head.last_layer frozen for 8 optimizer steps, bitwise unchanged")
    assert "on 1 of 1 ranks, in 12 of 12 optimizer steps" in teacher
    assert schedule.endswith("in 12 of 12 optimizer steps")
    assert monitor.startswith("looked at 3 of 12 batches, last with loss ")
    assert probe.startswith("knn/top1 1.0000 in epoch 2")
    assert report.startswith(f"{tmp_path / 'report.html'} written 1 times")
    assert not torch.equal(module.teacher["backbone"].weight, before["backbone.weight"])
