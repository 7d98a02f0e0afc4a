import copy
import logging

import pytest
import torch
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import Manual, Stateful, Toy, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from dino_head import cosine_schedule
from dino_head.callbacks import FreezeLastLayerCallback, TeacherUpdateCallback


class Tracked(Toy):
    """Averages its student by hand, in float64 and parameter by parameter, after each optimizer step."""

    def on_fit_start(self):
        self.expected = [p.detach().double() for p in self.student.parameters()]
        self.updates = 0

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        momentum = cosine_schedule(self.updates, 0.9, 1.0, self.trainer.estimated_stepping_batches)
        self.updates += 1
        for average, parameter in zip(self.expected, self.student.parameters(), strict=True):
            average.mul_(momentum).add_(parameter.detach().double(), alpha=1 - momentum)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 12), (2, 6), (3, 6)])
def test_the_teacher_is_the_average_of_the_student_after_each_optimizer_step(accumulate, updates):
    torch.manual_seed(0)
    module, callback = Tracked(), TeacherUpdateCallback(base_momentum=0.9)
    trainer(callback, accumulate_grad_batches=accumulate).fit(module, loader())
    assert callback.steps_taken == module.updates == updates
    for teacher, expected in zip(module.teacher.parameters(), module.expected, strict=True):
        torch.testing.assert_close(teacher.double(), expected, rtol=1e-5, atol=1e-6)


def test_both_sides_of_the_example_module_change():
    torch.manual_seed(0)
    module = tiny_dino()
    before = copy.deepcopy(module.state_dict())
    trainer(FreezeLastLayerCallback(), TeacherUpdateCallback(base_momentum=0.9)).fit(module, view_loader())
    after = module.state_dict()
    for side in ("student", "teacher"):
        assert not torch.equal(after[f"{side}.backbone.0.weight"], before[f"{side}.backbone.0.weight"])


def test_a_frozen_layer_stays_bitwise_unchanged_in_the_teacher_too():
    module = Toy()
    before = module.teacher["head"].last_layer.weight_v.detach().clone()
    trainer(FreezeLastLayerCallback(), TeacherUpdateCallback(base_momentum=0.7), max_epochs=2).fit(module, loader())
    assert torch.equal(module.teacher["head"].last_layer.weight_v, before)


def test_a_checkpoint_written_at_the_step_holds_the_updated_teacher(tmp_path):
    module = Toy()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(checkpoint, TeacherUpdateCallback(base_momentum=0.5), max_steps=3, enable_checkpointing=True).fit(
        module, loader()
    )
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in module.state_dict().items())


def test_resumed_at_the_end_of_an_epoch_equals_uninterrupted(tmp_path):
    def run(**options):
        module = Toy()
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = [FreezeLastLayerCallback(), TeacherUpdateCallback(base_momentum=0.7), checkpoint]
        torch.manual_seed(0)
        trainer(*callbacks, enable_checkpointing=True).fit(module, loader(), **options)
        return module.state_dict()

    torch.manual_seed(0)
    uninterrupted = run()
    resumed = run(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in uninterrupted.items())


class Interrupt(Callback):
    """Stops in the first hook after an optimizer step, before all other callbacks, and saves."""

    def __init__(self, file, at_step):
        self.file, self.at_step = file, at_step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at_step:
            raise RuntimeError("interrupted")

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.file)


