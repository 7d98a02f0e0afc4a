"""Between checks, the host reads only the finite flag of the loss from the device."""

import re
from pathlib import Path

import pytest
import torch
from helpers.host_reads import ROOMS, ROOT, HostReads
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.tiny_dinov2 import TinyDINOv2, tiny_dinov2
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)
from dino_head.metrics import DINOStatistics, KNNAccuracy, RankMe

FLAG = ("losses.py", "read")
# Of masks on the CPU, for which nothing waits.
MASKS = {
    ("ibot.py", "_weights"),
    ("dinov2_module.py", "training_step"),
    *(("masking.py", name) for name in ("_tries", "random_block_masks")),
}


class During(Callback):
    """Counts the reads from the start of one batch to the start of another."""

    def __init__(self, first, last, **options):
        self.first, self.last, self.reads = first, last, HostReads(**options)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self.reads.__enter__()
        if batch_idx == self.last:
            self.reads.__exit__(None, None, None)

    @property
    def counts(self):
        return dict(self.reads.counts)


def all_callbacks(folder, module):
    """Without the report, which draws for seconds after the epoch, for all but the first module."""
    images = view_loader(4).dataset.tensors[0]
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 2), batch_size=4)
    callbacks = [
        FreezeLastLayerCallback(1),
        TeacherUpdateCallback(base_momentum=0.9),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
        CollapseMonitorCallback(every_n_steps=50),
    ]
    if isinstance(module, TinyDINOv2):
        return callbacks
    callbacks.append(KNNProbeCallback(loader, loader, k=3))
    return callbacks if module else [*callbacks, ReportCallback(folder, loader, loader)]


def fit(folder, during, module=None, **options):
    torch.manual_seed(0)
    callbacks = all_callbacks(folder, module)
    trainer(during, *callbacks, max_epochs=1, **options).fit(module or tiny_dino(warmup_epochs=0), view_loader(24))


class WithMetrics(type(tiny_dino())):
    """Updates all metrics in each step."""

    def training_step(self, batch, batch_idx):
        features = self.student["backbone"](self.images(batch))
        for metric, given in zip(self.metrics, [(features,), (features, batch[1].long())], strict=True):
            metric.update(*given)
        factored = self.outputs(self.student, self.views(batch, batch_idx))
        self.statistics.update(factored, factored)
        return super().training_step(batch, batch_idx)


def with_metrics():
    module = tiny_dino(warmup_epochs=0)
    module.__class__ = WithMetrics
    voters = KNNAccuracy(torch.randn(8, 4), torch.arange(8) % 2, k=3)
    module.metrics, module.statistics = torch.nn.ModuleList([RankMe(4), voters]), DINOStatistics(16)
    return module


def with_sinkhorn():
    module = tiny_dino(warmup_epochs=0)
    module.loss = DINOLoss(16, centering="sinkhorn")
    return module


def with_logits():
    module = tiny_dino(warmup_epochs=0)
    outputs = module.outputs
    module.outputs = lambda side, views: outputs(side, views).logits()
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options", "flags"),
    [
        (None, {}, 10),
        (with_metrics, {}, 10),
        (with_sinkhorn, {}, 10),
        (with_logits, {}, 10),
        (lambda: tiny_dino(warmup_epochs=0), {"accumulate_grad_batches": 2}, 10),
        (lambda: tiny_dino(warmup_epochs=0), {"gradient_clip_val": 1.0, "precision": "bf16-mixed"}, 10),
    ],
    ids=["factored", "metrics", "sinkhorn", "logits", "accumulated", "clipped, bf16"],
)
def test_between_checks_only_the_finite_flag_is_read(make, options, flags, tmp_path):
    during = During(10, 20)  # after the first checks, and before those at the end of the epoch
    fit(tmp_path, during, make and make(), **options)
    assert during.counts == {FLAG: flags}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"centering": "sinkhorn"}, {"shared_head": True}], ids=str)
