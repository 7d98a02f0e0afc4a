"""Runs of a real Trainer: 3 epochs of 4 batches, the last layer frozen for 2 epochs unless noted."""

import copy
import logging
import warnings

import pytest
import torch
from helpers.processes import START_METHOD
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import Manual, Recorder, SaveRank, Toy, adamw, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from dino_head import DINOProjectionHead
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback

# These tests are about another rule, and most have no TeacherUpdateCallback.
pytestmark = pytest.mark.filterwarnings("ignore:teacher does not follow")

FROZEN_2_OF_3 = [False] * 8 + [True] * 4


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw foreach": lambda parameters: adamw(parameters, foreach=True),
    "adamw fused": lambda parameters: adamw(parameters, fused=True),
    "sgd momentum": sgd,
}


def fit(module, *callbacks, data=None, **options):
    recorder = Recorder()
    torch.manual_seed(0)
    trainer(recorder, *callbacks, **options).fit(module, loader() if data is None else data)
    return recorder


# Frozen bitwise, then trained.


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_bitwise_frozen_then_moving(optimizer, norm_last_layer):
    if norm_last_layer is None:
        module = Toy(OPTIMIZERS[optimizer], norm_last_layer=None)
        module.student["head"].last_layer.weight_v = module.student["head"].last_layer.weight  # for the recorder
    else:
        module = Toy(OPTIMIZERS[optimizer], norm_last_layer=norm_last_layer)
    callback = FreezeLastLayerCallback()
    assert fit(module, callback).moved == FROZEN_2_OF_3
    assert callback.receipt == (
        "student.head.last_layer frozen for 8 optimizer steps, bitwise unchanged on 1 of 1 ranks at step 8, "
        "released at step 8, seen to change at step 9"
    )


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_example_module(optimizer):
    module = tiny_dino(OPTIMIZERS[optimizer])
    callback = FreezeLastLayerCallback()
    assert fit(module, callback, data=view_loader()).moved == FROZEN_2_OF_3
    assert callback.receipt is not None


def test_without_the_callback_the_layer_moves():
    assert fit(Toy()).moved == [True] * 12


def test_zeroed_gradients_would_not_freeze():
    """The reason for cancelling: weight decay alone changes the layer."""

    class Zero(Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.student["head"].last_layer.weight_v.grad.zero_()

    assert fit(Toy(), Zero()).moved == [True] * 12


def test_scale_and_direction_are_both_frozen():
    module = Toy(norm_last_layer=False)
    with torch.no_grad():
        module.student["head"].last_layer.weight_g.fill_(2.0)
    before = copy.deepcopy(module.student["head"].last_layer.state_dict())
    fit(module, FreezeLastLayerCallback(), max_epochs=2)
    after = module.student["head"].last_layer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# Limits.


@pytest.mark.parametrize(
    ("arguments", "frozen_batches"),
    [({"freeze_last_layer": 1}, 4), ({"freeze_last_layer": 3}, 12), ({"steps": 5}, 5), ({"steps": 1}, 1)],
)
def test_a_limit_of_the_callback_overrides_the_head(arguments, frozen_batches):
    module = Toy(freeze_last_layer=2)
    callback = FreezeLastLayerCallback(**arguments)
    assert fit(module, callback).moved == [False] * frozen_batches + [True] * (12 - frozen_batches)
    assert f"frozen for {frozen_batches} optimizer steps" in callback.receipt
    assert module.student["head"].freeze_last_layer == 2  # never written


@pytest.mark.parametrize(
    ("callback", "head"), [({"freeze_last_layer": 0}, 2), ({"steps": 0}, 2), ({}, 0), ({"freeze_last_layer": -1}, 2)]
)
def test_an_explicit_zero_freezes_nothing(callback, head):
    callback = FreezeLastLayerCallback(**callback)
    assert fit(Toy(freeze_last_layer=head), callback).moved == [True] * 12
    assert callback.receipt is None


def test_all_parameters_of_a_named_submodule_are_frozen():
    module = Toy(freeze_last_layer=-1)
    before = copy.deepcopy(module.student["backbone"].state_dict())
    callback = FreezeLastLayerCallback(steps=12, module="student.backbone")
    assert fit(module, callback).moved == [True] * 12
    assert all(torch.equal(module.student["backbone"].state_dict()[key], value) for key, value in before.items())
    assert callback.receipt.startswith("student.backbone frozen for 12 optimizer steps")


def test_another_librarys_last_layer():
    module = Toy()
    module.student["head"] = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16))
    before = module.student["head"][1].weight.clone()
    trainer(FreezeLastLayerCallback(1, module="student.head.1"), max_epochs=1).fit(module, loader())
    assert torch.equal(module.student["head"][1].weight, before)


