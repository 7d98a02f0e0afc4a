"""CollapseMonitorCallback on a module with two losses."""

import csv
import warnings

import pytest
import torch
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.tiny_dinov2 import GivenMasks, TinyDINOv2, masked_loader, tiny_dinov2
from helpers.toy_training import rules, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dino_head import DINOLoss, IBOTPatchLoss
from dino_head.callbacks import CollapseMonitorCallback, TeacherUpdateCallback
from dino_head.metrics import RankMe

NEVER = {"patience": 1000}  # no diagnosis in a short run


def fit(module, *callbacks, data=None, **options):
    run = trainer(*callbacks, **options)
    run.fit(module, data or view_loader())
    return run


class Oracle(Callback):
    """Entropies, loss and rank of the masked patches of each batch, in float64 from their definitions."""

    def __init__(self):
        self.expected = []

    def on_train_start(self, trainer, pl_module):
        pl_module.patch_loss.register_forward_pre_hook(self.note)

    def note(self, loss, arguments):
        teacher, student, _, epoch = arguments
        p = ((teacher.logits().double() - loss.center[0]) / loss.temperature(epoch)).softmax(dim=-1)
        log_q = (student.logits().double() / 0.1).log_softmax(dim=-1)
        entropy, loss = -(p * p.log()).sum(dim=-1).mean(), -(p * log_q).sum(dim=-1).mean()
        rank = RankMe(4)
        rank.update(teacher.z)
        values = {"loss": loss, "teacher_entropy": entropy, "kl": loss - entropy, "rankme": rank.compute()}
        values["student_entropy"] = -(log_q.exp() * log_q).sum(dim=-1).mean()
        self.expected.append({f"ibot/{name}": value.item() for name, value in values.items()})


def test_every_third_batch_has_the_values_of_the_masked_patches():
    module, monitor, oracle = tiny_dinov2(), CollapseMonitorCallback(3, **NEVER), Oracle()
    fit(module, monitor, oracle, *rules())
    assert [(row["epoch"], row["step"]) for row in monitor.history] == [(0, 1), (0, 4), (1, 7), (2, 10)]
    for row, expected in zip(monitor.history, oracle.expected[::3], strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert row["ibot/teacher_temp"] == row["teacher_temp"]
        assert row["loss"] == pytest.approx(row["teacher_entropy"] + row["kl"])
        assert 0 < row["ibot/prototypes_used"] <= 1 <= row["ibot/prototype_perplexity"]


def test_the_values_of_class_tokens_are_those_without_a_patch_loss():
    class Without(TinyDINOv2):
        def on_train_batch_start(self, *_):
            self.monitor._watched = self.monitor._watched[:1]

    both, alone = CollapseMonitorCallback(1, **NEVER), CollapseMonitorCallback(1, **NEVER)
    fit(tiny_dinov2(), *rules(), both)
    module = tiny_dinov2(Without)
    module.monitor = alone
    fit(module, *rules(), alone)
    for one, other in zip(both.history, alone.history, strict=True):
        assert {name: value for name, value in one.items() if not name.startswith("ibot/")} == other


def test_values_of_both_losses_reach_loggers_and_the_receipt(tmp_path):
    monitor, logger = CollapseMonitorCallback(2, **NEVER), CSVLogger(tmp_path, name="csv")
    run = fit(tiny_dinov2(), *rules(), monitor, logger=logger, log_every_n_steps=4)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["ibot/kl"]]
    assert [float(row["ibot/kl"]) for row in rows] == pytest.approx([row["ibot/kl"] for row in monitor.history])
    dino, ibot = ({n.split("/")[1] for n in run.callback_metrics if n.startswith(p)} for p in ("dino/", "ibot/"))
    assert dino == ibot >= {"loss", "kl", "teacher_entropy", "rankme", "prototypes_used"}
    last = monitor.history[-1]
    assert monitor.receipt == (
        f"looked at 6 of 12 batches, last with loss {last['loss']:.3f} = {last['loss_normalized']:.3f} ln K, of which "
        f"{last['kl']:.3f} KL, and RankMe {last['rankme']:.1f}, patch loss {last['ibot/loss']:.3f} = "
        f"{last['ibot/loss_normalized']:.3f} ln K, of which {last['ibot/kl']:.3f} KL, and RankMe "
        f"{last['ibot/rankme']:.1f}; diagnosis: too early"
    )


