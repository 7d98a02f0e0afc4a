"""Values that ScheduleCallback sets, step by step, and its errors. 3 epochs of 4 batches unless noted."""

import copy

import numpy as np
import pytest
import torch
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import Manual, Toy, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from dino_head import cosine_schedule
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback

# These tests are about another rule, and most have no TeacherUpdateCallback.
pytestmark = pytest.mark.filterwarnings("ignore:teacher does not follow")


class Seen(Callback):
    """Values in the optimizer at each of its steps."""

    def __init__(self, *, key="weight_decay"):
        self.key, self.values = key, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.values.append([group[self.key] for group in optimizer.param_groups])


def cosine(start, end, steps):
    return [cosine_schedule(step, start, end, steps) for step in range(steps)]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 12), (2, 6), (3, 6)])
def test_weight_decay_follows_the_cosine_by_optimizer_steps_and_groups_of_0_stay(accumulate, steps):
    seen, callback = Seen(), ScheduleCallback("weight_decay", (0.04, 0.4))
    trainer(callback, seen, accumulate_grad_batches=accumulate).fit(tiny_dino(), view_loader())
    decayed, others = zip(*seen.values, strict=True)
    assert decayed == pytest.approx(cosine(0.04, 0.4, steps))
    assert others == (0.0,) * steps
    assert callback.receipt == (f"weight_decay from 0.04 to {decayed[-1]:.6g} in {steps} of {steps} optimizer steps")


def test_any_function_of_the_step_and_the_length_of_the_run():
    seen = Seen()
    trainer(ScheduleCallback("weight_decay", lambda step, total: step + total / 100), seen).fit(Toy(), loader())
    assert [value for (value,) in seen.values] == pytest.approx([step + 0.12 for step in range(12)])


def test_the_teachers_temperature_by_step():
    temperatures = []
    module = tiny_dino()
    module.loss.warmup_teacher_temp_epochs = 0
    module.loss.register_forward_hook(lambda loss, *_: temperatures.append(loss.temperature(0)))
    trainer(ScheduleCallback("loss.teacher_temp", lambda step, total: 0.04 + 0.01 * (step >= 6))).fit(
        module, view_loader()
    )
    assert temperatures == pytest.approx([0.04] * 6 + [0.05] * 6)


@pytest.mark.parametrize("teacher_first", [True, False])
def test_the_teachers_momentum(teacher_first):
    """With momentum 0 the teacher becomes the student of that step, and with momentum 1 it stays."""
    teacher = TeacherUpdateCallback()
    callbacks = [teacher, ScheduleCallback("TeacherUpdateCallback.momentum", lambda step, total: float(step != 7))]
    students = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            students.append(copy.deepcopy(pl_module.student.state_dict()))

    module = Toy()
    before = copy.deepcopy(module.teacher.state_dict())
    trainer(*callbacks[:: 1 if teacher_first else -1], Keep()).fit(module, loader())
    after = module.teacher.state_dict()
    assert all(torch.equal(value, students[7][key]) for key, value in after.items())
    assert not torch.equal(after["backbone.weight"], before["backbone.weight"])
    assert "last with momentum 1" in teacher.receipt


@pytest.mark.parametrize("value", [np.float32(0.25), np.int64(3), 3])
def test_numbers_of_any_type_are_set_and_saved(value, tmp_path):
    """A checkpoint can hold Python's numbers alone."""
    module, save = Toy(), ModelCheckpoint(tmp_path, filename="last")
    module.number = 1
    callback = ScheduleCallback("number", lambda step, total: value, total_steps=np.int64(12))
    trainer(callback, save, enable_checkpointing=True).fit(module, loader())
    assert module.number == value
    assert isinstance(module.number, int) is bool(value == 3)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]["last"] == value


def test_a_target_inside_a_compiled_module():
    module = tiny_dino()
    module.loss = torch.compile(module.loss, backend="eager")
    with pytest.raises(MisconfigurationException, match="has a warm-up over 30 epochs of its own"):
        trainer(ScheduleCallback("loss.teacher_temp", (0.1, 0.2))).fit(module, view_loader())