def test_a_run_resumed_between_a_step_and_its_update_does_the_update(tmp_path):
    """As after Ctrl-C between the two. With one batch an epoch, a run can be resumed from every step."""

    def run(*callbacks, **options):
        module = Toy()
        trainer(*callbacks, TeacherUpdateCallback(base_momentum=0.5), max_epochs=4).fit(
            module, loader(batches=1), **options
        )
        return module.state_dict()

    torch.manual_seed(0)
    uninterrupted = run()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(Interrupt(tmp_path / "between.ckpt", 2))
    resumed = run(ckpt_path=tmp_path / "between.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in uninterrupted.items())


@pytest.mark.parametrize("early", [False, True])
def test_a_loader_that_lightning_did_not_restore_raises(early, tmp_path):
    """Lightning does not restore it if the data were used before the checkpoint was loaded."""

    class EarlyLength(Toy):
        def configure_optimizers(self):
            if early:
                assert self.trainer.estimated_stepping_batches == 12
            return super().configure_optimizers()

    def run(**options):
        torch.manual_seed(0)
        module = EarlyLength()
        save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
        trainer(save, TeacherUpdateCallback(base_momentum=0.5), enable_checkpointing=True).fit(
            module, Stateful(loader().dataset, 4), **options
        )
        assert module.trainer.global_step == 12
        return module.state_dict()

    uninterrupted = run()
    if early:
        with pytest.raises(
            MisconfigurationException, match=r"estimated_stepping_batches in configure_optimizers\. Read it"
        ):
            run(ckpt_path=tmp_path / "step=6.ckpt")
    else:
        resumed = run(ckpt_path=tmp_path / "step=6.ckpt")
        assert all(torch.equal(resumed[key], value) for key, value in uninterrupted.items())


def test_buffers_stay_the_teachers_own():
    module = Toy(batch_norm=True)
    module.teacher["head"].layers[1].running_mean.fill_(7.0)
    trainer(TeacherUpdateCallback(), max_epochs=1).fit(module, loader())
    assert (module.teacher["head"].layers[1].running_mean == 7.0).all()
    assert module.student["head"].layers[1].running_mean.abs().max() < 7.0


@pytest.mark.parametrize("pairs", [(("student.head", "teacher.head"),), (("student", "teacher"),)])
def test_pairs_that_overlap_are_averaged_once(pairs):
    states = []
    for more in ((), pairs):
        torch.manual_seed(0)
        module = Toy()
        trainer(TeacherUpdateCallback((("student", "teacher"), *more), base_momentum=0.5)).fit(module, loader())
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_two_callbacks_on_one_teacher_are_refused():
    callbacks = TeacherUpdateCallback(), TeacherUpdateCallback((("student.head", "teacher.head"),))
    with pytest.raises(MisconfigurationException, match="would average the same parameters of a teacher twice a step"):
        trainer(*callbacks).fit(Toy(), loader())


def test_several_pairs():
    module = Toy()
    before = module.teacher["backbone"].weight.clone()
    pairs = (("student.head", "teacher.head"), ("student.backbone", "teacher.backbone"))
    trainer(TeacherUpdateCallback(pairs, base_momentum=0.5), max_epochs=1).fit(module, loader())
    assert not torch.equal(module.teacher["backbone"].weight, before)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda module: None,
            {"pairs": (("student", "teachr"),)},
            r"Toy has no submodule 'teachr' .* it has student, teacher",
        ),
        (lambda module: setattr(module, "teacher", module.student), {}, "is one and the same parameter"),
        (
            lambda module: setattr(module, "other", copy.deepcopy(module.student["backbone"])),
            {"pairs": (("student.backbone", "teacher.backbone"), ("other", "teacher.backbone"))},
            "is in another pair as well, with another student",
        ),
        (
            lambda module: module.teacher.update({"backbone": nn.Linear(8, 9)}),
            {},
            r"'backbone.weight' of .* is \(8, 8\) in the student and \(9, 8\) in the teacher: make the teacher with",
        ),
        (lambda module: module.teacher.update({"backbone": nn.Linear(8, 8, bias=False)}), {}, "missing in the teacher"),
        (lambda module: module.student.pop("head"), {}, "missing in the student"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(change, options, message):
    module = Toy()
    change(module)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(TeacherUpdateCallback(**options)).fit(module, loader())


def test_a_teacher_that_requires_gradients_is_refused():
    module = Toy()
    module.teacher.requires_grad_(True)
    with pytest.raises(
        MisconfigurationException, match=r"requires a gradient .* requires_grad_\(False\) on the teacher"
    ):
        trainer(TeacherUpdateCallback()).fit(module, loader())


def test_different_weights_at_the_start_are_refused_unless_allowed():
    module = Toy()
    module.teacher["backbone"].weight.data += 1
    with pytest.raises(
        MisconfigurationException, match=r"starts with a teacher that differs .*allow_different_weights"
    ):
        trainer(TeacherUpdateCallback()).fit(module, loader())
    before = module.teacher["backbone"].weight.clone()
    trainer(TeacherUpdateCallback(allow_different_weights=True, base_momentum=0.5)).fit(module, loader())
    assert not torch.equal(module.teacher["backbone"].weight, before)


def test_a_second_fit_accepts_a_teacher_that_differs():
    module, callback = Toy(), TeacherUpdateCallback(base_momentum=0.5)
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    with pytest.raises(MisconfigurationException, match="schedule of 4 optimizer steps, but this run has 8"):
        run.fit(module, loader())
    callback.total_steps = 8
    run.fit(module, loader())
    assert callback.steps_taken == 8


def test_validation_in_another_trainer_does_not_change_the_callbacks_of_a_run():
    module, callback = Toy(), TeacherUpdateCallback(base_momentum=0.5)
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    before = callback.receipt, callback.state_dict()
    module.validation_step = lambda batch, batch_idx: None
    trainer(callback).validate(module, loader(), verbose=False)
    assert (callback.receipt, callback.state_dict()) == before
    del module.validation_step
    run.fit_loop.max_epochs = 2
    with pytest.raises(MisconfigurationException, match="schedule of 4 optimizer steps, but this run has 8"):
        run.fit(module, loader())


def test_a_student_that_is_replaced_during_training_raises():
    class Replace(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                pl_module.student["backbone"] = nn.Linear(8, 8)

    with pytest.raises(MisconfigurationException, match="were replaced since training began"):
        trainer(TeacherUpdateCallback(), Replace()).fit(Toy(), loader())


def test_deepspeed_is_refused_by_name():
    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(MisconfigurationException, match="TeacherUpdateCallback does not work under DeepSpeedStrategy"):
        trainer(TeacherUpdateCallback(), strategy=DeepSpeedStrategy()).fit(Toy(), loader())


def test_the_receipt_is_logged_and_saved(tmp_path, caplog):
    callback = TeacherUpdateCallback(base_momentum=0.5)
    assert callback.receipt is None
    save = ModelCheckpoint(tmp_path, filename="last")
    with caplog.at_level(logging.INFO):
        trainer(callback, save, enable_checkpointing=True).fit(tiny_dino(), view_loader())
    last = cosine_schedule(11, 0.5, 1.0, 12)
    assert callback.receipt == (
        "teacher seen to change at 5 of 5 looks, loss.center at 6 of 6, on 1 of 1 ranks, in 12 of "
        f"12 optimizer steps, last with momentum {last:.6g}; teacher parts left behind: none"
    )
    assert [record.getMessage() for record in caplog.records].count(callback.receipt) == 1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["receipt"] == callback.receipt


def test_a_teacher_in_low_precision_is_refused():
    with pytest.raises(MisconfigurationException, match=r"is torch.bfloat16 .* keep the parameters in float32"):
        trainer(TeacherUpdateCallback(), precision="bf16-true").fit(Toy(), loader())


def test_a_run_without_an_end_is_refused():
    with pytest.raises(MisconfigurationException, match="set max_epochs or max_steps"):
        trainer(TeacherUpdateCallback(), max_epochs=-1).fit(Toy(), loader())


def test_data_without_a_length_needs_a_limit():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(8), 0)] * 8)

    stream = torch.utils.data.DataLoader(Stream(), batch_size=4)
    with pytest.raises(MisconfigurationException, match="for data without a length max_steps or limit_train_batches"):
        trainer(TeacherUpdateCallback(), max_epochs=2).fit(Toy(), stream)
    module, callback = Toy(), TeacherUpdateCallback(base_momentum=0.5)
    trainer(callback, max_steps=4, max_epochs=-1).fit(module, stream)
    assert callback.steps_taken == 4


