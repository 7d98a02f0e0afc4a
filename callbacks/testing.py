"""Checks to run on your own LightningModule and data, which detect code that breaks the method.

    def make():  # for each run, returns a new module, its training data, and the callbacks
        module = Mine()
        return module, torch.utils.data.DataLoader(data, batch_size=16), [TeacherUpdateCallback()]

    assert_teacher_follows(make)
    assert_accumulation_invariant(make)
    assert_resume_invariant(make)

Each check trains for a few steps, by default on the CPU (`accelerator="gpu"` and any other argument of the Trainer
change that). It raises an AssertionError that names what differs, by how much, and the usual causes. The module must be
a `lightning.pytorch` one. The training data are anything that `Trainer.fit` accepts, including a LightningDataModule;
for `assert_accumulation_invariant`, they are an iterable of batches.
"""

import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from dino_head._arguments import check_integer
from dino_head.callbacks._after_step import AfterOptimizerStep
from dino_head.callbacks._checks.layout import PAIRS, find_submodule

Make = Callable[[], tuple[LightningModule, Any, Sequence[Callback]]]

__all__ = ["assert_accumulation_invariant", "assert_resume_invariant", "assert_teacher_follows"]


def assert_accumulation_invariant(
    make: Make, *, parts: int = 4, steps: int = 3, rtol: float = 1e-4, atol: float = 1e-6, **trainer_options: Any
) -> None:
    """Check that a batch and its accumulated micro-batches lead to the same weights, teacher and center.

    They differ with batch norm, dropout or random augmentation, which act on each micro-batch separately: check a
    module without them.

    Args:
        make: Function that returns a new module, its training data (here an iterable of batches) and the callbacks.
        parts: Number of micro-batches in a batch, >= 2; must divide its number of samples.
        steps: Number of optimizer steps of each run.
        rtol: Relative tolerance of the comparison.
        atol: Absolute tolerance of the comparison.
        trainer_options: Arguments of the Trainer.

    Raises:
        AssertionError: The runs differ.
        ValueError: The batches cannot be split.
    """
    check_integer("parts", parts, 2)
    states = []
    for number in (1, parts):
        _seed(0)
        module, data, callbacks = make()
        batches = [part for batch in islice(data, steps) for part in _split(batch, number)]
        if not batches:
            raise ValueError("the training data contain no batch: make() must return at least one")
        options = {"max_epochs": 1, "accumulate_grad_batches": number, **trainer_options}
        _trainer(callbacks, **options).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        states.append(module.state_dict())
    hint = (
        "something is updated once a micro-batch instead of once an optimizer step (a teacher or center in "
        "training_step: use TeacherUpdateCallback), is random, or depends on other samples of the batch"
    )
    norms = [name for name, submodule in module.named_modules() if isinstance(submodule, _BatchNorm)]
    if norms:
        hint = (
            f"batch norm ({', '.join(norms[:3])}), which takes its statistics from a micro-batch. Check a module "
            f"without it, in the head as well, DINOProjectionHead(..., batch_norm=False). Otherwise {hint}"
        )
    _assert_equal(states[0], states[1], f"one batch and {parts} accumulated micro-batches", hint, rtol, atol)


