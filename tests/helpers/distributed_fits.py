"""Runs of a Trainer in several processes. Importable by name, so that started processes find it."""

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dino_head import koleo_loss
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    TeacherUpdateCallback,
)
from dino_head.cli.fit import fit
from dino_head.vision.loaders import ResumableLoader
from helpers.scripts import SendSignal
from helpers.states import comparable
from helpers.tiny_dino import TinyDINO, tiny_dino
from helpers.toy_training import rules, trainer

CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")  # fully_shard of older versions of torch needs a GPU
IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.04)  # more would amplify rounding


def halves(batch_size: int = 4) -> DataLoader[Any]:
    """Each process's part of the batches that one process would have: of 0 1 2 3 the first takes 0 2."""
    world = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    sampler = DistributedSampler(IMAGES, *world, shuffle=False)
    return DataLoader(TensorDataset(IMAGES), batch_size // world[0], sampler=sampler)


def state(module: LightningModule) -> dict[str, torch.Tensor]:
    """Whole values, wherever they are sharded."""
    with torch.no_grad():
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
            for name, value in module.state_dict().items()
        }


def fit_rules(module: LightningModule, **options: Any) -> dict[str, Any]:
    """Weights, center and receipts of a run on this process's half of the data."""
    callbacks = rules()
    devices = int(os.environ.get("WORLD_SIZE", 1))
    trainer(*callbacks, devices=devices, **options).fit(module, halves())
    return {"state": state(module), "receipts": [callback.receipt for callback in callbacks]}


def seeded(**options: Any) -> TinyDINO:
    torch.manual_seed(0)
    return tiny_dino(sgd, warmup_epochs=0, clip_per_parameter=0.3, **options)


class Sharded(TinyDINO):
    """Both sides under fully_shard."""

    reshard_teacher = True

    def configure_model(self) -> None:
        for side in (self.student, self.teacher):
            for part in side.values():
                mesh = self.device_mesh["data_parallel"]
                fully_shard(part, mesh=mesh, reshard_after_forward=side is self.student or self.reshard_teacher)
            register_fsdp_forward_method(side["head"], "factored_logits")


