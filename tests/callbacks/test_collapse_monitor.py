import csv
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.tiny_dino import TinyDINO, tiny_dino, view_loader
from helpers.toy_training import rules, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import CollapseMonitorCallback, TeacherUpdateCallback
from dino_head.metrics import DINOStatistics, RankMe

# Most of these runs only need a module to watch.
pytestmark = pytest.mark.filterwarnings("ignore:teacher does not follow")

NEVER = {"patience": 1000}  # no diagnosis in a short run


def fit(module, *callbacks, data=None, **options):
    run = trainer(*callbacks, **options)
    run.fit(module, data or view_loader())
    return run


def seeded(**options):
    torch.manual_seed(0)
    return tiny_dino(**options)


class Oracle(Callback):
    """Values of the metrics for batches 0, 3, 6, ..., from the arguments of all calls of the loss."""

    def __init__(self):
        self.calls, self.expected, self.usage = [], [], DINOStatistics(16)

    def on_train_start(self, trainer, pl_module):
        def note(loss, arguments):
            self.calls.append((*arguments, loss.center.clone()))

        pl_module.loss.register_forward_pre_hook(note)

    def on_train_end(self, trainer, pl_module):
        for teacher, student, epoch, center in self.calls[::3]:
            options = {"center": center, "teacher_temp": pl_module.loss.temperature(epoch), "student_temp": 0.1}
            statistics, rank = DINOStatistics(16), RankMe(4)
            statistics.update(teacher, student, **options)
            self.usage.update(teacher, student, **options)
            rank.update(teacher.z)
            values = {**statistics.compute(), "rankme": rank.compute()}
            values |= {name: value for name, value in self.usage.compute().items() if name.startswith("prototype")}
            self.expected.append({name: value.item() for name, value in values.items()})


@pytest.mark.parametrize("callbacks", [rules, list], ids=["with the rules", "alone"])
def test_every_third_batch_has_the_values_of_the_metrics(callbacks):
    """Alone, the loss updates its center at the end of each call; the center before it counts."""
    module, monitor, oracle = seeded(), CollapseMonitorCallback(3, **NEVER), Oracle()
    module.loss = DINOLoss(16, center_momentum=0.1, warmup_teacher_temp_epochs=3)
    fit(module, monitor, oracle, *callbacks())
    assert [(row["epoch"], row["step"]) for row in monitor.history] == [(0, 1), (0, 4), (1, 7), (2, 10)]
    for row, expected in zip(monitor.history, oracle.expected, strict=True):
        names = set(expected) - {"rows", "output_dim"}
        assert {name: row[name] for name in names} == pytest.approx({name: expected[name] for name in names})
    assert [row["teacher_temp"] for row in monitor.history] == pytest.approx([0.04, 0.04, 0.055, 0.07])
    assert {row["student_temp"] for row in monitor.history} == {0.1}


class ByLogits(TinyDINO):
    """Calls the loss with logits, by names, and without an epoch."""

    def training_step(self, batch, batch_idx):
        views = self.views(batch, batch_idx)
        student = self.outputs(self.student, views).logits()
        teacher = self.outputs(self.teacher, views[:2]).logits()
        return self.loss(student_out=list(student), teacher_out=teacher, teacher_temp=0.05)


def test_logits_and_keywords_are_understood():
    factored, logits = CollapseMonitorCallback(1, **NEVER), CollapseMonitorCallback(1, **NEVER)
    module = seeded()
    module.loss = DINOLoss(16, 0.05, 0.05)
    fit(module, factored, max_steps=3)
    module = seeded()
    module.__class__ = ByLogits
    fit(module, logits, max_steps=3)
    for one, other in zip(factored.history, logits.history, strict=True):
        assert one.pop("rankme") >= 1 <= other.pop("rankme")  # of z and of logits
        assert one == pytest.approx(other, rel=1e-4)


def test_with_sinkhorn_targets_the_value_is_the_loss():
    module, monitor = seeded(), CollapseMonitorCallback(1, **NEVER)
    module.loss = DINOLoss(16, centering="sinkhorn")
    losses = []
    module.loss.register_forward_hook(lambda *arguments: losses.append(arguments[-1].item()))
    fit(module, monitor, *rules())
    assert [row["loss"] for row in monitor.history] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")  # Dynamo's
