"""The checks for users pass with the toy and the example module, and find errors in others."""

import copy

import numpy as np
import pytest
import torch
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import Manual, Stateful, Toy, loader, rules
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import nn

from dino_head.callbacks import FreezeLastLayerCallback, TeacherUpdateCallback
from dino_head.callbacks.testing import (
    assert_accumulation_invariant,
    assert_resume_invariant,
    assert_teacher_follows,
)
from dino_head.vision.loaders import ResumableLoader


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.04)


def toy():
    return Toy(), loader(), rules()


def example():
    """With SGD: AdamW turns gradients that are 0 except for rounding into steps."""
    return tiny_dino(sgd, warmup_epochs=0), view_loader(), rules()


class Shuffled(LightningDataModule):
    """The views in the order of the example's loader."""

    def __init__(self, make_loader=ResumableLoader, **options):
        super().__init__()
        self.make_loader, self.options = make_loader, options

    def train_dataloader(self):
        return self.make_loader(view_loader().dataset, 4, trainer=self.trainer, **self.options)


def random_example(**data):
    """Shuffled, with random views and dropout."""
    module = tiny_dino(warmup_epochs=1)
    module.augment = lambda images: [images + 0.1 * torch.randn_like(images) for _ in range(3)]
    for side, rate in zip((module.student, module.teacher), (0.2, 0.0), strict=True):
        side["backbone"] = nn.Sequential(side["backbone"], nn.Dropout(rate))
    return module, Shuffled(**data), rules()


class InEachForward(Toy):
    """A teacher that is updated in training_step."""

    def training_step(self, batch, batch_idx):
        self.move()
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def move(self):
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.lerp_(student, 0.1)


@pytest.mark.parametrize("make", [toy, example])
def test_accumulation(make):
    assert_accumulation_invariant(make, parts=4, steps=3)


def test_a_teacher_updated_in_each_micro_batch_is_found():
    with pytest.raises(AssertionError, match=r"(?s)4 accumulated micro-batches differ at the end.*teacher") as error:
        assert_accumulation_invariant(lambda: (InEachForward(), loader(), [FreezeLastLayerCallback(1)]))
    assert "use TeacherUpdateCallback" in str(error.value)


def test_a_center_without_the_callback_is_found():
    with pytest.raises(AssertionError, match=r"loss.center"):
        assert_accumulation_invariant(lambda: (tiny_dino(sgd, warmup_epochs=0), view_loader(), []))


def test_batch_norm_is_named():
    with pytest.raises(
        AssertionError, match=r"batch norm \(student.head.layers.1, .* Otherwise something is updated once"
    ):
        assert_accumulation_invariant(lambda: (Toy(batch_norm=True), loader(), rules()), parts=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "the training data contain no batch"), ([np.zeros(4)], "type ndarray contains no tensor of samples")],
)
def test_data_without_samples_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        assert_accumulation_invariant(lambda: (Toy(), data, rules()))


def test_checks_accept_the_users_own_checkpoints_and_progress_bars(tmp_path):
    def make():
        return (
            Toy(),
            loader(),
            [*rules(), ModelCheckpoint(tmp_path, enable_version_counter=False), TQDMProgressBar()],
        )

    assert_teacher_follows(make)
    assert_resume_invariant(make, mid_epoch=False)


@pytest.mark.parametrize("optimizer", ["lightning", "torch"])
def test_the_teacher_follows_under_manual_optimization(optimizer):
    rule = TeacherUpdateCallback(base_momentum=0.5, total_steps=4)
    assert_teacher_follows(lambda: (Manual("lightning", optimizer), loader(), [rule]))


def test_batches_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 samples cannot be split in 3 equal parts"):
        assert_accumulation_invariant(toy, parts=3)


