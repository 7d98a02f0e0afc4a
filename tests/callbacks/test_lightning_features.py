"""Features of Lightning that replace, restore or cut short a run: the callbacks work, or an error has the remedy."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import rules, trainer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from dino_head.vision import ResumableLoader

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        return view_loader(96 // self.batch_size, self.batch_size)


def run(tmp_path, *extra, first=False, tune=None, module=None):
    """State and receipts after three epochs of 24 steps."""
    torch.manual_seed(0)
    module, data, callbacks = module or tiny_dino(), Data(), rules()
    together = [*extra, *callbacks] if first else [*callbacks, *extra]
    fitted = trainer(*together, default_root_dir=tmp_path)
    if tune:
        tune(Tuner(fitted), module, data)
    fitted.fit(module, data)
    return module.state_dict(), [callback.receipt for callback in callbacks]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


class FindLater(LearningRateFinder):
    """At the start of an epoch, as in Lightning's documentation for fine-tuning."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            self.lr_find(trainer, pl_module)


def find_later(*epochs):
    finder = FindLater(num_training_steps=10, update_attr=False)
    finder.epochs = epochs
    return finder


@pytest.mark.parametrize(
    ("extra", "tune"),
    [
        (list, lambda tuner, *both: tuner.lr_find(both[0], datamodule=both[1], update_attr=False, num_training=10)),
        (lambda: [LearningRateFinder(num_training_steps=10, update_attr=False)], None),
        (lambda: [find_later(1, 2)], None),
        (lambda: [find_later(0)], None),
        (lambda: [BatchSizeFinder(init_val=2, max_trials=2, steps_per_trial=2)], None),
    ],
    ids=["lr_find", "finder", "finder in later epochs", "finder inside the freeze", "batch size"],
)
@pytest.mark.parametrize("first", [False, True])
def test_after_a_tuner_the_run_is_the_same(extra, tune, first, plain, tmp_path, monkeypatch):
    state, receipts = run(tmp_path, *extra(), first=first, tune=tune)
    torch.testing.assert_close(state, plain[0], rtol=0, atol=0)
    assert receipts == plain[1]


@pytest.mark.parametrize("first", [False, True])
def test_stochastic_weight_averaging_without_batch_norm_keeps_the_schedules(first, plain, tmp_path):
    assert run(tmp_path, StochasticWeightAveraging(swa_lrs=1e-3), first=first)[1] == plain[1]


@pytest.mark.parametrize("first", [False, True])
def test_stochastic_weight_averaging_with_batch_norm_needs_the_length(first, tmp_path):
    """It adds an epoch without training, which would stretch every schedule."""
    module = tiny_dino()
    for side in (module.student, module.teacher):
        side["backbone"] = nn.Sequential(side["backbone"], nn.BatchNorm1d(4))
    module.teacher.requires_grad_(False)
    message = r"adds an epoch .* TeacherUpdateCallback\(..., total_steps=72\)"
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, StochasticWeightAveraging(swa_lrs=1e-3), first=first, module=module)


@pytest.mark.parametrize("first", [False, True])
def test_accumulation_that_changes_in_the_last_epoch_raises_in_any_order(first, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"follows a schedule of 72 optimizer steps, but .* of epoch 2"):
        run(tmp_path, GradientAccumulationScheduler({2: 2}), first=first)


class Validated(LightningDataModule):
    def train_dataloader(self):
        return ResumableLoader(view_loader(12).dataset, 4, self.trainer)

    def val_dataloader(self):
        return view_loader(1)


def given(folder, interval=None, ckpt=None, *callbacks, error=None):
    """Final state of a run with an accumulation of 3, and the warnings about it."""
    torch.manual_seed(0)
    module = tiny_dino()
    module.validation_step = lambda batch, batch_idx: None
    save = ModelCheckpoint(folder, filename="{step}-{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "val_check_interval": interval}
    fitted = trainer(*rules(), *callbacks, save, accumulate_grad_batches=3, max_epochs=2, **options)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(error) if error else nullcontext():
        warnings.simplefilter("always")
        fitted.fit(module, Validated(), ckpt_path=ckpt)
    texts = [str(warning.message) for warning in caught]
    return module.state_dict(), [text for text in texts if "inside an accumulation window" in text]


def test_a_checkpoint_inside_an_accumulation_window_is_reported_when_written_and_when_resumed_from(tmp_path):
    state, written = given(tmp_path, 5)
    assert len(written) == 1  # not one for each checkpoint
    assert written[0].startswith("a checkpoint was written inside an accumulation window (epoch 0, batch 4): Lightning")
    assert "set val_check_interval to a multiple of accumulate_grad_batches" in written[0]
    other, resumed = given(tmp_path / "resumed", 5, tmp_path / "step=1-epoch=0.ckpt")
    assert resumed[0].startswith("the run is resumed from a checkpoint that was written inside an accumulation window")
    assert any(not torch.equal(other[name], state[name]) for name in state)  # the warning is right


def test_checkpoints_at_the_end_of_accumulation_windows_are_not_reported_and_resume_bitwise(tmp_path):
    state, written = given(tmp_path, 6)
    assert not written
    for file in tmp_path.glob("*.ckpt"):
        other, resumed = given(tmp_path / file.stem, 6, file)
        assert not resumed
        torch.testing.assert_close(other, state, rtol=0, atol=0)


class Fails(Callback):
    def __init__(self, batch, hook):
        self.batch = batch
        setattr(self, hook, self._fail)

    def _fail(self, trainer, *_):
        if trainer.current_epoch == 1 and trainer.fit_loop.batch_idx == self.batch:
            raise KeyError("stop")


@pytest.mark.parametrize(("batch", "count"), [(6, 0), (7, 1)])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward"])
def test_a_checkpoint_after_an_error_is_reported_if_it_is_inside_an_accumulation_window(hook, batch, count, tmp_path):
    stops = Fails(batch, hook), OnExceptionCheckpoint(tmp_path)
    _, written = given(tmp_path, 12, None, *stops, error=KeyError)
    assert len(written) == count


def test_a_checkpoint_after_an_error_resumes_bitwise(tmp_path):
    """Outside of a window, as the batch that failed is trained on again."""
    state, _ = given(tmp_path / "whole", 12)
    given(tmp_path, 12, None, Fails(6, "on_train_batch_start"), OnExceptionCheckpoint(tmp_path), error=KeyError)
    (file,) = tmp_path.glob("on_exception*.ckpt")
    other, resumed = given(tmp_path / "resumed", 12, file)
    assert not resumed
    torch.testing.assert_close(other, state, rtol=0, atol=0)