def sharded(**attributes: Any) -> TinyDINO:
    module = seeded()
    module.__class__ = Sharded
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class ManualDINO(TinyDINO):
    """Manual optimization that accumulates two batches, each with a backward that reduces over the processes."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def ddp(**options: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **options)


def data_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def half_each(folder: Path) -> dict[str, Any]:
    """One run for each strategy."""
    return {
        "ddp": fit_rules(seeded(), strategy=ddp()),
        "find_unused_parameters": fit_rules(seeded(), strategy=ddp(find_unused_parameters=True)),
        "static_graph": fit_rules(seeded(), strategy=ddp(static_graph=True)),
        "gradient_as_bucket_view": fit_rules(seeded(), strategy=ddp(gradient_as_bucket_view=True)),
        "accumulated": fit_rules(seeded(), strategy=ddp(), accumulate_grad_batches=2),
        **(sharded_halves() if CAN_SHARD else {}),
    }


def sharded_halves() -> dict[str, Any]:
    return {
        "fully_shard": fit_rules(sharded(), strategy=data_parallel()),
        "accumulated, sharded": fit_rules(sharded(), strategy=data_parallel(), accumulate_grad_batches=2),
    }


def manual(folder: Path) -> dict[str, Any]:
    """Accumulation by hand, as one process or two."""
    module = seeded()
    module.__class__ = ManualDINO
    module.automatic_optimization = False
    callback = TeacherUpdateCallback(base_momentum=0.7, total_steps=18)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    trainer(callback, devices=devices, strategy=ddp() if devices > 1 else "auto").fit(module, halves())
    return {"state": state(module), "steps": callback.steps_taken}


def refused(module: LightningModule, strategy: Strategy, *callbacks: Callback) -> str:
    """The error of a run."""
    try:
        trainer(*callbacks, devices=2, strategy=strategy).fit(module, halves())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Flat(TinyDINO):
    """FSDP with flat parameters."""

    def configure_model(self) -> None:
        self.student["head"] = FullyShardedDataParallel(
            self.student["head"], use_orig_params=False, device_id=torch.device("cpu")
        )


class OwnShards(Sharded):
    """A student that is sharded, and a teacher that is not."""

    def configure_model(self) -> None:
        for part in self.student.values():
            fully_shard(part, mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self.student["head"], "factored_logits")


def refusals(folder: Path) -> dict[str, str]:
    flat, own = seeded(), seeded()
    flat.__class__, own.__class__ = Flat, OwnShards
    return {
        "flat": refused(flat, ddp(), FreezeLastLayerCallback(1)),
        "gathered teacher": CAN_SHARD
        and refused(sharded(reshard_teacher=False), data_parallel(), TeacherUpdateCallback()),
        "teacher not sharded": refused(own, data_parallel(), TeacherUpdateCallback()),
    }


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 1, 8, 8, generator=generator) + 0.3 * labels[:, None, None, None], labels)


REPORTED = {"plain", "sharded"}  # each other costs as much, and would show nothing more


def watched(folder: Path) -> dict[str, list[float]]:
    """What monitor and probe see in runs on data to be shared, on shares, on data without labels, and with shards."""
    devices = int(os.environ.get("WORLD_SIZE", 1))
    train, test = samples(50, seed=1), samples(23, seed=2)
    own = DistributedSampler(train, devices, int(os.environ.get("RANK", 0)), shuffle=False)
    probes = {
        "plain": KNNProbeCallback(DataLoader(train, 8, shuffle=True), DataLoader(test, 5), k=5),
        "shares": KNNProbeCallback(DataLoader(train, 8, sampler=own), DataLoader(test, 23), k=5),
        "unlabelled": KNNProbeCallback(DataLoader(train.tensors[0], 8), DataLoader(test, 23), k=5),
    }
    if CAN_SHARD:
        probes["sharded"] = KNNProbeCallback(DataLoader(train, 8), DataLoader(test, 5), k=5)
    result = {}
    for name, probe in probes.items():
        is_sharded = name == "sharded" and devices > 1
        strategy = "auto" if devices == 1 else data_parallel() if is_sharded else ddp()
        watching = [CollapseMonitorCallback(2, patience=1000), probe]
        if name in REPORTED:
            watching.append(ReportCallback(folder / f"{name}-{devices}"))
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            run = trainer(*rules(), *watching, devices=devices, strategy=strategy, max_epochs=2)
            run.fit(sharded() if is_sharded else seeded(), halves())
        result[f"{name} top1"] = [row["top1"] for row in probe.history]
        result[f"{name} warnings"] = [float(sum("labels are missing" in str(w.message) for w in given))]
        for value in ("loss", "teacher_entropy", "kl", "rankme", "prototypes_used", "prototype_perplexity"):
            result[f"{name} {value}"] = [look[value] for look in watching[0].history]
    return result


class Shuffled(LightningDataModule):
    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(TensorDataset(IMAGES), 4 // self.trainer.world_size, self.trainer, seed=3)


def random_views(images: torch.Tensor) -> list[torch.Tensor]:
    return [images + 0.1 * torch.randn_like(images) for _ in range(3)]


def random_run(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Shuffling, random views and dropout, AdamW; a checkpoint after each optimizer step."""
    torch.manual_seed(0)
    module = tiny_dino(warmup_epochs=1, seed=5)
    module.augment = random_views
    for side, rate in zip((module.student, module.teacher), (0.2, 0.0), strict=True):
        side["backbone"] = nn.Sequential(side["backbone"], nn.Dropout(rate))
    torch.manual_seed(len(os.listdir(folder)))  # whatever state a process begins with
    save = ModelCheckpoint(folder / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    strategy = ddp() if devices > 1 else "auto"
    run = trainer(
        *rules(), save, *callbacks, devices=devices, strategy=strategy, max_epochs=2, enable_checkpointing=True
    )
    run.fit(module, Shuffled(), ckpt_path=ckpt_path)
    (optimizer,), (scheduler,) = run.optimizers, run.lr_scheduler_configs
    states = {"optimizer": optimizer.state_dict(), "rate": scheduler.scheduler.state_dict()}
    return {"state": state(module), **comparable(states)}


def uninterrupted(folder: Path) -> dict[str, Any]:
    return random_run(folder)


def killed(folder: Path) -> None:
    """In the second of two epochs of 12 steps."""
    random_run(folder, SendSignal(signal.SIGKILL, step=17, rank=int(os.environ.get("WORLD_SIZE", 1)) - 1))


def resumed(folder: Path) -> dict[str, Any]:
    return random_run(folder, ckpt_path=folder / "checkpoints" / "step=17.ckpt")


def run_recipe(folder: Path) -> dict[str, Any]:
    """A run by the command in `command.json`."""
    warnings.filterwarnings("ignore")
    cli = fit(json.loads((folder / "command.json").read_text()))
    return {"receipts": cli.results["receipts"], "state": state(cli.model), "steps": cli.trainer.global_step}


class RawSteps(TinyDINO):
    """Manual optimization with an optimizer that Lightning does not know."""

    automatic_optimization = False

    def configure_optimizers(self) -> None:
        self.raw = sgd(self.student.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.raw.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.raw.step()


class NaN(Callback):
    """Makes the images of one process NaN, in one batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 4:
            batch[0].fill_(torch.nan)


class LazyOnOne(TeacherUpdateCallback):
    """Updates nothing in the second process."""

    def _update(self) -> None:
        if not torch.distributed.get_rank():
            super()._update()
        else:
            for loss in self._losses.losses.values():
                loss._collected = None
            torch.distributed.all_reduce(torch.zeros(17))  # with the center's sums of the first


class Kept(Callback):
    """Keeps the weights before the batch that has NaN, or before its accumulation window."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.before = state(pl_module)


def nan_on_one(folder: Path) -> dict[str, Any]:
    """For each kind of optimization: the error, and the weights before the NaN and after the run."""
    results = {}
    for name, raw, options in (
        ("automatic", False, {}),
        ("accumulated", False, {"accumulate_grad_batches": 2}),
        ("raw", True, {}),
    ):
        module = seeded()
        if raw:
            module.__class__ = RawSteps
            module.automatic_optimization = False
        kept = Kept()
        rule = TeacherUpdateCallback(total_steps=100)
        try:
            trainer(kept, NaN(), rule, devices=2, strategy=ddp(), **options).fit(module, halves())
            error = "none"
        except FloatingPointError as raised:
            error = str(raised)
        results[name] = {"error": error, "before": kept.before, "after": state(module)}
    lazy = LazyOnOne(base_momentum=0.9)
    trainer(lazy, devices=2, strategy=ddp(), max_epochs=1).fit(seeded(), halves())
    return {**results, "receipt": lazy.receipt}


class SkipsTheLoss(TinyDINO):
    """One process does not call the loss in one batch; a frozen stem makes the callbacks follow a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 3:
            value = sum(parameter.sum() for parameter in self.student.parameters() if parameter.requires_grad)
            loss = 0 * value
        else:
            loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss


def loss_skipped_on_one(folder: Path) -> list[str | None]:
    """The receipts of runs under automatic and manual optimization."""
    receipts = []
    for automatic in (True, False):
        module = seeded()
        module.__class__, module.automatic_optimization = SkipsTheLoss, automatic
        module.stem = nn.Linear(2, 2).requires_grad_(False)
        rule = TeacherUpdateCallback(base_momentum=0.9, final_momentum=0.9)
        trainer(CollapseMonitorCallback(), rule, devices=2, strategy=ddp(), max_epochs=1).fit(module, halves())
        receipts.append(rule.receipt)
    return receipts


class Spread(LightningModule):
    """A linear map with KoLeo over the features of all processes, gathered as `koleo_loss` describes it."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(64, 3)
        self.seen: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.x = self.map(batch[0].flatten(1))
        x.retain_grad()
        candidates = self.all_gather(x, sync_grads=True).flatten(end_dim=-2)
        loss = koleo_loss(x, topk=2, candidates=candidates, offset=self.global_rank * len(x))
        self.seen["loss"] = loss.detach()
        return loss

    def on_after_backward(self) -> None:
        self.seen |= {"x": self.x.grad, "weight": self.map.weight.grad.clone()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def spread_features(folder: Path) -> dict[str, Any]:
    """Loss and gradients of one step on this process's part of a batch of 12."""
    torch.manual_seed(0)
    module, devices = Spread(), int(os.environ.get("WORLD_SIZE", 1))
    trainer(devices=devices, strategy=ddp() if devices > 1 else "auto", max_steps=1).fit(module, halves(12))
    return module.seen