def test_training_is_bitwise_the_same_without_the_callback():
    modules = [tiny_dinov2(), tiny_dinov2()]
    fit(modules[0], *rules())
    fit(modules[1], *rules(), CollapseMonitorCallback(2, **NEVER))
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_after_a_batch_without_masked_patches_the_next_one_is_measured(centering):
    """No mask in the batches 0 and 1 of each epoch."""
    monitor = CollapseMonitorCallback(4, **NEVER)
    fit(tiny_dinov2(GivenMasks, centering=centering), monitor, *rules(), data=masked_loader(none_in=range(8)))
    assert [row["step"] for row in monitor.history if "loss" in row] == [1, 5, 9]
    assert [row["step"] for row in monitor.history if "ibot/loss" in row] == [3, 7, 11]
    assert all(value == value for row in monitor.history for value in row.values())  # no NaN


def test_with_sinkhorn_targets_the_value_is_the_loss():
    class Even(GivenMasks):
        """The same number of masked patches in each view, so that all have the same weight."""

        def masks(self, masks, batch, batch_idx):
            return torch.arange(16).expand(2 * len(batch[0]), 16) < 5

    module, monitor, losses = tiny_dinov2(Even, centering="sinkhorn"), CollapseMonitorCallback(1, **NEVER), []
    module.patch_loss.register_forward_hook(lambda *arguments: losses.append(arguments[-1].item()))
    fit(module, monitor, *rules(), data=masked_loader())
    assert [row["ibot/loss"] for row in monitor.history] == pytest.approx(losses, rel=1e-5)


# The terms.


def test_the_means_of_the_logged_terms_are_kept_for_each_epoch(tmp_path):
    monitor, logger = CollapseMonitorCallback(**NEVER), CSVLogger(tmp_path, name="csv")
    save = ModelCheckpoint(tmp_path, filename="last")
    run = fit(tiny_dinov2(), monitor, save, *rules(), logger=logger, log_every_n_steps=4, enable_checkpointing=True)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["koleo"]]
    assert [(row["epoch"], row["step"]) for row in monitor.terms] == [(0, 4), (1, 8), (2, 12)]
    for row, expected in zip(monitor.terms, logged, strict=True):
        names = ("loss", "dino", "ibot", "koleo")
        assert {name: row[name] for name in names} == pytest.approx({name: float(expected[name]) for name in names})
    state = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]
    state = state["CollapseMonitorCallback"]
    assert state["terms"] == monitor.terms
    other = CollapseMonitorCallback()
    other.load_state_dict(state)
    assert (other.terms, other.history) == (monitor.terms, monitor.history)


def test_a_checkpoint_without_terms_loads():
    monitor, other = CollapseMonitorCallback(**NEVER), CollapseMonitorCallback()
    fit(tiny_dino(), monitor, *rules())
    state = monitor.state_dict()
    del state["terms"]  # as of an earlier version
    other.load_state_dict(state)
    assert (other.history, other.terms) == (monitor.history, [])


def test_a_module_with_one_term_has_none():
    monitor = CollapseMonitorCallback(**NEVER)
    fit(tiny_dino(), monitor, *rules())
    assert monitor.terms == []


# Which losses.


def test_of_several_losses_of_a_kind_the_named_one_is_measured():
    module = tiny_dinov2()
    module.other = IBOTPatchLoss(16)
    message = r"one DINOLoss and one IBOTPatchLoss, got loss=None, and TinyDINOv2 has loss, patch_loss, other: name one"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, CollapseMonitorCallback(), *rules())
    with pytest.raises(MisconfigurationException, match="got loss='ibot', and"):
        fit(module, CollapseMonitorCallback(loss="ibot"), *rules())
    monitor = CollapseMonitorCallback(loss="patch_loss", **NEVER)
    fit(module, monitor, *rules())
    assert monitor.history[0].keys() >= {"loss", "ibot/loss"}


def test_a_loss_without_masked_patches_in_an_epoch_is_reported_and_the_other_is_measured():
    class Unmasked(TinyDINOv2):
        def masks(self, masks, batch, batch_idx):
            return torch.zeros_like(masks)

    monitor = CollapseMonitorCallback(2, **NEVER)
    with pytest.warns(UserWarning, match=r"epoch 0: the IBOTPatchLoss .* not called as .*, masks\) with a masked"):
        fit(tiny_dinov2(Unmasked), monitor, TeacherUpdateCallback(), max_epochs=1)
    assert [row["step"] for row in monitor.history] == [1, 3]
    assert "ibot/loss" not in monitor.history[0]