def test_parameter_groups_that_come_later_follow_too():
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                optimizer = trainer.optimizers[0]
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.04})
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.0})

    seen = Seen()
    trainer(Unfreeze(), ScheduleCallback("weight_decay", (0.04, 0.4)), seen).fit(Toy(), loader())
    values = cosine(0.04, 0.4, 12)
    assert seen.values[:4] == [pytest.approx([value]) for value in values[:4]]
    assert seen.values[4:] == [pytest.approx([value, value, 0.0]) for value in values[4:]]


def test_groups_that_come_later_in_one_of_two_optimizers():
    """Groups are told apart by optimizer, also while the schedule is at 0."""

    class Two(Manual):
        def configure_optimizers(self):
            parts = self.student["backbone"], self.student["head"].layers
            return [torch.optim.AdamW(part.parameters(), weight_decay=0.04) for part in parts]

        def optimizers(self, use_pl_optimizer=True):
            return super().optimizers(use_pl_optimizer)[0]

    class Add(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.0})

    run = trainer(Add(), ScheduleCallback("weight_decay", lambda step, total: 0.2 * (step > 5), total_steps=12))
    run.fit(Two("lightning"), loader())
    decays = [[group["weight_decay"] for group in optimizer.param_groups] for optimizer in run.optimizers]
    assert decays == [[0.2, 0.0], [0.2]]


def test_several_callbacks_of_one_class_are_all_set():
    module = Toy()
    module.other = copy.deepcopy(module.teacher)
    again = copy.deepcopy(module)
    teachers = TeacherUpdateCallback(), TeacherUpdateCallback((("student", "other"),))
    schedule = ScheduleCallback("TeacherUpdateCallback.momentum", (0.5, 0.5))
    trainer(*teachers, schedule, max_epochs=1).fit(module, loader())
    assert all("last with momentum 0.5" in teacher.receipt for teacher in teachers)
    trainer(*teachers, max_epochs=1).fit(again, loader())
    assert not any("last with momentum 0.5" in teacher.receipt for teacher in teachers)


def test_an_attribute_of_the_module_itself():
    module, seen = Toy(), []
    module.strength = 1.0
    module.on_train_batch_end = lambda *_: seen.append(module.strength)
    trainer(ScheduleCallback("strength", (1.0, 0.0)), max_epochs=1).fit(module, loader())
    assert seen == pytest.approx(cosine(1.0, 0.0, 4))


def test_several_schedules_in_one_trainer():
    callbacks = [ScheduleCallback("weight_decay", (0.1, 0.2)), ScheduleCallback("eps", (1e-8, 1e-6))]
    decay, eps = Seen(), Seen(key="eps")
    trainer(*callbacks, decay, eps).fit(Toy(), loader())
    assert decay.values[-1][0] > 0.19
    assert eps.values[-1][0] > 9e-7


@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("schedule", [(0.1, 0.4), lambda step, total: 0.1 * (step >= 9)])
def test_a_resumed_schedule_continues_also_from_0(schedule, stop, tmp_path):
    """From the end and from the middle of an epoch. Groups that the schedule set to 0 still follow it."""
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole, rest, callback = Seen(), Seen(), ScheduleCallback("weight_decay", schedule)
    trainer(ScheduleCallback("weight_decay", schedule), whole, save, enable_checkpointing=True).fit(Toy(), loader())
    trainer(callback, rest).fit(Toy(), loader(), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert rest.values == whole.values[stop:]
    assert rest.values[-1][0] > 0.09
    assert callback.receipt.startswith(f"weight_decay from {whole.values[0][0]:.6g} to ")
    assert callback.receipt.endswith("in 12 of 12 optimizer steps")


def test_a_second_fit_of_the_same_callback_begins_anew():
    callback = ScheduleCallback("weight_decay", (0.04, 0.4))
    for epochs in (2, 3):
        seen = Seen()
        trainer(callback, seen, max_epochs=epochs).fit(Toy(), loader())
        assert [value for (value,) in seen.values] == pytest.approx(cosine(0.04, 0.4, 4 * epochs))


# The length of the schedule, also of the teacher's momentum.

SCHEDULED = {
    "schedule": lambda **options: ScheduleCallback("weight_decay", (0.04, 0.4), **options),
    "teacher": lambda **options: TeacherUpdateCallback(**options),
}


@pytest.fixture(params=list(SCHEDULED))
def scheduled(request):
    return SCHEDULED[request.param]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_steps": 5, "max_epochs": -1}, 5),
        ({"max_steps": 5, "max_epochs": 9}, 5),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
    ],
)
def test_the_horizon_is_the_length_of_the_run(scheduled, options, steps):
    callback = scheduled()
    trainer(callback, **options).fit(Toy(), loader())
    assert f"{steps} of {steps} optimizer steps" in callback.receipt