def test_of_a_named_dino_head_the_last_layer_is_frozen():
    module = Toy(freeze_last_layer=2)
    assert fit(module, FreezeLastLayerCallback(module="student.head")).moved == FROZEN_2_OF_3
    assert module.student["head"].layers[0].weight.grad is not None


def test_each_of_two_heads_has_its_own_limit():
    module = Toy(freeze_last_layer=1)
    module.student["patches"] = DINOProjectionHead(8, 8, 4, 16, batch_norm=False, freeze_last_layer=2)
    module.loss = lambda batch: sum(module.student[name](batch[0]).square().mean() for name in ("head", "patches"))
    callback = FreezeLastLayerCallback()
    assert fit(module, callback).moved == [False] * 4 + [True] * 8
    head, patches = callback.receipt.split("; ")
    assert "student.head.last_layer frozen for 4 optimizer steps" in head
    assert "student.patches.last_layer frozen for 8 optimizer steps" in patches


def test_several_instances_save_states_of_their_own():
    callbacks = [FreezeLastLayerCallback(), FreezeLastLayerCallback(steps=3, module="student.backbone")]
    assert len({callback.state_key for callback in callbacks}) == 2
    assert fit(Toy(), *callbacks).moved == FROZEN_2_OF_3
    assert [callback.receipt.split()[0] for callback in callbacks] == ["student.head.last_layer", "student.backbone"]


# Trainer options.


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_with_a_partial_last_window(accumulate):
    callback = FreezeLastLayerCallback()
    module = Toy()
    moved = fit(module, callback, data=loader(batches=5), accumulate_grad_batches=accumulate).moved
    assert moved[:10] == [False] * 10
    assert any(moved[10:])
    assert f"frozen for {2 * -(-5 // accumulate)} optimizer steps" in callback.receipt


def test_the_clip_norm_excludes_the_frozen_layer():
    """Clipped by norm, a student with huge gradients in its frozen layer steps as it would without the layer."""

    class Scale(Callback):
        factor = 1.0

        def on_after_backward(self, trainer, pl_module):
            layer = pl_module.student["head"].last_layer
            if layer.weight_v.grad is not None:
                layer.weight_v.grad.mul_(self.factor)

    finals = []
    for factor in (1.0, 1e6):
        torch.manual_seed(0)
        module, scale = Toy(sgd), Scale()
        scale.factor = factor
        # Scale comes first, so that the freeze has to cancel the huge gradient.
        trainer(scale, FreezeLastLayerCallback(), max_epochs=2, gradient_clip_val=0.01).fit(module, loader())
        finals.append(module.state_dict())
    assert all(torch.equal(value, finals[1][key]) for key, value in finals[0].items())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm):
    options = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    assert fit(Toy(), FreezeLastLayerCallback(), **options).moved == FROZEN_2_OF_3


def test_bf16_mixed():
    assert fit(Toy(), FreezeLastLayerCallback(), precision="bf16-mixed").moved == FROZEN_2_OF_3


def test_bf16_true():
    schedule = ScheduleCallback("weight_decay", (0.04, 0.4))
    module = Toy()
    assert fit(module, FreezeLastLayerCallback(), schedule, precision="bf16-true").moved == FROZEN_2_OF_3
    assert module.student["head"].last_layer.weight_v.dtype == torch.bfloat16
    assert schedule.receipt.endswith("in 12 of 12 optimizer steps")


def test_manual_backward():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert fit(Manual("lightning"), FreezeLastLayerCallback()).moved == FROZEN_2_OF_3


def test_gradients_of_a_plain_backward_are_cancelled_late_with_one_warning():
    with pytest.warns(UserWarning, match=r"student.head.last_layer were cancelled only right before") as caught:
        assert fit(Manual("torch"), FreezeLastLayerCallback()).moved == FROZEN_2_OF_3
    assert sum("manual_backward" in str(warning.message) for warning in caught) == 1


def test_plain_backward_with_a_raw_optimizer_raises():
    with pytest.raises(
        MisconfigurationException, match=r"student.head.last_layer changed while .* raw torch optimizer"
    ):
        fit(Manual("torch", "torch"), FreezeLastLayerCallback())


def test_manual_backward_with_a_raw_optimizer_works_for_epochs_and_raises_for_steps():
    assert fit(Manual("lightning", "torch"), FreezeLastLayerCallback()).moved == FROZEN_2_OF_3
    with pytest.raises(MisconfigurationException, match="counts optimizer steps, and saw none"):
        fit(Manual("lightning", "torch"), FreezeLastLayerCallback(steps=3))


