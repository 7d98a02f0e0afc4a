"""Every callback reports a teacher that is never or only partly updated."""

import warnings

import pytest
import torch
from helpers.layouts import (
    CopiedStem,
    Distilled,
    FlatNames,
    InDicts,
    Predictor,
    SharedStem,
    TwoAttributes,
    Wrapped,
    backbone,
    batches,
    copied,
)
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)
from dino_head.callbacks.testing import assert_teacher_follows

LABELLED = DataLoader(TensorDataset(torch.randn(12, 8), torch.arange(12) % 2), batch_size=4)
CALLBACKS = {
    "freeze": lambda folder: FreezeLastLayerCallback(1),
    "schedule": lambda folder: ScheduleCallback("weight_decay", (0.04, 0.4)),
    "monitor": lambda folder: CollapseMonitorCallback(),
    "probe": lambda folder: KNNProbeCallback(LABELLED, LABELLED, k=3),
    "report": lambda folder: ReportCallback(folder),
}
PART = (("student.backbone", "teacher.backbone"),)


def fit(module, *callbacks, count=6, **options):
    """The warnings about the teacher, with the number of optimizer steps at which each was given."""
    given = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(*callbacks, **{"max_epochs": 1, **options})
        warnings.showwarning = lambda text, *_: given.append((str(text), run.global_step))
        warnings.filterwarnings("always", message=".*teacher")
        run.fit(module, batches(count))
    return given


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_callback_reports_a_teacher_that_is_never_updated_once(name, tmp_path):
    module = InDicts()
    ((text, step),) = fit(module, CALLBACKS[name](tmp_path), count=12)
    assert step == 4  # three steps after the first that changed the student
    assert text.startswith(
        "teacher does not follow: teacher did not change in the 3 optimizer steps after student first changed. Add "
        "TeacherUpdateCallback() to the Trainer's callbacks"
    )


def test_several_callbacks_report_it_once():
    assert len(fit(InDicts(), FreezeLastLayerCallback(1), CollapseMonitorCallback(), count=8)) == 1


def test_the_step_counts_from_the_first_change_of_the_student():
    class WarmUp(InDicts):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 5))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    ((_, step),) = fit(WarmUp(), CollapseMonitorCallback(), count=12)
    assert step == 9  # rate 0 for steps 1 to 5


@pytest.mark.parametrize(
    ("layout", "pairs", "backbone"),
    [
        (TwoAttributes, '(("student", "teacher"), ("student_head", "teacher_head"),)', "teacher"),
        (
            FlatNames,
            '(("student_backbone", "momentum_backbone"), ("student_head", "momentum_head"),)',
            "momentum_backbone",
        ),
        (Wrapped, '(("networks.online", "networks.target"),)', "networks.target.0"),
    ],
)
def test_the_warning_has_the_arguments_for_other_names(layout, pairs, backbone):
    ((text, _),) = fit(layout(), CollapseMonitorCallback())
    assert f"Add TeacherUpdateCallback(pairs={pairs}) to the Trainer's callbacks" in text
    assert f'KNNProbeCallback and ReportCallback, if you use them, then need module="{backbone}"' in text
    callback = TeacherUpdateCallback(eval(pairs))  # the text of the warning is the remedy
    assert not fit(layout(), callback, KNNProbeCallback(LABELLED, LABELLED, module=backbone, k=3))
    assert callback.receipt.endswith("teacher parts left behind: none")


@pytest.mark.parametrize("layout", [InDicts, SharedStem, CopiedStem, Predictor])
def test_layouts_in_which_all_parts_follow(layout):
    callback = TeacherUpdateCallback()
    assert not fit(layout(), callback)
    assert callback.receipt.endswith("teacher parts left behind: none")


def average(module, momentum=0.9):
    with torch.no_grad():
        for ours, theirs in zip(module.student.parameters(), module.teacher.parameters(), strict=True):
            theirs.mul_(momentum).add_(ours, alpha=1 - momentum)


