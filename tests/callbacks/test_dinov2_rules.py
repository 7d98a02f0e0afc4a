"""The rules on a module with two losses and two heads: class tokens and masked patches."""

import copy
import itertools
import math

import pytest
import torch
from helpers.tiny_dino import view_loader
from helpers.tiny_dinov2 import BOTH_HEADS, GivenMasks, Shuffled, TinyDINOv2, masked_loader, sgd, tiny_dinov2
from helpers.toy_training import rules, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from dino_head import DINOProjectionHead, IBOTPatchLoss
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)
from dino_head.callbacks.testing import (
    assert_accumulation_invariant,
    assert_resume_invariant,
    assert_teacher_follows,
)


def fit(module, *callbacks, data=None, **options):
    run = trainer(*(callbacks or rules()), **options)
    run.fit(module, data or view_loader())
    return run


def given_masks(**options):
    """Without KoLeo, whose neighbours are those of a micro-batch."""
    return tiny_dinov2(GivenMasks, make_optimizer=sgd, **{"koleo_weight": 0.0, **options})


def equal(ours, theirs):
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


# Teacher, centers and receipts.


def test_the_receipt_names_both_centers():
    update = TeacherUpdateCallback(base_momentum=0.9)
    fit(tiny_dinov2(), update)
    assert update.receipt == (
        "teacher seen to change at 6 of 6 looks, loss.center at 6 of 6, patch_loss.center at 6 of 6, on 1 of 1 ranks, "
        "in 12 of 12 optimizer steps, last with momentum 0.998296; teacher parts left behind: none"
    )


def test_a_patch_center_that_does_not_change_is_in_the_receipt(monkeypatch):
    module, update = tiny_dinov2(), TeacherUpdateCallback()
    monkeypatch.setattr(module.patch_loss, "apply_center_update", lambda: None)
    fit(module, update)
    assert "loss.center at 6 of 6, patch_loss.center at 0 of 6, on 0 of 1 ranks" in update.receipt


def test_steps_without_masked_patches_keep_the_patch_center_and_are_not_missed():
    """No mask in the batches 0, 2 and 3 of each epoch; the checks are at the steps 1, 2, 3, 4, 8 and 12."""
    update, seen = TeacherUpdateCallback(), []

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.patch_loss.center.clone())

    fit(given_masks(), update, See(), data=masked_loader(none_in=[*range(4), *range(8, 16)]))
    assert "loss.center at 6 of 6, patch_loss.center at 1 of 1, on 1 of 1 ranks" in update.receipt
    moved = [bool((a != b).any()) for a, b in itertools.pairwise([torch.zeros_like(seen[0]), *seen])]
    assert moved == [False, True, False, False] * 3


def test_a_run_without_any_masked_patch_trains_the_class_tokens():
    module, update = given_masks(freeze=1), TeacherUpdateCallback()
    fit(module, update, FreezeLastLayerCallback(), data=masked_loader(none_in=range(16)))
    assert "loss.center at 6 of 6, patch_loss.center at 0 of 0, on 1 of 1 ranks" in update.receipt
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert not module.patch_loss.center.any()