def assert_resume_invariant(make: Make, *, mid_epoch: bool = True, **trainer_options: Any) -> None:
    """Check that a resumed run ends bitwise like an uninterrupted one: weights, optimizers, callbacks.

    Args:
        make: Function that returns a new module, its training data (at least two batches) and the callbacks.
        mid_epoch: Whether to resume in the middle of the last epoch as well, for which Lightning needs data that can
            continue from there; False resumes only at the end of an epoch.
        trainer_options: Arguments of the Trainer; two epochs unless they set `max_epochs`.

    Raises:
        AssertionError: The runs differ.
        ValueError: The epochs have only one optimizer step, so they have no middle.
    """
    options = {"max_epochs": 2, **trainer_options}
    with tempfile.TemporaryDirectory() as folder:
        keep_all = {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"}
        every = _Keep(folder, save_on_train_epoch_end=False, **keep_all)  # type: ignore[arg-type]
        ends = _Keep(folder, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True, filename="end-{step}")
        expected = _final_state(make, 0, [every, ends], None, options)
        *_, end, last = [-1, *_steps_of(folder, "end-step=*.ckpt")]
        inside = [step for step in _steps_of(folder, "step=*.ckpt") if end < step < last]
        if end < 0 or (mid_epoch and not inside):
            raise ValueError(
                f"{last} optimizer steps in {options['max_epochs']} epochs leave no middle of an epoch to resume from: "
                "use more batches or epochs, and step optimizers that Lightning knows"
            )
        files = {"at an epoch's end": f"end-step={end}.ckpt"}
        if mid_epoch:
            files["in the middle of an epoch"] = f"step={inside[0]}.ckpt"
        for where, file in files.items():
            # With a different random state, as in a new process.
            resumed = _final_state(make, 1, [], Path(folder) / file, options)
            hint = (
                "state outside of the checkpoint. Random order, augmentation and dropout must follow from (seed, rank, "
                "epoch, batch), as Lightning saves no random state; and the data must begin at the batch where the run "
                "was stopped: see dino_head.derived_seed and dino_head.vision.ResumableLoader"
            )
            _assert_equal(expected, resumed, f"an uninterrupted run and one resumed {where}", hint, 0.0, 0.0)


def assert_teacher_follows(
    make: Make, *, pairs: Sequence[tuple[str, str]] = (("student", "teacher"),), **trainer_options: Any
) -> None:
    """Check that the teacher starts equal to the student and is averaged once after each optimizer step.

    The check needs no callback: it looks for one momentum m in [0, 1] that explains all weights before and after the
    step, teacher <- m teacher + (1 - m) student.

    Args:
        make: Function that returns a new module, its training data and the callbacks.
        pairs: Names of the (student, teacher) submodules.
        trainer_options: Arguments of the Trainer; two micro-batches are accumulated unless they set
            `accumulate_grad_batches`.

    Raises:
        AssertionError: The teacher does not start equal to the student, requires gradients, changes in another way,
            in part or not at all.
    """
    _seed(0)
    module, data, callbacks = make()
    follow = _Follow(pairs)
    accumulate = 2 if module.automatic_optimization else 1
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, **trainer_options}
    try:
        _trainer([*callbacks, follow], **options).fit(module, data)
    except MisconfigurationException as error:
        if "the teacher is only partly updated" in str(error):
            raise AssertionError(str(error)) from None
        raise
    assert follow.updates, "the teacher never changed: add TeacherUpdateCallback() to the Trainer's callbacks"


class _Keep(ModelCheckpoint):
    """A ModelCheckpoint whose state key differs from the user's."""