def in_hook(name, every):
    class Own(InDicts):
        count = 0

        def _average(self, *args, **kwargs):
            if (self.count + (every < 0)) % every == 0:
                average(self)
            self.count += 1

        if name == "training_step":

            def training_step(self, x, batch_idx):
                self._average()
                return super().training_step(x, batch_idx)

        elif name == "optimizer_step":

            def optimizer_step(self, *args, **kwargs):
                super().optimizer_step(*args, **kwargs)
                self._average()

        elif name == "on_train_batch_end":
            on_train_batch_end = _average
        elif name == "on_before_zero_grad":
            on_before_zero_grad = _average
        elif name == "on_train_batch_start":
            on_train_batch_start = _average

    return Own()


@pytest.mark.parametrize("every", [1, 2, 10, -5])  # -5: every 5th, for the first time in the 5th
@pytest.mark.parametrize(
    "hook", ["training_step", "optimizer_step", "on_train_batch_end", "on_before_zero_grad", "on_train_batch_start"]
)
def test_a_module_that_updates_its_teacher_itself_causes_no_warning(hook, every):
    assert not fit(in_hook(hook, every), CollapseMonitorCallback(), count=12)


@pytest.mark.parametrize(
    "update",
    [
        lambda module: module.teacher.load_state_dict(module.student.state_dict()),
        lambda module: setattr(module, "teacher", copied(module.student)),
        lambda module: [
            setattr(theirs, "data", 0.9 * theirs.data + 0.1 * ours.data)
            for ours, theirs in zip(module.student.parameters(), module.teacher.parameters(), strict=True)
        ],
    ],
    ids=["load_state_dict", "a new copy", "new data"],
)
def test_any_way_to_update_the_teacher_counts(update):
    class Own(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            update(pl_module)

    assert not fit(InDicts(), CollapseMonitorCallback(), Own())


def test_a_callback_of_the_user_that_updates_the_teacher_every_fifth_step_causes_no_warning():
    class Own(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step % 5 == 0:
                average(pl_module)

    assert not fit(InDicts(), CollapseMonitorCallback(), Own(), count=12)


def test_code_that_could_update_the_teacher_but_does_not_is_reported_later():
    class Never(InDicts):
        def on_train_batch_end(self, *_):
            if self.global_step > 1000:
                average(self)

    ((_, step),) = fit(Never(), CollapseMonitorCallback(), count=224)
    assert step == 207  # 200 batches, and the next check
    assert len(fit(Never(), CollapseMonitorCallback(), count=8)) == 1  # at the end of a short run


def test_a_fixed_teacher_and_a_teacher_of_another_architecture_cause_no_warning():
    assert not fit(InDicts(), TeacherUpdateCallback(base_momentum=1.0, final_momentum=1.0))
    assert not fit(Distilled(), CollapseMonitorCallback())


def test_a_student_whose_counterpart_is_not_trained_causes_no_warning():
    module = InDicts()
    module.student["backbone"].requires_grad_(False)
    assert not fit(module, TeacherUpdateCallback((("student.head", "teacher.head"),)))


HEAD = (
    r"the loss uses teacher_head, which did not change in the 3 optimizer steps after student_head first changed and "
    r'is in no pair. Name all parts: TeacherUpdateCallback\(pairs=\(\("student", "teacher"\), \("student_head", '
    r'"teacher_head"\),\)\). KNNProbeCallback and ReportCallback, if you use them, then need module="teacher"'
)


def test_a_head_beside_the_pair_raises():
    callback = TeacherUpdateCallback()
    with pytest.raises(MisconfigurationException, match=HEAD):
        fit(TwoAttributes(), callback)
    assert callback.receipt.endswith("teacher parts left behind: teacher_head")


@pytest.mark.parametrize("compiled", ["sides", "sides, fullgraph", "step", "module"])
def test_a_head_beside_the_pair_raises_in_compiled_modules(compiled):
    module = TwoAttributes()
    options = {"backend": "eager", "fullgraph": "fullgraph" in compiled}
    if compiled == "module":
        module = torch.compile(module, **options)
    elif compiled == "step":
        module.training_step = torch.compile(module.training_step, **options)
    else:
        for name in ("student", "teacher", "teacher_head"):
            setattr(module, name, torch.compile(getattr(module, name), **options))
    with pytest.raises(MisconfigurationException, match="the loss uses teacher_head, which did not change"):
        fit(module, TeacherUpdateCallback())


def test_all_parts_that_are_missing_are_named_at_once():
    class Three(TwoAttributes):
        def __init__(self):
            super().__init__()
            self.student_neck = nn.Linear(8, 8)
            self.teacher_neck = copied(self.student_neck)

        def outputs(self, side, x):
            return getattr(self, f"{side}_head")(getattr(self, f"{side}_neck")(getattr(self, side)(x)))

    with pytest.raises(MisconfigurationException, match=r"the loss uses teacher_head, teacher_neck, which"):
        fit(Three(), TeacherUpdateCallback())


def test_part_of_a_module_dict_raises():
    with pytest.raises(MisconfigurationException, match=r'\("student.head", "teacher.head"\)'):
        fit(InDicts(), TeacherUpdateCallback(PART))


def test_own_code_that_updates_a_part_raises():
    class Own(InDicts):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                for ours, theirs in zip(
                    self.student["backbone"].parameters(), self.teacher["backbone"].parameters(), strict=True
                ):
                    theirs.lerp_(ours, 0.1)

    with pytest.raises(MisconfigurationException, match=r"the loss uses teacher\.head, which did not change"):
        fit(Own(), CollapseMonitorCallback())


def test_under_accumulation_and_manual_optimization():
    with pytest.raises(MisconfigurationException, match="the loss uses teacher_head"):
        fit(TwoAttributes(), TeacherUpdateCallback(), count=16, accumulate_grad_batches=3)

    class Raw(TwoAttributes):
        automatic_optimization = False

        def configure_optimizers(self):
            self.raw = super().configure_optimizers()

        def training_step(self, x, batch_idx):
            self.raw.zero_grad()
            super().training_step(x, batch_idx).backward()
            self.raw.step()

    assert len(fit(Raw(), CollapseMonitorCallback())) == 1


def test_a_run_that_is_too_short_is_not_checked():
    callback = TeacherUpdateCallback()
    assert not fit(TwoAttributes(), callback, count=3)
    assert callback.receipt.endswith("teacher parts left behind: not checked")


def test_a_module_without_a_loss_of_ours_is_not_checked():
    class Other(InDicts):
        def __init__(self):
            super().__init__()
            self.loss = nn.MSELoss()

    callback = TeacherUpdateCallback(PART)
    assert not fit(Other(), callback)
    assert callback.receipt.endswith("teacher parts left behind: not checked")


def test_training_is_bitwise_the_same_when_a_step_is_followed():
    states = []
    for callbacks in ((), (CollapseMonitorCallback(),)):
        torch.manual_seed(0)
        module = InDicts()
        fit(module, *callbacks, count=8)
        states.append(module.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_training_step_is_restored_after_an_error():
    class Stops(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if "training_step" in vars(pl_module):
                raise KeyError("stop")

    module = InDicts()
    with pytest.raises(KeyError):
        fit(module, CollapseMonitorCallback(), Stops())
    assert "training_step" not in vars(module)


def test_assert_teacher_follows_finds_a_part_that_does_not_in_two_steps():
    with pytest.raises(AssertionError, match="the loss uses teacher_head, which did not change"):
        assert_teacher_follows(lambda: (TwoAttributes(), batches(4), [TeacherUpdateCallback()]))
    pairs = (("student", "teacher"), ("student_head", "teacher_head"))
    assert_teacher_follows(lambda: (TwoAttributes(), batches(4), [TeacherUpdateCallback(pairs)]), pairs=pairs)
    assert_teacher_follows(lambda: (SharedStem(), batches(4), [TeacherUpdateCallback()]))


def test_unknown_names_raise_with_the_arguments_for_this_module():
    with pytest.raises(
        MisconfigurationException,
        match=r'no submodule .student.* use TeacherUpdateCallback\(pairs=\(\("student_backbone", "momentum_backb',
    ):
        fit(FlatNames(), TeacherUpdateCallback())


class Whitened(InDicts):
    """The teacher's outputs pass a fixed layer, whose shape is that of the student's predictor."""

    def __init__(self):
        super().__init__()
        self.student["predictor"] = nn.Linear(16, 16)
        self.teacher_rotation = copied(nn.Linear(16, 16))

    def outputs(self, side, x):
        out = super().outputs(side, x)
        return self.student["predictor"](out) if side == "student" else self.teacher_rotation(out)


class Deeper(InDicts):
    """The teacher has a deeper backbone, and a head that follows."""

    def __init__(self):
        super().__init__()
        self.teacher["backbone"] = copied(nn.Sequential(*backbone(), *backbone()))


@pytest.mark.parametrize(
    ("layout", "pairs"), [(Whitened, (("student", "teacher"),)), (Deeper, (("student.head", "teacher.head"),))]
)
def test_parts_that_only_have_the_same_shape_are_no_pair(layout, pairs):
    assert not fit(layout(), TeacherUpdateCallback(pairs))
    assert not fit(Deeper(), CollapseMonitorCallback())


class TwoTeachers(InDicts):
    """A second loss, with a teacher that is fixed on purpose."""

    def __init__(self):
        super().__init__()
        self.fixed_teacher, self.other_loss = copied(self.teacher), DINOLoss(16)

    def training_step(self, x, batch_idx):
        views = torch.stack([x, x.flip(0)])
        with torch.no_grad():
            teacher = self.fixed_teacher["head"](self.fixed_teacher["backbone"](views))
        return super().training_step(x, batch_idx) + self.other_loss(teacher, self.outputs("student", views))


def test_each_loss_has_a_teacher_of_its_own():
    assert not fit(TwoTeachers(), TeacherUpdateCallback())


def test_a_teacher_that_requires_gradients_is_found():
    class Requires(InDicts):
        def __init__(self):
            super().__init__()
            self.teacher.requires_grad_(True)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.student.parameters(), lr=0.01)

    assert len(fit(Requires(), CollapseMonitorCallback())) == 1


def test_a_teacher_that_is_set_once_when_training_starts_is_found():
    class SetOnce(InDicts):
        def on_train_start(self):
            average(self)

    ((_, step),) = fit(SetOnce(), CollapseMonitorCallback(), count=8)
    assert step == 8  # its code might do so again


def test_steps_inside_the_training_step_do_not_mix_the_sides():
    class Manual(TwoAttributes):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, x, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(super().training_step(x, batch_idx))
                self.optimizers().step()

    with pytest.raises(MisconfigurationException, match="the loss uses teacher_head"):
        fit(Manual(), TeacherUpdateCallback(total_steps=100))


def sparse_products(x):
    return torch.sparse.mm(torch.eye(len(x)).to_sparse(), x)


def conditional(x):
    return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


@pytest.mark.parametrize("operation", [sparse_products, conditional])
def test_operations_that_cannot_be_followed_are_computed(operation):
    class Unusual(TwoAttributes):
        def training_step(self, x, batch_idx):
            operation(x.detach())
            return super().training_step(x, batch_idx)

    with pytest.raises(MisconfigurationException, match="the loss uses teacher_head"):
        fit(Unusual(), TeacherUpdateCallback())


@pytest.mark.parametrize(
    "add",
    [
        lambda module: setattr(module, "lazy", nn.LazyLinear(4)),
        lambda module: module.register_parameter("wide", nn.Parameter(torch.ones(2, dtype=torch.complex128))),
        lambda module: module.register_parameter("sparse", nn.Parameter(torch.eye(3).to_sparse())),
        lambda module: module.register_parameter("counts", nn.Parameter(torch.ones(3).char(), requires_grad=False)),
        lambda module: setattr(module, "none", nn.Identity()),
    ],
    ids=["lazy", "complex128", "sparse", "int8", "none"],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_parameters(add):
    class Extended(InDicts):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.student.parameters(), lr=0.01)

    module = Extended()
    add(module)
    assert not fit(module, CollapseMonitorCallback(), TeacherUpdateCallback())
    assert len(fit(module, CollapseMonitorCallback())) == 1


def test_after_training_a_callback_does_not_hold_the_module():
    module, callback = InDicts(), CollapseMonitorCallback()
    fit(module, callback)
    assert callback.teacher_check is None
