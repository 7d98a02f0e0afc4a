"""Tiny runs of `dino-head fit` that a test stops. Importable by name, for configurations and started processes."""

import os
import signal
import subprocess
import warnings
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import multiprocessing
from torch.utils.data import DataLoader, TensorDataset

from dino_head.cli.fit import FitCLI, fit
from dino_head.vision import ResumableLoader
from helpers.states import comparable
from helpers.tiny_dino import TinyDINO, tiny_dino

BATCHES, EPOCHS = 4, 3


class Model(TinyDINO):
    """Draws random views; notes what happens, and acts in the training step of a batch (counted over all epochs)."""

    events: ClassVar[list[Any]] = []
    actions: ClassVar[dict[Any, Callable[[], Any]]] = {}

    def __init__(self) -> None:
        tiny = tiny_dino()
        super().__init__(tiny.student["backbone"], tiny.student["head"], tiny.loss, random_views, warmup_epochs=1)

    def note(self, *event: Any) -> None:
        self.events.append(event)
        self.actions.pop(event[:2], lambda: None)()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.note("step", self.trainer.fit_loop.total_batch_idx, batch_idx, batch[1].tolist())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("sanity" if self.trainer.sanity_checking else "validation", self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.note("end", self.current_epoch)


def random_views(images: torch.Tensor) -> list[torch.Tensor]:
    return [images + 0.1 * torch.randn_like(images) for _ in range(3)]


class Data(LightningDataModule):
    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def labelled(self) -> TensorDataset:
        images = torch.randn(4 * BATCHES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return TensorDataset(images, torch.arange(len(images)))

    def train_dataloader(self) -> ResumableLoader:
        batch_size = 4 // self.trainer.world_size
        return ResumableLoader(self.labelled(), batch_size, self.trainer, seed=3, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        return DataLoader(self.labelled(), batch_size=8)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        images, labels = self.labelled().tensors
        return DataLoader(TensorDataset(images, labels % 2), 8), DataLoader(TensorDataset(images + 0.1, labels % 2), 8)


def arguments(folder: Path, *more: str) -> list[str]:
    """A command; its configuration lies beside the folder of the run."""
    trainer = {
        "accelerator": "cpu", "limit_val_batches": 0, "max_epochs": EPOCHS, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [
            {"class_path": "dino_head.callbacks.FreezeLastLayerCallback"},
            {"class_path": "dino_head.callbacks.TeacherUpdateCallback"},
            {"class_path": "dino_head.callbacks.KNNProbeCallback", "init_args": {"k": 3}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
             "init_args": {"filename": "last", "enable_version_counter": False}},
        ],
    }  # fmt: skip
    names = {"model": {"class_path": f"{__name__}.Model"}, "data": {"class_path": f"{__name__}.Data"}}
    file = folder.parent / "tiny.yaml"
    file.write_text(yaml.safe_dump({"seed_everything": 0, **names, "trainer": trainer}))
    return ["--config", str(file), "--out", str(folder), *more]


def run(folder: Path, *more: str) -> FitCLI:
    return fit(arguments(folder, *more))


def result(folder: Path) -> Any:
    """Result of training: weights, optimizer, counters, the probe's history."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return comparable({name: saved[name] for name in names}), saved["callbacks"]["KNNProbeCallback"]["history"]


def batches(folder: Path, name: str = "interrupted") -> int:
    """Number of batches that the run of a checkpoint has trained on."""
    saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]


def send(name: str, times: int = 1) -> Callable[[], None]:
    """An action that sends a signal to this process."""

    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, name))

    return act


def run_and_signal_group(folder: Path) -> None:
    """In a process of its own: SIGTERM to it and its workers, inside the second epoch, from another process.

    Workers end without an error at a SIGTERM of their parent.
    """
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # else loaders' workers would start as this process did
    torch.set_num_threads(1)

    def act() -> None:
        subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"], check=True, start_new_session=True)
        connection.wait([worker.sentinel for worker in multiprocessing.active_children()], timeout=0.5)

    Model.actions["step", 5] = act
    run(folder, "--data.workers=1")


def run_stop_and_resume(folder: Path) -> tuple[dict[str, Any], dict[str, int], bool]:
    """In two processes, one of which gets a signal: exit codes, batches until then, whether the results are equal."""
    warnings.simplefilter("ignore")
    two, rank = ("--devices=2",), int(os.environ["RANK"])
    run(folder / "whole", *two)
    codes, saved, same = {}, {}, True
    for sender, name in enumerate(["SIGTERM", "SIGUSR1"]):
        out = folder / name
        if rank == sender:
            Model.actions["step", 5] = send(name)
        try:
            run(out, *two)
        except SystemExit as end:
            codes[name] = end.code
        saved[name] = batches(out)
        run(out, *two, "--resume")
        one, other = result(out)[0], result(folder / "whole")[0]
        same = same and all(torch.equal(one["state_dict"][key], value) for key, value in other["state_dict"].items())
    return codes, saved, same


def overfit_batches(folder: Path) -> list[Any]:
    """In two processes: the labels of each batch of this one."""
    warnings.simplefilter("ignore")
    run(folder / "run", "--devices=2", "--trainer.overfit_batches=2")
    return [event[3] for event in Model.events if event[0] == "step"]