def test_the_update_averages_both_heads_and_uses_the_masked_patches_for_the_center():
    outputs = []

    class See(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.patch_loss.register_forward_pre_hook(lambda _, given: outputs.append(given[0].logits()))

    module = given_masks()
    fit(module, TeacherUpdateCallback(), See(), accumulate_grad_batches=2, max_epochs=1, data=masked_loader())
    assert len({len(rows) for rows in outputs}) > 1
    expected = torch.zeros(16, dtype=torch.float64)
    for first, second in zip(outputs[::2], outputs[1::2], strict=True):
        expected = 0.9 * expected + 0.1 * torch.cat([first, second]).double().mean(dim=0)  # of both micro-batches
    torch.testing.assert_close(module.patch_loss.center.flatten(), expected.float(), rtol=1e-5, atol=1e-7)
    assert_teacher_follows(lambda: (given_masks(), masked_loader(), [TeacherUpdateCallback()]))


def test_a_patch_head_outside_of_the_pairs_is_reported():
    pairs = [(f"student.{name}", f"teacher.{name}") for name in ("backbone", "head")]
    with pytest.raises(MisconfigurationException, match=r"uses teacher.patch_head.*student.patch_head first changed"):
        fit(tiny_dinov2(freeze=-1), TeacherUpdateCallback(pairs))


def test_a_schedule_of_a_patch_temperature_that_the_loss_warms_up_is_refused():
    with pytest.raises(MisconfigurationException, match=r"IBOTPatchLoss\(..., warmup_teacher_temp_epochs=0\)"):
        fit(tiny_dinov2(), ScheduleCallback("patch_loss.teacher_temp", (0.04, 0.07)))


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_a_patch_loss_in_evaluation_mode_raises():
    module = tiny_dinov2()
    module.patch_loss.eval()
    with pytest.raises(MisconfigurationException, match=r"^patch_loss is in evaluation mode, .* patch_loss.train\(\)"):
        fit(module)


def with_norm(*names):
    """Heads with batch norm, which a user's own module may have."""
    module = tiny_dinov2(shared_head=names == ("head",))
    for side in (module.student, module.teacher):
        for name in names:
            side[name] = DINOProjectionHead(8, 8, 4, 16)
    return module


@pytest.mark.parametrize("names", [("head",), ("patch_head",)])
def test_a_patch_head_with_batch_norm_raises(names):
    message = (
        rf"the patch head \(student.{names[0]}, teacher.{names[0]}\) of patch_loss has batch norm, .*batch_norm=False"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(with_norm(*names), CollapseMonitorCallback())


@pytest.mark.filterwarnings("ignore:the teacher's batch norm", "ignore:teacher does not follow")
def test_batch_norm_in_the_head_of_the_class_tokens_is_allowed():
    module = tiny_dinov2()
    for side in (module.student, module.teacher):
        side["head"] = DINOProjectionHead(8, 8, 4, 16)
    monitor = CollapseMonitorCallback()
    fit(module, monitor, max_epochs=1)
    assert len(monitor.history) == 1


# The freeze.


class LastLayers(Callback):
    """Notes the last layers before training and after each batch."""

    def on_train_start(self, trainer, pl_module):
        self.values = {name: [] for name in BOTH_HEADS if "patch_head" in pl_module.student or "patch" not in name}
        self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note(pl_module)

    def note(self, pl_module):
        for name, values in self.values.items():
            values.append(pl_module.get_submodule(name).weight_v.detach().clone())

    @property
    def moved(self):
        return {name: [not torch.equal(*two) for two in itertools.pairwise(v)] for name, v in self.values.items()}


@pytest.mark.parametrize("freeze", [FreezeLastLayerCallback, lambda: FreezeLastLayerCallback(steps=8)])
@pytest.mark.parametrize("shared_head", [False, True])
def test_the_last_layers_of_both_heads_are_bitwise_frozen_then_moving(freeze, shared_head):
    layers, callback = LastLayers(), freeze()
    fit(tiny_dinov2(shared_head=shared_head), callback, TeacherUpdateCallback(), layers)
    names = BOTH_HEADS[: 1 if shared_head else 2]
    assert layers.moved == dict.fromkeys(names, [False] * 8 + [True] * 4)
    assert callback.receipt == "; ".join(
        f"{name} frozen for 8 optimizer steps, bitwise unchanged on 1 of 1 ranks at step 8, released at step 8, seen "
        "to change at step 9"
        for name in names
    )


def test_a_patch_head_that_moves_while_frozen_raises():
    class Move(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.student["patch_head"].last_layer.weight_v.data += 1

    with pytest.raises(MisconfigurationException, match=r"^student.patch_head.last_layer changed while frozen"):
        fit(tiny_dinov2(), Move(), FreezeLastLayerCallback())


# Accumulation, resume, modes.


@pytest.mark.parametrize("none_in", [(), range(2, 7)], ids=["masks", "none in some micro-batches"])
def test_accumulated_micro_batches_equal_one_batch(none_in):
    """1 / (V m) with the V of a micro-batch, whose mean is that of the batch."""

    def make():
        return given_masks(), masked_loader(3, 8, none_in=none_in), rules()

    assert_accumulation_invariant(make)


def test_under_accumulation_sinkhorn_differs():
    """It spreads each micro-batch."""

    def make():
        return given_masks(centering="sinkhorn"), masked_loader(3, 8), rules()

    with pytest.raises(AssertionError, match="depends on other samples of the batch"):
        assert_accumulation_invariant(make)


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise_with_its_masks():
    seen = []

    class Noted(TinyDINOv2):
        def masks(self, masks, batch, batch_idx):
            seen.append(masks)
            return masks

    assert_resume_invariant(lambda: (tiny_dinov2(Noted), Shuffled(), rules()))
    assert len({tuple(masks.flatten().tolist()) for masks in seen[:8]}) == 8  # they differ from batch to batch


def test_masks_from_a_random_state_that_is_not_saved_do_not_resume():
    """With such masks, the previous test would fail."""

    class Own(TinyDINOv2):
        generator = torch.Generator().manual_seed(0)

        def masks(self, masks, batch, batch_idx):
            return masks & (torch.rand(len(masks), 1, 1, generator=self.generator) < 0.5)

    with pytest.raises(AssertionError, match="resumed"):
        assert_resume_invariant(lambda: (tiny_dinov2(Own), Shuffled(), rules()))


def test_validation_the_sanity_check_test_and_predict_change_nothing():
    class WithEvaluation(TinyDINOv2):
        def validation_step(self, batch, batch_idx):
            self.log("checked", self.terms(batch, batch_idx)["loss"])

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self.terms(batch, batch_idx)

    module = tiny_dinov2(WithEvaluation)
    run = trainer(*rules(), val_check_interval=1, num_sanity_val_steps=2)
    run.fit(module, view_loader(), view_loader())
    assert run.callback_metrics["checked"] > 0
    expected = tiny_dinov2()
    fit(expected)
    equal(module, expected)
    before = copy.deepcopy(module.state_dict())
    run.validate(module, view_loader(), verbose=False)
    run.test(module, view_loader(), verbose=False)
    assert len(run.predict(module, view_loader())) == 4
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert not module.teacher.training


# Losses that are not finite.


def break_side(side, head, step=6):
    """Makes one row of a side's outputs NaN, in one step."""

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == step:
                part = getattr(pl_module, side)[head]
                part.register_forward_pre_hook(lambda _, given: (given[0].index_fill(0, ROW, math.nan),))

    return Break()


ROW = torch.tensor([1])


@pytest.mark.parametrize(
    ("side", "head", "message"),
    [
        (
            "student",
            "patch_head",
            r"the loss of patch_loss \(IBOTPatchLoss\) is nan in epoch 1, at optimizer step 6: the outputs of the "
            r"student for the masked patches are not finite .* uses \(mask token, drop path, its own normalisation\)",
        ),
        (
            "teacher",
            "patch_head",
            r"the loss of patch_loss \(IBOTPatchLoss\) is nan .*: the outputs of the teacher for the masked patches",
        ),
        ("student", "head", r"the loss of loss \(DINOLoss\) is nan .*: the outputs of the student are not finite"),
    ],
)
def test_a_nan_in_one_row_names_its_loss_and_side_before_any_update(side, head, message):
    module, kept = tiny_dinov2(), {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            kept.update(copy.deepcopy(pl_module.state_dict()))

    with pytest.raises(FloatingPointError, match=message):
        fit(module, *rules(), break_side(side, head), Keep())
    torch.testing.assert_close(dict(module.state_dict()), kept, rtol=0, atol=0)


class OwnTerm(TinyDINOv2):
    """Has a term that becomes NaN, or calls a loss without the hooks of modules."""

    kind = "term"

    def training_step(self, batch, batch_idx):
        if self.kind == "forward" and self.global_step >= 5:
            call = self.patch_loss.forward
            self.patch_loss.forward = lambda teacher, student, *rest: call(teacher, student, *rest) * math.nan
            self.patch_loss._forward_hooks.clear()
        loss = super().training_step(batch, batch_idx)
        return loss * (math.nan if self.kind == "term" and self.global_step == 5 else 1)


@pytest.mark.parametrize("kind", ["term", "forward"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"max_steps": 6}], ids=str)
def test_a_nan_outside_of_the_losses_raises_before_any_update(kind, options):
    module, kept = tiny_dinov2(OwnTerm), {}
    module.kind = kind

    class Keep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.update(copy.deepcopy(pl_module.state_dict()))

    message = (
        "the loss that training_step returns is nan in epoch .* optimizer step 5: the value of loss and patch_loss is"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(module, Keep(), TeacherUpdateCallback(), **options)
    weights = {name: value for name, value in module.state_dict().items() if "center" not in name}
    torch.testing.assert_close(weights, {name: kept[name] for name in weights}, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [list, tuple, lambda losses: {"losses": losses[0]}], ids=["list", "tuple", "dict"])
def test_losses_that_are_no_submodules_raise(kind):
    module = tiny_dinov2()
    module.more = kind([IBOTPatchLoss(16)])
    with pytest.raises(MisconfigurationException, match=r"the losses in the \w+ TinyDINOv2.more are no submodules"):
        fit(module)


def test_an_infinite_patch_center_is_named():
    module = tiny_dinov2()
    module.patch_loss.center[..., 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"patch_loss .*: the center contains NaN or inf"):
        fit(module)