def test_a_compiled_loss_and_low_precision_are_measured_too():
    plain, compiled, low = (CollapseMonitorCallback(2, **NEVER) for _ in range(3))
    fit(seeded(), *rules(), plain)
    module = seeded()
    module.loss = torch.compile(module.loss, backend="eager")
    fit(module, *rules(), compiled)
    fit(seeded(), *rules(), low, precision="bf16-mixed")
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert len(low.history) == len(plain.history)
    assert low.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.1)  # later the runs are others


def run_with_dropout(*callbacks):
    """Weights after a run in which shuffling, views and dropout are random."""
    module = seeded()
    for side, rate in zip((module.student, module.teacher), (0.2, 0.0), strict=True):
        side["backbone"] = nn.Sequential(side["backbone"], nn.Dropout(rate))
    module.augment = lambda images: [images + 0.1 * torch.randn_like(images) for _ in range(3)]
    data = torch.utils.data.DataLoader(view_loader().dataset, batch_size=4, shuffle=True)
    torch.manual_seed(1)
    fit(module, *rules(), *callbacks, data=data)
    return module.state_dict(), torch.rand(1)


def test_training_is_bitwise_the_same_without_the_callback():
    torch.testing.assert_close(
        run_with_dropout(), run_with_dropout(CollapseMonitorCallback(2, **NEVER)), rtol=0, atol=0
    )


