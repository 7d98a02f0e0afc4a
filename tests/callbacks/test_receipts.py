"""Each clause of a receipt is an observation: it changes when it is no longer true."""

import pytest
import torch
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import trainer
from lightning.pytorch import Callback

from dino_head import DINOLoss
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback, teacher_update


def fit(*callbacks, module=None, **options):
    """Three epochs of four batches: checks at steps 1, 2, 3, 4, 8 and 12."""
    torch.manual_seed(0)
    module = module or tiny_dino(warmup_epochs=0)
    trainer(*callbacks, **options).fit(module, view_loader())
    return [callback.receipt for callback in callbacks if hasattr(callback, "receipt")]


def test_the_usual_receipt_of_the_teacher():
    (receipt,) = fit(TeacherUpdateCallback(base_momentum=0.9, final_momentum=0.9))
    assert receipt == (
        "teacher seen to change at 6 of 6 looks, loss.center at 6 of 6, on 1 of 1 ranks, in 12 "
        "optimizer steps, last with momentum 0.9; teacher parts left behind: none"
    )


def test_a_teacher_that_does_not_change(monkeypatch):
    monkeypatch.setattr(teacher_update, "get_ema_multi_avg_fn", lambda momentum: lambda *_: None)
    (receipt,) = fit(TeacherUpdateCallback())
    assert receipt.startswith("teacher seen to change at 0 of 6 looks, loss.center at 6 of 6, on 0 of 1")


def test_a_teacher_that_changes_at_some_checks(monkeypatch):
    right = teacher_update.get_ema_multi_avg_fn
    monkeypatch.setattr(
        teacher_update,
        "get_ema_multi_avg_fn",
        lambda momentum: (
            lambda teachers, students, update: None if update == 7 else right(momentum)(teachers, students, update)
        ),
    )
    (receipt,) = fit(TeacherUpdateCallback())
    assert receipt.startswith("teacher seen to change at 5 of 6")
    assert "on 0 of 1 ranks" in receipt


def test_a_center_that_does_not_change(monkeypatch):
    monkeypatch.setattr(DINOLoss, "apply_center_update", lambda self: None)
    (receipt,) = fit(TeacherUpdateCallback())
    assert "teacher seen to change at 6 of 6 looks, loss.center at 0 of 6, on 0 of 1" in receipt


def test_a_loss_that_is_not_called_in_training():
    module = tiny_dino(warmup_epochs=0)
    module.other = DINOLoss(16)
    (receipt,) = fit(TeacherUpdateCallback(), module=module)
    assert "loss.center at 6 of 6, other.center at 0 of 0, on 1 of 1 ranks" in receipt


def test_checks_at_which_nothing_should_change_do_not_count():
    (receipt,) = fit(TeacherUpdateCallback(base_momentum=1.0))
    assert receipt.startswith("teacher seen to change at 0 of 0")
    assert "last with momentum 1;" in receipt
    still = tiny_dino(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    (receipt,) = fit(TeacherUpdateCallback(), module=still)
    assert receipt.startswith("teacher seen to change at 0 of 0 looks, loss.center at 6 of 6")
    fixed = tiny_dino(warmup_epochs=0)
    fixed.loss.center_momentum = 1.0
    (receipt,) = fit(TeacherUpdateCallback(), module=fixed)
    assert "center" not in receipt


@pytest.mark.parametrize(
    ("options", "steps", "checks"), [({"max_steps": 6}, 6, 5), ({"accumulate_grad_batches": 2}, 6, 5)]
)
def test_the_steps_and_the_checks_follow_the_run(options, steps, checks):
    """The last step of a run is checked, wherever the run ends."""
    (receipt,) = fit(TeacherUpdateCallback(), **options)
    assert f"teacher seen to change at {checks} of {checks} looks" in receipt
    assert f"in {steps} of {steps} optimizer steps" in receipt


class Detach(Callback):
    """Cuts the gradient of the prototypes after some steps."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step >= 4:
            pl_module.student["head"].last_layer.weight_v.grad = None


def test_a_layer_that_does_not_change_after_its_release():
    (receipt,) = fit(FreezeLastLayerCallback(1), Detach(), TeacherUpdateCallback())[:1]
    assert receipt.endswith("released at step 4, unchanged in the 3 steps after")
    (receipt,) = fit(FreezeLastLayerCallback(1), TeacherUpdateCallback())[:1]
    assert receipt.endswith(
        "frozen for 4 optimizer steps, bitwise unchanged on 1 of 1 ranks at step 4, released at step 4, seen to change "
        "at step 5"
    )
    (receipt,) = fit(FreezeLastLayerCallback(1), TeacherUpdateCallback(), max_epochs=1)[:1]
    assert receipt.endswith("released at step 4")


class Overwrites(Callback):
    """Other code that sets the weight decay, in some steps."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in (3, 7, 11):
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.5


def test_a_schedule_that_other_code_overwrites():
    receipt = fit(ScheduleCallback("weight_decay", (0.04, 0.4)), Overwrites(), TeacherUpdateCallback())[0]
    assert receipt == "weight_decay from 0.04 to 0.5 in 12 of 12 optimizer steps, changed by other code in 3 of them"
    receipt = fit(ScheduleCallback("weight_decay", lambda step, total: 0.04), TeacherUpdateCallback())[0]
    assert receipt == "weight_decay from 0.04 to 0.04 in 12 of 12 optimizer steps"