def test_with_masked_patches_the_host_also_reads_the_masks_in_main_memory(options, tmp_path):
    during = During(10, 20)
    fit(tmp_path, during, tiny_dinov2(**options))
    assert during.counts.keys() == {FLAG, *MASKS}
    assert (during.counts[FLAG], during.counts["ibot.py", "_weights"]) == (10, 20)


@pytest.mark.slow
def test_a_check_makes_one_transfer(tmp_path):
    """Values are divided and printed on the host, after the one transfer."""
    during = During(0, 1)
    fit(tmp_path, during)
    on_the_host = {"_values", "_changes", "_has_rows", "effective_rank"}
    reads = {at: count for at, count in during.counts.items() if at[1] not in on_the_host}
    # `read`: one each for the weights at the start, the freeze and the teacher's update. `gather`: the monitor's.
    assert reads == {FLAG: 1, ("layout.py", "read"): 3, ("collapse_monitor.py", "gather"): 1}


def test_a_read_in_a_step_is_found(tmp_path):
    """The other tests would fail."""

    class Reads(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            if trainer.global_step == 12:
                float(outputs["loss"])
                outputs["loss"].tolist()
            if trainer.global_step == 13:
                torch.equal(outputs["loss"], outputs["loss"])

    during = During(10, 20, rooms=[Path(__file__).resolve()])
    trainer(during, Reads(), TeacherUpdateCallback(), max_epochs=1).fit(tiny_dino(warmup_epochs=0), view_loader(24))
    assert during.counts == {("test_waits.py", "on_train_batch_end"): 3}


@torch.library.custom_op("tests::reads", mutates_args=())
def reads(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def test_a_read_in_a_custom_operator_is_found():
    with HostReads(rooms=[Path(__file__).resolve()]) as found:
        reads(torch.ones(2))
    assert found.counts == {("test_waits.py", "reads"): 1}


HOST = "of tensors on the host"
CHECK = "a check"
ALLOWED = {
    "callbacks/_after_step.py": {"item": "a GradScaler's flag, for fused optimizers alone"},
    "callbacks/_checks/layout.py": {"tolist": CHECK},
    "callbacks/_checks/losses.py": {"tolist": "the finite flag"},
    "callbacks/collapse_monitor.py": {"cpu": CHECK, "item": HOST},
    "callbacks/report/charts.py": {"tolist": HOST, "numpy": HOST},
    "callbacks/report/pictures.py": {"cpu": "pictures, after an epoch"},
    "callbacks/testing.py": {"item": "a check that users run"},
    "dino_head/functional/_outputs.py": {"cpu": "the monitor's, on devices without float64"},
    "dino_head/masking.py": {"tolist": HOST},
    "dino_head/metrics/knn.py": {"item": "an error of the constructor", "tolist": "compute"},
    "dino_head/vision/reading.py": {"tolist": HOST},
    "dino_head/vision/volume_views.py": {"tolist": HOST},
    "dino_head/vision/volumes.py": {"tolist": HOST},
    "examples/continue_digits.py": {"item": "after an epoch"},
    "examples/fit_digits.py": {"item": "after the run"},
    "examples/fit_volumes.py": {"tolist": HOST},
}


def reads_in(folders):
    """Calls that transfer values to the host, by file."""
    found = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            names = set(re.findall(r"\.(item|cpu|tolist|numpy)\(", file.read_text(encoding="utf-8")))
            if names:
                found[file.resolve().relative_to(ROOT).as_posix()] = names
    return found


def test_each_transfer_in_the_source_has_a_reason():
    assert reads_in(ROOMS) == {file: set(reasons) for file, reasons in ALLOWED.items()}


def test_a_transfer_in_the_source_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path.resolve())
    (tmp_path / "new.py").write_text("def step(loss):\n    return loss.item()\n")
    assert reads_in([tmp_path]) == {"new.py": {"item"}}