class _Follow(AfterOptimizerStep):
    """Checks after each batch that the teachers are an average with one momentum."""

    receipt = None

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.pairs, self.updates = pairs, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for student, teacher in self.pairs:
            ours, theirs = (_parameters(find_submodule(pl_module, name, PAIRS)) for name in (student, teacher))
            assert ours.keys() == theirs.keys(), f"{student!r} and {teacher!r} have parameters of other names"
            differ = [name for name in ours if not torch.equal(ours[name], theirs[name])]
            assert not differ, (
                f"{teacher!r} does not start equal to {student!r}: {differ[:3]} differ, use copy.deepcopy"
            )
            required = [
                name for name, p in find_submodule(pl_module, teacher, PAIRS).named_parameters() if p.requires_grad
            ]
            assert not required, f"{teacher!r} requires gradients ({required[:3]}): {teacher}.requires_grad_(False)"
        self._before = self._teachers(pl_module)
        super().on_train_start(trainer, pl_module)
        assert self.teacher_check is not None
        self.teacher_check.wait = 0  # the run may have only two steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = self.steps_taken
        super().on_train_batch_end(trainer, pl_module, *args)
        assert self.steps_taken > steps or torch.equal(self._teachers(pl_module), self._before), (
            f"the teacher changed before the end of batch {trainer.fit_loop.batch_idx}, which took no optimizer step: "
            "update it only in a callback (TeacherUpdateCallback), not in training_step, and not in the module's own "
            "on_train_batch_end, which runs after ModelCheckpoint has saved"
        )

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = self._teachers(pl_module)
        self._check_step(trainer, pl_module, after)
        self._before = after

    def _check_step(self, trainer: Trainer, pl_module: LightningModule, after: Tensor) -> None:
        student = torch.cat([_flat(find_submodule(pl_module, name, PAIRS)) for name, _ in self.pairs])
        way, moved = student - self._before, after - self._before
        share = ((moved @ way) / (way @ way)).item() if way.any() else 0.0  # 1 - m
        assert -1e-6 <= share <= 1 + 1e-6, (
            f"at optimizer step {trainer.global_step} the teacher moved by {share:.4g} times its distance to the "
            "student: a momentum outside of [0, 1], or a teacher that is updated before the optimizer's step"
        )
        rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(self._before.abs(), student.abs())
        of_share = rounding.norm() / way.norm() if way.any() else 0.0  # the largest effect of rounding on `share`
        off = (moved - share * way).abs() - rounding - of_share * way.abs()
        assert (off <= 0).all(), (
            f"after optimizer step {trainer.global_step}, {int((off > 0).sum())} of {off.numel()} weights of the "
            f"teacher differ from an average by one momentum ({1 - share:.6g}): it is updated before the optimizer's "
            "step, more than once, or in part"
        )
        self.updates += bool(moved.any())

    def _teachers(self, pl_module: LightningModule) -> Tensor:
        return torch.cat([_flat(find_submodule(pl_module, name, PAIRS)) for _, name in self.pairs])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a user's augmentation may draw from it
    torch.manual_seed(seed)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _flat(module: nn.Module) -> Tensor:
    """All parameters as one vector in float64."""
    return torch.cat([parameter.double().flatten() for parameter in _parameters(module).values()])


def _trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    def has(kind: type[Callback]) -> bool:
        return any(isinstance(callback, kind) for callback in callbacks)

    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": has(Checkpoint),
        "enable_progress_bar": has(ProgressBar),
        "enable_model_summary": has(ModelSummary),
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def _split(batch: Any, parts: int) -> list[Any]:
    """Split a batch of nested tensors into `parts` batches; each gets all tensors without dimensions."""
    sizes: list[int] = []

    def part(tensor: Tensor, index: int) -> Tensor:
        if not tensor.ndim:
            return tensor
        if len(tensor) % parts:
            raise ValueError(f"a batch of {len(tensor)} samples cannot be split in {parts} equal parts: choose parts=")
        sizes.append(len(tensor))
        return tensor.chunk(parts)[index]

    split = [apply_to_collection(batch, Tensor, part, index=index) for index in range(parts)]
    if not sizes:
        raise ValueError(f"a batch of type {type(batch).__name__} contains no tensor of samples: use tensors")
    return split


def _final_state(
    make: Make, seed: int, savers: list[ModelCheckpoint], ckpt_path: Path | None, options: dict[str, Any]
) -> dict[str, Any]:
    """States at the end of a run, for comparison."""
    _seed(0)
    module, data, callbacks = make()
    _seed(seed)
    trainer = _trainer([*callbacks, *savers], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's warnings about callbacks and loaders: the values decide
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return {
        "module": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "steps": {c.state_key: c.steps_taken for c in callbacks if isinstance(c, AfterOptimizerStep)},
    }


def _steps_of(folder: str, pattern: str) -> list[int]:
    return sorted(int(file.stem.split("=")[1]) for file in Path(folder).glob(pattern))


def _assert_equal(expected: Any, given: Any, which: str, hint: str, rtol: float, atol: float) -> None:
    # Texts, such as the names of parameter groups, as numbers, because assert_close raises an error for them.
    given, expected = (apply_to_collection(side, str, lambda text: list(text.encode())) for side in (given, expected))
    try:
        torch.testing.assert_close(given, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise AssertionError(f"{which} differ at the end. {error}\nUsual causes: {hint}") from None