def test_total_steps_sets_the_horizon(scheduled):
    callback = scheduled(total_steps=100)
    trainer(callback, max_epochs=1).fit(Toy(), loader())
    assert "4 of 100 optimizer steps" in callback.receipt


def test_unlimited_training_needs_a_horizon(scheduled):
    with pytest.raises(MisconfigurationException, match=r"set max_epochs or max_steps .* total_steps=100_000"):
        trainer(scheduled(), max_epochs=-1).fit(Toy(), loader())
    callback = scheduled(total_steps=6)
    trainer(callback, max_epochs=-1, max_time={"seconds": 1}).fit(Toy(), loader())
    assert f"{callback.steps_taken} optimizer steps, of a schedule of 6" in callback.receipt


def stopped_after_an_epoch(scheduled, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(scheduled(), save, max_epochs=2, enable_checkpointing=True).fit(Toy(), loader())
    return tmp_path / "epoch=0.ckpt"


def test_resuming_with_another_length_raises_unless_total_steps_is_set(scheduled, tmp_path):
    file = stopped_after_an_epoch(scheduled, tmp_path)
    message = r"schedule of 8 optimizer steps, but this run has 12.*total_steps=8 keeps.*total_steps=12 switches"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(scheduled(), max_epochs=3).fit(Toy(), loader(), ckpt_path=file)
    for total_steps in (8, 12):
        callback = scheduled(total_steps=total_steps)
        trainer(callback, max_epochs=3).fit(Toy(), loader(), ckpt_path=file)
        of = {8: "12 optimizer steps, of a schedule of 8", 12: "12 of 12 optimizer steps"}
        assert of[total_steps] in callback.receipt


def test_resuming_with_data_of_another_length_raises(scheduled, tmp_path):
    file = stopped_after_an_epoch(scheduled, tmp_path)
    with pytest.raises(MisconfigurationException, match="schedule of 8 optimizer steps, but this run has 10"):
        trainer(scheduled(), max_epochs=2).fit(Toy(), loader(batches=5), ckpt_path=file)


def test_data_that_grow_from_epoch_to_epoch_raise(scheduled):
    class Growing(Toy):
        def train_dataloader(self):
            return loader(batches=4 + self.current_epoch)

    message = r"schedule of 12 optimizer steps, .* batches and accumulation of epoch 1 the run has 15: .*max_steps"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(scheduled(), reload_dataloaders_every_n_epochs=1).fit(Growing())
    callback = scheduled()
    trainer(callback, reload_dataloaders_every_n_epochs=1, max_steps=13, max_epochs=-1).fit(Growing())
    assert "13 of 13 optimizer steps" in callback.receipt


def test_accumulation_that_changes_raises(scheduled):
    with pytest.raises(MisconfigurationException, match="with the batches and accumulation of epoch 1 the run has 6"):
        trainer(GradientAccumulationScheduler({0: 1, 1: 2}), scheduled()).fit(Toy(), loader())


def test_a_constant_momentum_needs_no_horizon():
    callback = TeacherUpdateCallback(base_momentum=0.9, final_momentum=0.9)
    trainer(callback, max_epochs=-1, max_time={"seconds": 1}).fit(Toy(), loader())
    assert f"in {callback.steps_taken} optimizer steps, last with momentum 0.9" in callback.receipt


# Errors.


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "weight_decy",
            r"no number 'weight_decy' \(there is nothing\): choose .* \(.*weight_decay\)",
        ),
        ("student.backbone", r"no number 'student.backbone' \(there is a Sequential"),
        ("TeacherUpdateCallback.momentum", "no number 'TeacherUpdateCallback.momentum'"),
        ("loss.studnet_temp", r"no number 'loss.studnet_temp' .* the path of a number in TinyDINO"),
        ("lr", "leaves the learning rate to a scheduler that Lightning steps"),
        ("learning_rate", "leaves the learning rate to a scheduler that Lightning steps"),
        ("betas", r"sets numbers, but 'betas' of the optimizer's groups is of type tuple"),
        ("foreach", r"sets numbers, but 'foreach' of the optimizer's groups is of type NoneType"),
        ("params", r"sets numbers, but 'params' of the optimizer's groups is of type list"),
        ("FreezeLastLayerCallback.steps", "no number 'FreezeLastLayerCallback.steps'"),
        ("loss.teacher_temp", r"has a warm-up over 30 epochs of its own"),
    ],
)
def test_a_target_that_cannot_be_scheduled_is_refused(target, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(ScheduleCallback(target, (0.1, 0.2))).fit(tiny_dino(), view_loader())


def test_only_groups_without_weight_decay_are_refused():
    module = Toy(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(MisconfigurationException, match="no parameter group with another 'weight_decay' than 0"):
        trainer(ScheduleCallback("weight_decay", (0.04, 0.4))).fit(module, loader())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, "0.1", torch.tensor(0.1)])
