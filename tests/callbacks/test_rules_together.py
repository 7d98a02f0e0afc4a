"""All of DINO's rules at once, on the example module and on a toy with the same loss, under the Trainer's options."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers.tiny_dino import crops, tiny_dino, view_loader
from helpers.toy_training import Toy, loader, rules, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint

from dino_head import DINOLoss
from dino_head.callbacks import ScheduleCallback, TeacherUpdateCallback
from dino_head.callbacks.testing import (
    assert_accumulation_invariant,
    assert_resume_invariant,
    assert_teacher_follows,
)


class ToyDINO(Toy):
    """A module apart from the example: its own backbone, DINO's loss on logits of noisy copies."""

    def __init__(self, make_optimizer=None, **head):
        super().__init__(*(() if make_optimizer is None else (make_optimizer,)), **head)
        self.dino = DINOLoss(16, warmup_teacher_temp_epochs=2)

    def loss(self, batch):
        views = torch.stack([batch[0], batch[0] + 0.1, batch[0] - 0.1])  # (3, B, 8)
        teacher, student = (side["head"](side["backbone"](views)) for side in (self.teacher, self.student))
        return self.dino(teacher[:2], student, self.current_epoch)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.04)


MODULES = {
    "toy": (lambda **options: ToyDINO(sgd, **options), loader),
    "example": (lambda **options: tiny_dino(sgd, warmup_epochs=0, **options), view_loader),
}


@pytest.fixture(params=list(MODULES))
def case(request):
    """A function that makes the same module each time, and one that makes the data."""
    make, data = MODULES[request.param]

    def module(**options):
        torch.manual_seed(0)
        return make(**options)

    return module, data


def center_owner(module):
    (loss,) = [loss for loss in module.modules() if isinstance(loss, DINOLoss)]
    return loss


def center(module):
    return center_owner(module).center


def close(ours, theirs, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=rtol, atol=atol)


def equal(ours, theirs):
    close(ours, theirs, rtol=0, atol=0)


def run(module, data, *callbacks, **options):
    trainer(*(callbacks or rules()), **options).fit(module, data)
    return module


def test_the_rules_change_all_weights(case):
    """So the comparisons below compare runs in which everything has changed."""
    make, data = case
    start, end = make(), run(make(), data())
    for name, value in end.state_dict().items():
        if not name.endswith("weight_g"):
            assert not torch.equal(value, start.state_dict()[name]), name
    layer = end.student["head"].last_layer.weight_v
    assert not torch.equal(layer, end.teacher["head"].last_layer.weight_v)


def test_the_order_of_the_callbacks_does_not_matter(case):
    make, data = case
    callbacks = lambda: [*rules(), ScheduleCallback("TeacherUpdateCallback.momentum", (0.7, 1.0))]  # noqa: E731
    expected = run(make(), data(), *callbacks(), max_epochs=2)
    for order in itertools.permutations(range(4)):
        equal(run(make(), data(), *[callbacks()[i] for i in order], max_epochs=2), expected)


# Accumulation.


@pytest.mark.parametrize("optimizer_steps", [3, 2.5])
def test_accumulated_micro_batches_equal_one_batch(case, optimizer_steps):
    """Four quarters equal a whole; Lightning divides a partial window by 4, as if its loss were scaled by n / 4."""
    make, data = case

    class Scaled(make().__class__):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss / 2 if batch_idx == 2 and optimizer_steps == 2.5 else loss

    whole = make()
    whole.__class__ = Scaled
    dataset = data(batches=10 if optimizer_steps == 2.5 else 12, batch_size=2).dataset
    in_parts = run(make(), torch.utils.data.DataLoader(dataset, 2), accumulate_grad_batches=4)
    run(whole, torch.utils.data.DataLoader(dataset, 8))
    close(in_parts, whole)