def test_values_reach_loggers_checkpoints_and_the_progress_bar(tmp_path):
    module, monitor = seeded(), CollapseMonitorCallback(2, **NEVER)
    best = ModelCheckpoint(tmp_path, monitor="dino/rankme", mode="max", filename="best")
    logger = CSVLogger(tmp_path, name="csv")
    run = fit(module, *rules(), monitor, best, logger=logger, log_every_n_steps=4, enable_checkpointing=True)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["dino/kl"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    assert [float(row["dino/rankme"]) for row in rows] == pytest.approx([row["rankme"] for row in monitor.history])
    last_of_epochs = [row["rankme"] for row in monitor.history[1::2]]
    assert best.best_model_score.item() == pytest.approx(max(last_of_epochs))
    assert run.progress_bar_metrics.keys() >= {"loss", "dino/loss_normalized"}
    assert [name for name in run.progress_bar_metrics if name.startswith("dino/")] == ["dino/loss_normalized"]
    saved = torch.load(best.best_model_path, weights_only=True)["callbacks"]["CollapseMonitorCallback"]
    assert saved["history"] == monitor.history[: len(saved["history"])]
    assert saved["receipt"].startswith("looked at ")


def test_early_stopping_can_monitor_the_rank():
    stop = EarlyStopping("dino/rankme", mode="max", patience=1, min_delta=100)
    run = fit(seeded(), CollapseMonitorCallback(2, **NEVER), stop, max_epochs=9)
    assert run.current_epoch == 2


def test_the_loss_has_no_hook_between_measurements():
    class Hooks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(len(pl_module.loss._forward_pre_hooks))

    seen = []
    fit(seeded(), CollapseMonitorCallback(2, **NEVER), Hooks())
    assert seen == [0] * 12


def test_after_an_error_the_loss_has_no_hook():
    class Fail(Callback):
        def on_after_backward(self, trainer, pl_module):
            raise RuntimeError("enough")

    module = seeded()
    with pytest.raises(RuntimeError, match="enough"):
        fit(module, CollapseMonitorCallback(**NEVER), Fail())
    assert not module.loss._forward_pre_hooks


def test_measurements_count_batches_under_accumulation():
    monitor = CollapseMonitorCallback(3, **NEVER)
    fit(seeded(), *rules(), monitor, accumulate_grad_batches=2)
    assert [row["step"] for row in monitor.history] == [0, 2, 3, 5]


class Skipping(TinyDINO):
    """Skips every batch with an even number."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_after_a_skipped_batch_the_next_one_is_measured():
    module, monitor = seeded(), CollapseMonitorCallback(4, **NEVER)
    module.__class__ = Skipping
    fit(module, monitor)
    assert [(row["epoch"], row["step"]) for row in monitor.history] == [(0, 2), (1, 6), (2, 10)]


def test_a_resumed_run_continues_its_history(tmp_path):
    whole = CollapseMonitorCallback(3, **NEVER)
    fit(seeded(), *rules(), whole)
    first, second = CollapseMonitorCallback(3, **NEVER), CollapseMonitorCallback(3, **NEVER)
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(seeded(), *rules(), first, save, enable_checkpointing=True)
    run = trainer(*rules(), second)
    run.fit(seeded(), view_loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [row["step"] for row in second.history] == [1, 4, 7, 10]
    for one, other in zip(whole.history, second.history, strict=True):
        usage = {"prototypes_used", "prototype_perplexity"}  # of the measurements since the resume
        assert {name: one[name] for name in one if name not in usage} == pytest.approx(
            {name: other[name] for name in other if name not in usage}
        )


def test_a_second_fit_begins_anew():
    monitor = CollapseMonitorCallback(4, **NEVER)
    fit(seeded(), monitor)
    fit(seeded(), monitor)
    assert len(monitor.history) == 3


def test_the_history_of_a_long_run_is_thinned(monkeypatch):
    monkeypatch.setattr("dino_head.callbacks.collapse_monitor.MAX_HISTORY", 4)
    monitor = CollapseMonitorCallback(1, **NEVER)
    fit(seeded(), monitor)
    assert [row["step"] for row in monitor.history] == [1, 5, 9, 12]


def test_scheduled_values_are_in_the_history():
    monitor = CollapseMonitorCallback(1, **NEVER)
    fit(seeded(), *rules(), monitor)
    momentum = [row["teacher_momentum"] for row in monitor.history[1:]]
    assert momentum[0] == 0.7
    assert momentum == sorted(momentum)
    decay = [row["weight_decay"] for row in monitor.history]
    assert decay == sorted(decay)
    assert decay[0] == pytest.approx(0.04)
    assert monitor.history[5]["learning_rate"] > 0


def test_a_loss_that_is_missing_or_never_called_is_reported():
    module = seeded()
    module.other = DINOLoss(16)
    with pytest.raises(MisconfigurationException, match=r"got loss=None, and TinyDINO has loss, other: name one"):
        fit(module, CollapseMonitorCallback())
    fit(module, CollapseMonitorCallback(loss="loss", **NEVER), max_steps=1)
    with pytest.warns(UserWarning, match="the DINOLoss of the module was not called"):
        fit(module, CollapseMonitorCallback(loss="other"), max_epochs=1)
    module = seeded()
    module.loss = nn.Identity()
    with pytest.raises(MisconfigurationException, match="has none: name one of them"):
        fit(module, CollapseMonitorCallback())


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"patience": 0}, {"every_n_steps": 2.5}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        CollapseMonitorCallback(**options)


# Diagnoses, each forced in a run.


class Constant(nn.Sequential):
    """Features that hardly differ."""

    def forward(self, images):
        return 1 + 1e-3 * super().forward(images)


def layers():
    return nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 16)


def dino(output_dim=32, backbone=nn.Sequential, batch_norm=True, noise=0.3, learning_rate=0.01, **loss):
    torch.manual_seed(0)
    return TinyDINO(
        backbone(*layers()),
        DINOProjectionHead(16, 32, 8, output_dim, batch_norm=batch_norm),
        DINOLoss(output_dim, **{"warmup_teacher_temp_epochs": 0, "teacher_temp": 0.04, **loss}),
        lambda images: [images + noise * torch.randn_like(images) for _ in range(2)],
        learning_rate=learning_rate,
        warmup_epochs=0,
    )


def watched(module, *callbacks, distinct=128, stop=False):
    """The monitor of ten epochs of eight batches of some distinct images, the warnings, and the Trainer."""
    monitor = CollapseMonitorCallback(2, patience=5, stop=stop)
    images = view_loader(1, distinct).dataset.tensors[0].repeat(128 // distinct, 1, 1, 1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=16)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run = fit(module, monitor, *callbacks, data=data, max_epochs=10)
    return monitor, [str(warning.message) for warning in given], run


def follow():
    return TeacherUpdateCallback(base_momentum=0.9)


CASES = {
    "uniform teacher": lambda: watched(dino(teacher_temp=1.0, batch_norm=False), follow()),
    "one-hot collapse": lambda: watched(dino(center_momentum=1.0, batch_norm=False), follow()),
    "dimensional collapse": lambda: watched(dino(backbone=Constant, batch_norm=False), follow()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_collapse_is_named_in_a_warning_once(case):
    monitor, given, run = CASES[case]()
    (text,) = [text for text in monitor.diagnoses if text.startswith(f"{case}: ")]
    assert given.count(text) == 1
    assert " (seen in epoch " in text
    assert case in monitor.receipt.split("diagnosis: ")[1]
    assert run.current_epoch == 10


def test_a_teacher_that_is_never_updated_is_a_diagnosis_and_causes_one_warning():
    monitor, given, _ = watched(dino(), stop=True)
    (text,) = monitor.diagnoses
    assert text.startswith("teacher does not follow: ")
    assert len([warning for warning in given if warning.startswith("teacher does not follow: ")]) == 1
    assert text not in given


def test_a_fixed_teacher_gets_no_diagnosis():
    monitor, *_ = watched(dino(), TeacherUpdateCallback(base_momentum=1.0))
    assert not any(text.startswith("teacher does not follow") for text in monitor.diagnoses)


@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_momentum_is_read_before_the_batch_in_any_order(monitor_first):
    monitor, update = CollapseMonitorCallback(1, **NEVER), TeacherUpdateCallback(base_momentum=0.7)
    fit(seeded(), *([monitor, update] if monitor_first else [update, monitor]))
    assert "teacher_momentum" not in monitor.history[0]
    assert monitor.history[1]["teacher_momentum"] == 0.7


@pytest.mark.slow
def test_a_loss_that_is_flat_because_k_is_large_is_no_warning():
    monitor, given, run = watched(dino(65536, teacher_temp=0.07, learning_rate=1e-5), follow(), stop=True)
    (text,) = monitor.diagnoses
    assert text.startswith("no collapse: the loss of ")
    assert "because K = 65536 is large" in text
    assert not [warning for warning in given if "no collapse" in warning]
    assert run.current_epoch == 10


def test_dead_prototypes_are_no_warning_and_stop_nothing():
    """Four images need no more than some prototypes."""
    monitor, given, run = watched(dino(2048, noise=0.0, learning_rate=1e-4), follow(), distinct=4, stop=True)
    (text,) = monitor.diagnoses
    assert text.startswith("dead prototypes: ")
    assert text not in given
    assert run.current_epoch == 10


def test_batches_of_one_image_are_no_dimensional_collapse():
    """Two views of an image have a low rank; the rank of all embeddings of the last measurements counts."""
    monitor = CollapseMonitorCallback(2, patience=8)
    fit(dino(batch_norm=False, learning_rate=1e-4), monitor, follow(), data=view_loader(40, 1), max_epochs=1)
    assert max(row["rankme"] for row in monitor.history) < 2
    assert not [text for text in monitor.diagnoses if text.startswith("dimensional")]


@pytest.mark.parametrize("monitor_first", [True, False])
def test_a_teacher_that_follows_is_seen_in_any_order(monitor_first):
    """Also if a measurement ends on the only step of its window."""
    monitor, update = CollapseMonitorCallback(1, patience=4), follow()
    callbacks = [monitor, update] if monitor_first else [update, monitor]
    fit(dino(), *callbacks, data=view_loader(12, 16), max_epochs=1, accumulate_grad_batches=4)
    assert not [text for text in monitor.diagnoses if text.startswith("teacher")]


def test_a_run_that_is_stopped_in_its_first_window_ends_with_the_diagnosis():
    monitor = CollapseMonitorCallback(1, patience=2, stop=True)
    module = dino(center_momentum=1.0, batch_norm=False, backbone=Constant)
    with pytest.warns(UserWarning, match="collapse: "):
        fit(module, monitor, follow(), data=view_loader(8, 16), accumulate_grad_batches=8)
    assert len(monitor.diagnoses) == 1


class OneHot(TinyDINO):
    """All samples on the same prototype: a loss of exactly 0."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        logits = torch.zeros(2, 4, 16)
        logits[..., 0] = 1000
        return 0 * loss + self.extra(logits, logits)


def test_a_loss_of_exactly_0_is_a_one_hot_collapse():
    module, monitor = seeded(), CollapseMonitorCallback(1, patience=4, loss="extra")
    module.__class__, module.extra = OneHot, DINOLoss(16, center_momentum=1.0)
    with pytest.warns(UserWarning, match="one-hot collapse: all images"):
        fit(module, monitor, follow())
    assert monitor.history[-1]["loss"] == 0


class OwnLoss(DINOLoss):
    def forward(self, *sides):
        return super().forward(*sides)


class TwoKinds(TinyDINO):
    def training_step(self, batch, batch_idx):
        views = self.views(batch, batch_idx)
        student, teacher = self.outputs(self.student, views), self.outputs(self.teacher, views[:2])
        return self.loss(teacher, student) + self.loss(teacher.logits(), student.logits())


def test_losses_with_other_arguments_do_not_end_the_run():
    module, monitor = seeded(), CollapseMonitorCallback(1, **NEVER)
    module.loss = OwnLoss(16)
    with pytest.warns(UserWarning, match="measured nothing in epoch 0: the DINOLoss of the module was not called as"):
        assert fit(module, monitor, max_epochs=1).global_step == 4
    module, monitor = seeded(), CollapseMonitorCallback(1, **NEVER)
    module.__class__ = TwoKinds
    fit(module, monitor, max_epochs=1)
    assert len(monitor.history) == 4


def test_temperatures_from_numpy_can_be_loaded_again(tmp_path):
    class Scheduled(TinyDINO):
        def training_step(self, batch, batch_idx):
            views = self.views(batch, batch_idx)
            sides = self.outputs(self.teacher, views[:2]), self.outputs(self.student, views)
            return self.loss(*sides, teacher_temp=np.linspace(0.04, 0.07, 12)[self.global_step])

    module, save = seeded(), ModelCheckpoint(tmp_path, filename="last")
    module.__class__ = Scheduled
    fit(module, CollapseMonitorCallback(2, **NEVER), save, enable_checkpointing=True)
    history = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["CollapseMonitorCallback"]["history"]
    assert [row["teacher_temp"] for row in history] == pytest.approx(np.linspace(0.04, 0.07, 12)[::2].tolist())


def test_a_run_resumed_with_fewer_measurements_keeps_its_history(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(seeded(), CollapseMonitorCallback(1, **NEVER), save, enable_checkpointing=True)
    monitor = CollapseMonitorCallback(4, **NEVER)
    trainer(monitor).fit(seeded(), view_loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [row["step"] for row in monitor.history] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_without_float64_on_the_device_it_is_measured_in_main_memory(monkeypatch):
    one, other = CollapseMonitorCallback(2, **NEVER), CollapseMonitorCallback(2, **NEVER)
    fit(seeded(), one)
    monkeypatch.setattr("dino_head.callbacks.collapse_monitor.WITHOUT_FLOAT64", ("cpu",))
    fit(seeded(), other)
    assert one.history == other.history


def test_a_healthy_run_gets_no_diagnosis():
    monitor, given, _ = watched(dino(), follow())
    assert monitor.diagnoses == []
    assert monitor.receipt.endswith("diagnosis: none")
    assert monitor.receipt.startswith("looked at 40 of 80 batches, last with loss ")
    assert not [warning for warning in given if "collapse" in warning or "teacher" in warning]


def test_a_collapse_can_stop_the_run():
    monitor, _, run = watched(dino(center_momentum=1.0, batch_norm=False), follow(), stop=True)
    assert len(monitor.diagnoses) == 1
    assert run.global_step < 40


def test_a_loss_that_is_not_finite_is_reported_at_once():
    module = dino()
    module.augment = lambda images: [torch.full_like(images, math.nan)] * 2
    monitor, given, _ = watched(module)
    assert monitor.diagnoses[0].startswith("not finite: ")
    assert monitor.diagnoses[0].endswith("(seen in epoch 0, step 1)")  # at once
    assert given.count(monitor.diagnoses[0]) == 1