@pytest.mark.parametrize(
    ("saved", "limit"),
    [({"every_n_epochs": 1}, {}), ({"every_n_train_steps": 2}, {}), ({"every_n_epochs": 1}, {"steps": 6})],
)
def test_resumed_inside_the_freeze(tmp_path, saved, limit):
    """Stopped after 6 (mid-epoch) or 4 (epoch end) batches; the resumed run stays frozen and counts all steps."""
    mid_epoch = "every_n_train_steps" in saved
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saved)
    stop = {"max_steps": 6, "max_epochs": -1} if mid_epoch else {"max_epochs": 1}
    module = Toy()
    first = fit(module, FreezeLastLayerCallback(**limit), checkpoint, enable_checkpointing=True, **stop)
    step = 6 if mid_epoch else 4
    assert first.moved == [False] * step
    callback, recorder = FreezeLastLayerCallback(**limit), Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*resume from a checkpoint that ended before the epoch.*")
        trainer(recorder, callback).fit(Toy(), loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert torch.equal(recorder.weights[0], first.weights[-1])
    frozen = 6 if limit else 8
    assert recorder.moved[: frozen - step] == [False] * (frozen - step)
    assert any(recorder.moved[frozen - step :])
    assert f"frozen for {frozen} optimizer steps" in callback.receipt
    assert f"released at step {frozen}" in callback.receipt


def test_a_run_resumed_after_the_freeze_keeps_the_receipt(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = FreezeLastLayerCallback()
    fit(Toy(), first, checkpoint, enable_checkpointing=True)
    callback = FreezeLastLayerCallback()
    module = Toy()
    trainer(callback, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert callback.receipt == first.receipt is not None


def test_the_receipt_is_in_the_checkpoint_of_the_last_frozen_epoch(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = FreezeLastLayerCallback()
    fit(Toy(), callback, checkpoint, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"][callback.state_key]
    receipt = saved["records"]["student.head.last_layer"]["receipt"]
    assert receipt.endswith("released at step 8")
    assert callback.receipt == f"{receipt}, seen to change at step 9"


def test_the_receipt_is_logged_once(caplog):
    callback = FreezeLastLayerCallback()
    with caplog.at_level(logging.INFO):
        fit(Toy(), callback)
    assert [record.getMessage() for record in caplog.records].count(callback.receipt) == 1


def test_a_second_fit_of_the_same_callback_starts_a_new_record():
    callback = FreezeLastLayerCallback()
    for _ in range(2):
        assert fit(Toy(), callback).moved == FROZEN_2_OF_3
        assert "frozen for 8 optimizer steps" in callback.receipt


@pytest.mark.distributed
def test_two_processes_stay_frozen_and_identical(tmp_path):
    torch.manual_seed(0)
    module = Toy()
    before = module.student["head"].last_layer.weight_v.detach().clone()
    callbacks = [FreezeLastLayerCallback(), SaveRank(tmp_path)]
    for epochs, frozen in ((2, True), (3, False)):
        strategy = DDPStrategy(start_method=START_METHOD, process_group_backend="gloo")
        trainer(*callbacks, strategy=strategy, devices=2, max_epochs=epochs).fit(copy.deepcopy(module), loader())
        ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
        assert all(torch.equal(value, ranks[1][key]) for key, value in ranks[0].items())
        assert torch.equal(ranks[0]["student.head.last_layer.weight_v"], before) is frozen
        receipts = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
        assert "frozen for 4 optimizer steps, bitwise unchanged on 2 of 2 ranks" in receipts[0] == receipts[1]
        assert not torch.equal(ranks[0]["student.head.layers.0.weight"], module.student["head"].layers[0].weight)


# Special cases.


def test_a_skipped_epoch_raises_no_error():
    class SkipFirstEpoch(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 else None

    callback = FreezeLastLayerCallback(1)
    fit(SkipFirstEpoch(), callback)
    assert callback.receipt.startswith("student.head.last_layer frozen for 0 optimizer steps")


def test_data_shorter_than_their_length_end_the_freeze():
    """Lightning then sees no last batch, as with an iterable dataset, several workers and drop_last."""

    class Short:
        def __len__(self):
            return 6

        def __iter__(self):
            yield from loader()

    callback = FreezeLastLayerCallback()
    assert fit(Toy(), callback, data=Short()).moved == FROZEN_2_OF_3
    assert callback.receipt.endswith("released at step 8, seen to change at step 9")


class TwoOptimizers(Manual):
    """One step for the backbone, then one for the head, in each batch."""

    def configure_optimizers(self):
        return [adamw([p for p in part.parameters() if p.requires_grad]) for part in self.student.values()]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize(("steps", "moved"), [(3, [False] + [True] * 11), (4, [False] * 2 + [True] * 10)])
def test_a_limit_in_steps_may_fall_inside_a_batch(steps, moved):
    callback = FreezeLastLayerCallback(steps=steps)
    assert fit(TwoOptimizers("lightning"), callback).moved == moved
    assert f"frozen for {steps} optimizer steps" in callback.receipt
    assert f"released at step {steps}" in callback.receipt


def test_heads_that_share_their_layer_raise_no_error():
    module = Toy(freeze_last_layer=1)
    module.student["other"] = DINOProjectionHead(8, 8, 4, 16, batch_norm=False, freeze_last_layer=1)
    module.student["other"].last_layer.weight_v = module.student["head"].last_layer.weight_v
    module.loss = lambda batch: sum(module.student[name](batch[0]).square().mean() for name in ("head", "other"))
    assert fit(module, FreezeLastLayerCallback()).moved == [False] * 4 + [True] * 8


@pytest.mark.parametrize("limits", [({"steps": 6}, {"freeze_last_layer": 1}), ({"freeze_last_layer": 1}, {"steps": 6})])
def test_instances_that_freeze_the_same_layer_raise_no_error(limits):
    callbacks = [FreezeLastLayerCallback(**limit) for limit in limits]
    assert fit(Toy(), *callbacks).moved == [False] * 6 + [True] * 6
    assert all(callback.receipt for callback in callbacks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at all attributes
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # and makes instances of functions
def test_of_a_named_compiled_head_the_last_layer_is_frozen():
    module = Toy()
    mlp = module.student["head"].layers[0].weight
    before, weight = mlp.detach().clone(), module.student["head"].last_layer.weight_v.detach().clone()
    module.student["head"] = torch.compile(module.student["head"], backend="eager")
    callback = FreezeLastLayerCallback(module="student.head")
    trainer(callback, max_epochs=2).fit(module, loader())
    assert callback.receipt.startswith("student.head.last_layer frozen for 8")
    assert torch.equal(module.student["head"].last_layer.weight_v, weight)
    assert not torch.equal(mlp, before)


def test_a_resumed_run_withdraws_the_receipt_of_a_run_that_ended_inside_the_freeze(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    callback = FreezeLastLayerCallback(1)
    fit(Toy(), callback, checkpoint, enable_checkpointing=True, max_steps=2)
    assert callback.receipt.endswith("at step 2, still frozen when the run ended at step 2")
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(callback.receipt)

    callback = FreezeLastLayerCallback(1)
    trainer(callback, See()).fit(Toy(), loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert seen[0] is None
    assert "bitwise unchanged on 1 of 1 ranks at step 4 (since step 2, where the run was resumed)" in callback.receipt


def test_a_trainer_that_continues_inside_the_freeze_withdraws_the_receipt():
    callback, module, seen = FreezeLastLayerCallback(), Toy(), []

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(callback.receipt)

    run = trainer(callback, See(), max_epochs=1)
    run.fit(module, loader())
    assert callback.receipt.endswith("still frozen when the run ended at step 4")
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    assert seen[:8] == [None] * 8
    assert callback.receipt.endswith("released at step 8, seen to change at step 9")


def test_an_unused_head_under_a_raw_optimizer_raises():
    module = Manual("lightning", "torch", freeze_last_layer=1)
    module.student["head"].forward = lambda x: module.teacher["head"](x) + x.sum()
    with pytest.raises(MisconfigurationException, match="never had a gradient to cancel"):
        fit(module, FreezeLastLayerCallback())


# Errors: each names the module, the cause and the remedy.


class Move(Callback):
    """Writes to the frozen layer, at one optimizer step."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.at:
            with torch.no_grad():
                pl_module.student["head"].last_layer.weight_v[0, 0] += 1e-6


def test_a_change_in_the_first_two_steps_raises_at_once():
    with pytest.raises(MisconfigurationException, match=r"changed while frozen \(seen at optimizer step 2\)"):
        fit(Toy(), Move(at=1), FreezeLastLayerCallback())


@pytest.mark.parametrize("limit", [{}, {"steps": 4}])
def test_a_later_change_raises_at_the_end_of_the_epoch(limit):
    with pytest.raises(MisconfigurationException, match=r"changed while frozen \(seen at optimizer step 4\)"):
        fit(Toy(), Move(at=3), FreezeLastLayerCallback(**limit))


def test_a_change_before_a_run_ends_inside_the_freeze_raises():
    with pytest.raises(MisconfigurationException, match="changed while frozen"):
        fit(Toy(), Move(at=2), FreezeLastLayerCallback(), max_steps=3)


def test_a_head_replaced_while_frozen_raises():
    class Replace(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 1:
                torch.manual_seed(1)
                pl_module.student["head"] = Toy().student["head"]

    with pytest.raises(MisconfigurationException, match="code that replaces the module"):
        fit(Toy(), Replace(), FreezeLastLayerCallback())


def test_a_layer_outside_of_the_loss_raises_at_the_end_of_the_freeze():
    module = Toy()
    module.student["unused"] = DINOProjectionHead(8, 8, 4, 16, freeze_last_layer=1)
    message = r"student.unused.last_layer was frozen for 4 optimizer steps, but never had a gradient to cancel"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, FreezeLastLayerCallback())


def test_a_run_that_ends_inside_a_freeze_without_gradients_raises():
    module = Toy()
    module.student["unused"] = DINOProjectionHead(8, 8, 4, 16, freeze_last_layer=9)
    with pytest.raises(MisconfigurationException, match="never had a gradient to cancel"):
        fit(module, FreezeLastLayerCallback())


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (Toy(freeze_last_layer=-1), {}, r"would freeze nothing: student.head.last_layer has freeze_last_layer=-1"),
        (Toy(), {"module": "student.haed"}, r"Toy has no submodule 'student.haed' .* it has student, teacher"),
        (Toy(), {"module": "student.backbone"}, r"'student.backbone' is a Linear, .* set a limit in the callback"),
        (Toy(), {"freeze_last_layer": 1, "module": "teacher.head"}, r"teacher.head.last_layer has no trainable"),
        (Toy(), {"steps": 1, "module": "teacher.backbone"}, r"teacher.backbone has no trainable parameter"),
    ],
)
def test_a_freeze_that_could_not_take_effect_is_refused(module, callback, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, FreezeLastLayerCallback(**callback))


def test_no_head_is_refused():
    module = Toy()
    module.student["head"] = nn.Linear(8, 16)
    module.teacher = None
    with pytest.raises(
        MisconfigurationException, match="found no DINOProjectionHead in Toy: make the head an attribute"
    ):
        trainer(FreezeLastLayerCallback(1)).fit(module, loader())


def test_a_hidden_last_layer_is_refused():
    """FSDP with flat parameters leaves a last layer without parameters."""
    module = Toy()
    module.student["head"].last_layer.requires_grad_(False)
    with pytest.raises(
        MisconfigurationException, match=r"student.head.last_layer.* no trainable .* use_orig_params=True"
    ):
        fit(module, FreezeLastLayerCallback())


def test_a_parameter_in_no_optimizer_is_refused():
    module = Toy()
    module.configure_optimizers = lambda: adamw(module.student["backbone"].parameters())
    with pytest.raises(MisconfigurationException, match=r"a parameter of student.head.last_layer is in no optimizer"):
        fit(module, FreezeLastLayerCallback())


def test_an_optimizer_of_the_frozen_layer_alone_is_refused_under_a_grad_scaler():
    module = Manual("lightning")
    layer = module.student["head"].last_layer
    others = [p for p in module.student.parameters() if p is not layer.weight_v and p.requires_grad]
    module.configure_optimizers = lambda: [adamw(others), adamw([layer.weight_v])]
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="'No inf checks were recorded'"):
        fit(module, FreezeLastLayerCallback(), plugins=[scaler])


def test_deepspeed_is_refused_by_name():
    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(MisconfigurationException, match="does not work under DeepSpeedStrategy, which keeps gradients"):
        fit(Toy(), FreezeLastLayerCallback(), strategy=DeepSpeedStrategy())


@pytest.mark.distributed
def test_a_static_graph_under_manual_optimization_is_refused():
    strategy = DDPStrategy(start_method=START_METHOD, process_group_backend="gloo", static_graph=True)
    with pytest.raises(ProcessRaisedException, match="static_graph=True under manual"):
        trainer(FreezeLastLayerCallback(), strategy=strategy, devices=2).fit(Manual("lightning"), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_last_layer": 1, "steps": 5}, r"set one limit, got freeze_last_layer=1 .* and steps=5"),
        ({"freeze_last_layer": -2}, "freeze_last_layer must be an integer >= -1"),
        ({"steps": 1.5}, "steps must be an integer >= 0"),
        ({"freeze_last_layer": 1, "module": ""}, "module must name a submodule"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        FreezeLastLayerCallback(**arguments)