def test_the_center_is_updated_once_a_step_and_without_the_callback_in_each_forward(case):
    make, data = case
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(center(pl_module).clone())

    for callbacks in (rules(), []):
        seen.clear()
        run(make(), data(), *callbacks, See(), accumulate_grad_batches=2, max_epochs=1)
        moved = [bool((a != b).any()) for a, b in itertools.pairwise([torch.zeros_like(seen[0]), *seen])]
        assert moved == ([False, True, False, True] if callbacks else [True] * 4)


def test_a_call_between_micro_batches_does_not_mix_with_their_window(case):
    class Call(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            copy_of_state = copy.deepcopy(center(pl_module))
            center_owner(pl_module)(torch.full((2, 4, 16), 9.0), torch.randn(2, 4, 16))
            center(pl_module).copy_(copy_of_state)  # undo the effect of the call itself

    make, data = case
    called = run(make(), data(), *rules(), Call(), accumulate_grad_batches=2)
    equal(called, run(make(), data(), accumulate_grad_batches=2))


def test_a_center_that_the_user_defers_stays_deferred(case):
    make, data = case
    module = make()
    center_owner(module).defer_center_update = True
    run(module, data())
    assert center_owner(module).defer_center_update


def test_after_training_each_forward_updates_the_center_again(case):
    make, data = case
    module = run(make(), data())
    (loss,) = [loss for loss in module.modules() if isinstance(loss, DINOLoss)]
    before = loss.center.clone()
    loss(torch.randn(2, 4, 16), torch.randn(2, 4, 16))
    assert not torch.equal(loss.center, before)
    assert not loss._forward_hooks


# Modes.


def test_validation_the_sanity_check_test_and_predict_change_nothing(case):
    make, data = case

    class WithEvaluation(make().__class__):
        def validation_step(self, batch, batch_idx):
            self.log("checked", self.any_loss(batch))

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self.any_loss(batch)

        def any_loss(self, batch):
            if isinstance(self, Toy):
                return self.loss(batch)
            views = crops(self.images(batch))
            return self.loss(self.outputs(self.teacher, views[:2]), self.outputs(self.student, views))

    with_evaluation = make()
    with_evaluation.__class__ = WithEvaluation
    options = {"val_check_interval": 1, "num_sanity_val_steps": 2}
    callbacks = rules()
    fitted = trainer(*callbacks, **options)
    fitted.fit(with_evaluation, data(), data())
    assert fitted.callback_metrics["checked"] > 0
    equal(with_evaluation, run(make(), data()))
    state = [callback.state_dict() for callback in callbacks]
    before = copy.deepcopy(with_evaluation.state_dict())
    fitted.validate(with_evaluation, data(), verbose=False)
    fitted.test(with_evaluation, data(), verbose=False)
    assert len(fitted.predict(with_evaluation, data())) == 4
    torch.testing.assert_close(with_evaluation.state_dict(), before, rtol=0, atol=0)
    assert [callback.state_dict() for callback in callbacks] == state


# Precision.


def scaler_plugin(**options):
    """Mixed precision with float16 and a GradScaler, on the CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **options))


@pytest.fixture(params=["bf16-mixed", "scaler"])
def precision(request):
    if request.param == "scaler":
        return {"plugins": [scaler_plugin(init_scale=2.0**8)]}
    return {"precision": request.param}


def larger(module):
    """A narrow head's output is tiny (0.02 a layer), so its gradients overflow in float16, unlike a wide head's."""
    with torch.no_grad():
        for side in (module.student, module.teacher):
            for parameter in side["head"].layers.parameters():
                parameter.mul_(20)
    return module


def test_the_rules_hold_in_low_precision(case, precision):
    """Accumulation within the rounding of the precision: 8 (bf16) or 11 bits of each product."""
    make, data = case

    def ordered():
        return larger(make()), data(), rules()

    assert_teacher_follows(ordered, **precision)
    assert_resume_invariant(ordered, mid_epoch=False, **precision)
    assert_accumulation_invariant(ordered, rtol=0.05, atol=0.05, **precision)
    callbacks = rules()
    module = run(larger(make()), data(), *callbacks, **precision)
    assert callbacks[0].receipt.startswith("student.head.last_layer frozen for 4 optimizer steps, bitwise unchanged")
    assert center(module).dtype == torch.float32
    assert not torch.equal(center(module), center(run(larger(make()), data())))  # the precision is on


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_updates_nothing(fused):
    """A large scale overflows the first gradients; the scaler skips steps and halves the scale until they fit."""
    module = larger(ToyDINO(lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=fused)))
    seen, callbacks = [], rules()

    class See(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(copy.deepcopy(pl_module.state_dict()))

    start = copy.deepcopy(module.state_dict())
    plugin = scaler_plugin(init_scale=2.0**19, growth_interval=1000)
    run(module, loader(), *callbacks, See(), plugins=[plugin])
    moved = [
        {key.split(".")[0] for key in now if not torch.equal(now[key], before[key])}
        for before, now in itertools.pairwise([start, *seen])
    ]
    together = {"student", "teacher", "dino"}
    assert all(parts in (set(), together) for parts in moved)
    assert moved[0] == set()
    steps = moved.count(together)
    assert 2 <= steps < 12
    assert callbacks[1].steps_taken == callbacks[2].steps_taken == steps


def test_an_overflow_in_the_frozen_layer_skips_no_step():
    class Overflow(Callback):
        def on_after_backward(self, trainer, pl_module):
            gradient = pl_module.student["head"].last_layer.weight_v.grad
            if gradient is not None:
                gradient.fill_(math.inf)

    callbacks = rules()
    plugin = scaler_plugin(init_scale=2.0**8)
    run(larger(ToyDINO()), loader(), Overflow(), *callbacks, plugins=[plugin], max_epochs=1)
    assert callbacks[1].steps_taken == 4
    assert plugin.scaler.get_scale() == 2.0**8  # never halved
    run(larger(ToyDINO()), loader(), Overflow(), rules()[1], plugins=[plugin], max_epochs=1)
    assert plugin.scaler.get_scale() < 2.0**8  # without the freeze it is


def overflow_in_step(step, side=None, of_weights=False):
    """A callback that puts a NaN into the images of a batch, or into one side's output or weights."""

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == step:
                if side is None:
                    batch[0][0] = math.nan
                elif of_weights:
                    with torch.no_grad():
                        getattr(pl_module, side)["backbone"].weight[0, 0] = math.nan
                else:
                    getattr(pl_module, side)["backbone"].register_forward_hook(lambda *args: args[2] * math.nan)

    return Break()


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ({"side": None}, "outputs of teacher and student are not finite while their weights are: images or augment"),
        ({"side": "student", "of_weights": True}, "weights of the student contain NaN or inf, so an earlier step was"),
        ({"side": "teacher", "of_weights": True}, "weights of the teacher contain NaN or inf"),
        ({"side": "student"}, "outputs of the student are not finite while its weights and the other side are"),
        ({"side": "teacher"}, "outputs of the teacher are not finite"),
    ],
)
def test_a_loss_that_is_not_finite_raises_before_any_update(broken, cause, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(FloatingPointError, match=rf"the loss is nan in epoch 1, at optimizer step 6: the {cause}"):
        run(ToyDINO(), loader(), *rules(), overflow_in_step(6, **broken), save, enable_checkpointing=True)
    last = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert not (tmp_path / "step=7.ckpt").exists()


@pytest.mark.parametrize("interruption", ["nan", "inside a window"])
def test_an_interrupted_step_leaves_nothing_for_the_next_run_of_the_module(interruption, case):
    """The sums for the center are dropped, so the next run equals a run of a new module."""

    class Interrupt(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                raise RuntimeError("interrupted")

    make, data = case
    module = make()
    start = copy.deepcopy(module.state_dict())
    breaker = overflow_in_step(1) if interruption == "nan" else Interrupt()
    with pytest.raises((RuntimeError, FloatingPointError)):
        run(module, data(), *rules(), breaker, accumulate_grad_batches=2)
    module.load_state_dict(start)
    equal(run(module, data()), run(make(), data()))


def test_copies_made_while_training_are_plain_modules(case):
    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copy = pickle.loads(pickle.dumps(center_owner(copy.deepcopy(pl_module))))

    make, data = case
    keep = Copy()
    run(make(), data(), *rules(), keep)
    before = keep.copy.center.clone()
    keep.copy(torch.randn(2, 4, 16), torch.randn(2, 4, 16))
    assert not torch.equal(keep.copy.center, before)


def test_a_center_that_is_not_finite_is_named(case):
    make, data = case
    module = make()
    center(module).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the center contains NaN or inf"):
        run(module, data())


def test_logits_that_overflow_by_the_temperature_alone_are_named():
    module = ToyDINO()
    module.loss = lambda batch: module.dino(1e38 * torch.ones(2, 4, 16), torch.randn(2, 4, 16, requires_grad=True))
    with pytest.raises(FloatingPointError, match="both sides are finite: logits over temperature overflow"):
        run(module, loader(), TeacherUpdateCallback())


# Compiled, and recomputed.


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at all attributes
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # and makes instances of functions
@pytest.mark.parametrize("sides", [["student"], ["student", "teacher"]])
def test_compiled_backbones(sides, case):
    make, data = case
    compiled = make()
    for side in sides:
        network = getattr(compiled, side)
        network["backbone"] = torch.compile(network["backbone"], backend="aot_eager")
    plain = run(make(), data())
    compiled = run(compiled, data()).state_dict()
    compiled = {key.replace("_orig_mod.", ""): value for key, value in compiled.items()}
    torch.testing.assert_close(compiled, dict(plain.state_dict()), rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_in_the_backbone(case):
    class Recomputed(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.calls = network, 0

        def forward(self, x):
            return checkpoint(self.forward_now, x, use_reentrant=False)

        def forward_now(self, x):
            self.calls += 1
            return self.network(x)

    make, data = case
    module = make()
    for side in (module.student, module.teacher):
        side["backbone"] = Recomputed(side["backbone"])
    plain = run(make(), data())
    run(module, data())
    assert module.student["backbone"].calls == 2 * module.teacher["backbone"].calls * (
        2 if make().__class__ is not ToyDINO else 1
    )
    recomputed = {key.replace(".network", ""): value for key, value in module.state_dict().items()}
    torch.testing.assert_close(recomputed, dict(plain.state_dict()), rtol=0, atol=0)


def test_sync_batch_norm_in_one_process():
    """Converted as by `sync_batchnorm=True` under DDP; with more than one process it needs a GPU."""
    modules = []
    for convert in (lambda module: module, nn.SyncBatchNorm.convert_sync_batchnorm):
        torch.manual_seed(0)
        module = convert(ToyDINO(sgd, batch_norm=True))
        modules.append(run(module, loader()))
    assert any(isinstance(submodule, nn.SyncBatchNorm) for submodule in modules[1].modules())
    close(modules[1], modules[0])


@pytest.mark.filterwarnings("ignore:.training_step. returned")
def test_a_nan_that_the_module_skips_stops_the_run_before_it_reaches_the_center():
    class Skips(type(tiny_dino())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.isfinite() else None

    class NaNs(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                batch[0].fill_(torch.nan)

    module = tiny_dino(warmup_epochs=0)
    module.__class__ = Skips
    with pytest.raises(FloatingPointError, match="at optimizer step 2"):
        trainer(NaNs(), TeacherUpdateCallback()).fit(module, view_loader(6))
    assert module.loss.center.isfinite().all()