def test_a_module_with_a_patch_loss_alone_is_measured():
    class PatchesAlone(TinyDINOv2):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            del self.loss
            self.loss = lambda *sides: 0.0

        def training_step(self, batch, batch_idx):
            return self.terms(batch, batch_idx)["ibot"]

    monitor = CollapseMonitorCallback(2, **NEVER)
    fit(tiny_dinov2(PatchesAlone), monitor, TeacherUpdateCallback())
    assert len(monitor.history) == 6
    assert "loss" not in monitor.history[0]
    assert monitor.receipt.startswith("looked at 6 of 12 batches, last with patch loss ")


# Diagnoses, each forced in a run.


def watched(module, **options):
    """The monitor of ten epochs of eight batches, and the warnings."""
    monitor = CollapseMonitorCallback(2, patience=5, **options)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fit(module, monitor, TeacherUpdateCallback(base_momentum=0.9), data=view_loader(8, 16), max_epochs=10)
    return monitor, [str(warning.message) for warning in given]


class Wide(TinyDINOv2):
    """Outputs that differ enough from the first step on that nothing but the tested cause is diagnosed."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for side in (self.student, self.teacher):
            for name in ("head", "patch_head"):
                for parameter in side[name].layers.parameters():
                    parameter.data.mul_(20)


def patch_case(**loss):
    module = tiny_dinov2(Wide, teacher_temp=0.04, warmup_teacher_temp_epochs=0)
    module.patch_loss = IBOTPatchLoss(16, **{"teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, **loss})
    return module


class SamePatches(Wide):
    """All patches get the same features."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for side in (self.student, self.teacher):
            side["patch_head"].register_forward_pre_hook(lambda _, given: (0 * given[0] + 1,))


def same_patches():
    return tiny_dinov2(SamePatches, teacher_temp=0.04, warmup_teacher_temp_epochs=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "cases"),
    [
        (lambda: patch_case(teacher_temp=50.0, student_temp=50.0), ["uniform teacher"]),
        (same_patches, ["one-hot collapse: all patches get", "dimensional collapse"]),
    ],
    ids=["uniform", "same patches"],
)
def test_a_collapse_of_the_patches_is_reported_separately(make, cases):
    monitor, given = watched(make())
    for text, case in zip(monitor.diagnoses, cases, strict=True):
        assert text.startswith(f"patches: {case}")
        assert given.count(text) == 1
    assert monitor.receipt.endswith(", ".join(f"patches: {case.split(':')[0]}" for case in cases))


@pytest.mark.slow
def test_a_collapse_of_the_class_tokens_does_not_name_patches():
    module = patch_case()
    module.loss = DINOLoss(16, 50.0, 50.0, 0, student_temp=50.0)
    monitor, _ = watched(module)
    (text,) = monitor.diagnoses
    assert text.startswith("uniform teacher: ")


def test_a_collapse_of_the_patches_can_stop_the_run():
    monitor, _ = watched(same_patches(), stop=True)
    assert monitor._batches < 80


@pytest.mark.slow
def test_a_healthy_run_gets_no_diagnosis():
    module = patch_case()
    module.koleo_weight = 1.0  # of four dimensions, too few would be used otherwise
    monitor, given = watched(module)
    assert monitor.diagnoses == []
    assert not [text for text in given if "collapse" in text]


def test_fewer_rows_than_prototypes_under_sinkhorn_are_reported_once_and_stop_nothing():
    """8 rows of class tokens, but more patches, for 16 prototypes."""
    module = tiny_dinov2(Wide, centering="sinkhorn", teacher_temp=0.04, warmup_teacher_temp_epochs=0)
    module.loss = DINOLoss(16, centering="sinkhorn")
    monitor = CollapseMonitorCallback(2, patience=3, stop=True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fit(module, monitor, TeacherUpdateCallback(), data=view_loader(8, 4), max_epochs=3)
    (text,) = monitor.diagnoses
    assert text.startswith("few samples for Sinkhorn: a batch has 8 rows (images, all processes) for 16 prototypes")
    assert text not in [str(warning.message) for warning in given]
    assert monitor._batches == 24
