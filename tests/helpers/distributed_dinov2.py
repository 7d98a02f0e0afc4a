"""Runs of a tiny DINOv2 in several processes. Importable by name, so that started processes find it."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dino_head.callbacks import CollapseMonitorCallback, FreezeLastLayerCallback, TeacherUpdateCallback
from helpers.distributed_fits import ddp, state
from helpers.tiny_dinov2 import GivenMasks, Shuffled, TinyDINOv2, halves, sgd, tiny_dinov2, with_masks
from helpers.toy_training import rules, trainer

# Of each batch of four, the first process takes 0 2 and the second 1 3. No patch is masked in the second process in the
# first batch, in the first process in the second batch, and in both in the third.
NONE_IN = [1, 3, 4, 6, 8, 9, 10, 11]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "center": ({}, {}),
    "sinkhorn": ({"centering": "sinkhorn"}, {}),
    "shared head": ({"shared_head": True}, {}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
}


def devices() -> dict[str, Any]:
    count = int(os.environ.get("WORLD_SIZE", 1))
    return {"devices": count, "strategy": ddp() if count > 1 else "auto"}


def unequal(folder: Path) -> dict[str, dict[str, Any]]:
    """Weights, centers, receipts and measurements of runs in which the processes have unequal numbers of patches."""
    results = {}
    for name, (module_options, options) in CASES.items():
        module = tiny_dinov2(GivenMasks, make_optimizer=sgd, koleo_weight=0.0, **module_options)
        callbacks = [*rules(), CollapseMonitorCallback(1, patience=1000)]
        data = halves(with_masks(8, none_in=NONE_IN))
        trainer(*callbacks, **devices(), **options).fit(module, data)
        receipts = [callback.receipt for callback in callbacks]
        results[name] = {"state": state(module), "receipts": receipts, "history": callbacks[-1].history}
    return results


def run(folder: Path, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module = tiny_dinov2()
    torch.manual_seed(len(os.listdir(folder)))  # whatever state a process begins with
    fitted = trainer(*rules(), save, **devices(), max_epochs=2, enable_checkpointing=True)
    fitted.fit(module, Shuffled(), ckpt_path=ckpt_path)
    return state(module)


def resumed(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights after a run, and after one that was resumed in the middle of its second epoch of four steps."""
    return [run(folder), run(folder, folder / "step=6.ckpt")]


class NaN(Callback):
    """Makes one patch of the student NaN in the second process, in one batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.before = state(pl_module)
        if batch_idx == 2 and trainer.global_rank == 1:
            pl_module.student["patch_head"].register_forward_pre_hook(
                lambda _, given: (given[0].index_fill(0, torch.tensor([0]), torch.nan),)
            )


def nan_on_one(folder: Path) -> dict[str, Any]:
    """The error, and the weights before the NaN and after the run."""
    module, nan = tiny_dinov2(TinyDINOv2), NaN()
    error = "none"
    try:
        trainer(nan, TeacherUpdateCallback(), FreezeLastLayerCallback(), **devices()).fit(module, halves(with_masks()))
    except FloatingPointError as raised:
        error = str(raised)
    return {"error": error, "before": nan.before, "after": state(module)}