MANUAL = [("lightning", "lightning"), ("lightning", "torch"), ("torch", "lightning"), ("torch", "torch")]


@pytest.mark.parametrize(("backward", "optimizer"), MANUAL)
def test_steps_of_manual_optimization_are_seen(backward, optimizer):
    module, callback = Manual(backward, optimizer), TeacherUpdateCallback(base_momentum=0.5, total_steps=12)
    trainer(callback).fit(module, loader())
    assert callback.steps_taken == 12
    assert not torch.equal(module.teacher["backbone"].weight, module.student["backbone"].weight)


def test_an_optimizer_that_lightning_does_not_know_is_refused():
    class Own(Manual):
        def configure_optimizers(self):
            self.own = super().configure_optimizers()

        def optimizers(self, use_pl_optimizer=True):
            return self.own

    with (
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
        pytest.raises(MisconfigurationException, match="TeacherUpdateCallback counts optimizer steps, and saw none"),
    ):
        trainer(TeacherUpdateCallback(total_steps=12)).fit(Own("lightning"), loader())


def test_manual_optimization_needs_total_steps():
    with pytest.raises(MisconfigurationException, match=r"under manual optimization .* set total_steps"):
        trainer(TeacherUpdateCallback()).fit(Manual("lightning"), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_momentum": 1.1}, r"base_momentum must be a number in \[0, 1\], got 1.1"),
        ({"final_momentum": -0.1}, "final_momentum must be a number"),
        ({"pairs": ()}, "pairs must be"),
        ({"pairs": ("student", "teacher")}, r"pairs must be \(student, teacher\) names like"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherUpdateCallback(**options)