@pytest.mark.parametrize(("options", "epochs"), [({}, 2), ({"max_epochs": 3}, 3)])
def test_resume_of_an_ordinary_loader_at_an_epochs_end(options, epochs):
    ends = []

    class End(Callback):
        def on_train_end(self, trainer, pl_module):
            ends.append(trainer.current_epoch)

    assert_resume_invariant(lambda: (Toy(), loader(), [*rules(), End()]), mid_epoch=False, **options)
    assert ends == [epochs, epochs]


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_of_the_example_with_shuffling_random_views_and_dropout(workers):
    assert_resume_invariant(lambda: random_example(num_workers=workers))


def test_resume_of_the_example_with_a_loader_that_saves_where_it_is():
    """Lightning restores such a loader only if nothing used the data before, as in the example."""
    assert_resume_invariant(lambda: (tiny_dino(), Stateful(view_loader().dataset, 4), rules()))


def test_resume_under_accumulation():
    assert_resume_invariant(random_example, accumulate_grad_batches=2)


def test_validation_inside_an_epoch_does_not_hide_its_end():
    class Validated(LightningDataModule):
        train_dataloader = val_dataloader = staticmethod(loader)

    def make():
        module = Toy()
        module.validation_step = lambda batch, batch_idx: None
        return module, Validated(), rules()

    assert_resume_invariant(make, mid_epoch=False, val_check_interval=2)


def test_an_ordinary_loader_is_found_in_the_middle_of_an_epoch():
    with pytest.raises(AssertionError, match=r"(?s)in the middle of an epoch differ at the end.*saves no random state"):
        assert_resume_invariant(toy)


def test_an_ordinary_shuffle_is_found():
    def ordinary(dataset, batch_size, trainer):
        return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)

    with pytest.raises(AssertionError, match="resumed at an epoch's end differ at the end"):
        assert_resume_invariant(lambda: random_example(make_loader=ordinary), mid_epoch=False)


def test_random_views_without_a_derived_seed_are_found(monkeypatch):
    monkeypatch.setattr("dino_head.examples.dino_module.derived_seed", lambda *key: torch.initial_seed())
    with pytest.raises(AssertionError, match="differ at the end"):
        assert_resume_invariant(random_example, mid_epoch=False)


def test_epochs_of_one_batch_are_refused():
    with pytest.raises(ValueError, match="2 optimizer steps in 2 epochs leave no middle of an epoch to resume from"):
        assert_resume_invariant(lambda: (Toy(), loader(batches=1), rules()))


@pytest.mark.parametrize("make", [toy, example, random_example])
def test_the_teacher_follows(make):
    assert_teacher_follows(make)


class OnlyHalf(Callback):
    """Updates a part of the teacher."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.teacher["backbone"].weight.lerp_(pl_module.student["backbone"].weight, 0.1)


def unequal():
    module = Toy()
    module.teacher["backbone"].weight.data += 1
    return module, loader(), []


def trainable():
    module = Toy()
    module.teacher = copy.deepcopy(module.student)
    return module, loader(), []


class AfterTheCheckpoint(InEachForward):
    """A teacher that is updated in the module's own hook, after the callbacks."""

    def training_step(self, batch, batch_idx):
        return Toy.training_step(self, batch, batch_idx)

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 1:
            self.move()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Toy(), loader(), []), "the teacher never changed: add TeacherUpdateCallback"),
        (lambda: (InEachForward(), loader(), []), r"changed before the end of batch 2, which took no optimizer step"),
        (lambda: (AfterTheCheckpoint(), loader(), []), "not in the module's own on_train_batch_end"),
        (lambda: (Toy(), loader(), [OnlyHalf()]), "weights of the teacher differ from an average by one momentum"),
        (unequal, "'teacher' does not start equal to 'student'"),
        (trainable, "'teacher' requires gradients"),
    ],
)
def test_a_teacher_that_does_not_follow_is_found(make, message):
    with pytest.raises(AssertionError, match=message):
        assert_teacher_follows(make)


def test_a_teacher_updated_before_the_step_is_found():
    with pytest.raises(AssertionError, match=r"updated before the optimizer's step|outside of \[0, 1\]"):
        assert_teacher_follows(lambda: (InEachForward(), loader(), []), accumulate_grad_batches=1)