def test_a_schedule_without_a_finite_number_raises(value):
    with pytest.raises(MisconfigurationException, match=r"the schedule of 'weight_decay' returned .* for step 0 of 12"):
        trainer(ScheduleCallback("weight_decay", lambda step, total: value)).fit(Toy(), loader())


@pytest.mark.parametrize("value", [1.5, -0.1])
def test_a_momentum_out_of_range_raises(value):
    callbacks = TeacherUpdateCallback(), ScheduleCallback("TeacherUpdateCallback.momentum", (value, value))
    with pytest.raises(ValueError, match=r"TeacherUpdateCallback.momentum must be a number in \[0, 1\]"):
        trainer(*callbacks).fit(Toy(), loader())


@pytest.mark.parametrize("backward", ["lightning", "torch"])
@pytest.mark.parametrize("optimizer", ["lightning", "torch"])
def test_manual_optimization_with_total_steps(backward, optimizer):
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["weight_decay"])

    module = Manual(backward, optimizer)
    trainer(ScheduleCallback("weight_decay", (0.1, 0.2), total_steps=12), See()).fit(module, loader())
    assert seen == pytest.approx(cosine(0.1, 0.2, 12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", (0.0, 1.0)), "target must be a name"),
        (("weight_decay", 0.4), r"schedule must be a function of \(step, total_steps\) or a pair"),
        (("weight_decay", (0.4,)), "schedule must be a function"),
        (("weight_decay", (0.4, "1")), "schedule must be a function"),
        (
            ("weight_decay", lambda step: 0.4),
            "takes other arguments: too many positional arguments",
        ),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScheduleCallback(*arguments)


def test_total_steps_out_of_range():
    with pytest.raises(ValueError, match="total_steps must be an integer >= 1"):
        ScheduleCallback("weight_decay", (0.0, 1.0), total_steps=0)
    with pytest.raises(ValueError, match="total_steps must be an integer >= 1"):
        TeacherUpdateCallback(total_steps=1.5)


def test_the_freeze_and_the_schedules_count_the_same_steps():
    callbacks = [
        FreezeLastLayerCallback(steps=5),
        ScheduleCallback("weight_decay", (0.1, 0.2)),
        TeacherUpdateCallback(),
    ]
    trainer(*callbacks, accumulate_grad_batches=2).fit(Toy(), loader(batches=5))
    assert [callback.steps_taken for callback in callbacks] == [9, 9, 9]
