"""Checks that you run against your own LightningModule and data, to learn what breaks the method.

    def make():  # anew for each run: the module, its training data, and the callbacks
        module = Mine()
        return module, torch.utils.data.DataLoader(data, batch_size=16), [TeacherUpdateCallback()]

    assert_teacher_follows(make)
    assert_accumulation_invariant(make)
    assert_resume_invariant(make)

Each trains for a few steps on the CPU unless told otherwise (`accelerator="gpu"` and any other argument of the
Trainer), and raises an AssertionError that says what differs, by how much, and what usually causes it. The module is a
`lightning.pytorch` one; the training data may be whatever `Trainer.fit` takes, a LightningDataModule as well, but an
iterable of batches for `assert_accumulation_invariant`.
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
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from dino_head._arguments import check_integer
from dino_head.callbacks._access import find_submodule
from dino_head.callbacks._pairs import PAIRS
from dino_head.callbacks._step import AfterOptimizerStep

Make = Callable[[], tuple[LightningModule, Any, Sequence[Callback]]]

__all__ = ["assert_accumulation_invariant", "assert_resume_invariant", "assert_teacher_follows"]


def assert_accumulation_invariant(
    make: Make, *, parts: int = 4, steps: int = 3, rtol: float = 1e-4, atol: float = 1e-6, **trainer_options: Any
) -> None:
    """A batch in `parts` micro-batches that are accumulated leads to the same weights, teacher and center.

    It cannot hold with batch norm, dropout or random augmentation, which see the micro-batches one by one: leave them
    out of the module that `make` gives.

    Args:
        make: the module, its training data (here an iterable of batches) and the callbacks, anew at each call.
        parts: micro-batches of a batch; its number of samples must be a multiple.
        steps: optimizer steps of each run.
        rtol: relative tolerance.
        atol: absolute tolerance.
        trainer_options: of the Trainer.

    Raises:
        AssertionError: the runs differ.
        ValueError: batches that cannot be split.
    """
    check_integer("parts", parts, 2)
    states = []
    for number in (1, parts):
        _seed(0)
        module, data, callbacks = make()
        batches = [part for batch in islice(data, steps) for part in _split(batch, number)]
        if not batches:
            raise ValueError("the training data hold no batch: give at least one")
        options = {"max_epochs": 1, "accumulate_grad_batches": number, **trainer_options}
        _trainer(callbacks, **options).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        states.append(module.state_dict())
    hint = (
        "something moves once a micro-batch instead of once an optimizer step (a teacher or center that is updated in "
        "training_step: use TeacherUpdateCallback), is random, or sees other samples of the batch"
    )
    norms = [name for name, submodule in module.named_modules() if isinstance(submodule, _BatchNorm)]
    if norms:
        hint = (
            f"batch norm ({', '.join(norms[:3])}), whose statistics are those of a micro-batch. It cannot hold with "
            f"it: check a module without, also in the head, DINOProjectionHead(..., batch_norm=False). Else: {hint}"
        )
    _assert_equal(states[0], states[1], f"one batch and {parts} accumulated micro-batches", hint, rtol, atol)


def assert_resume_invariant(make: Make, *, epochs: int = 2, mid_epoch: bool = True, **trainer_options: Any) -> None:
    """A run that was stopped and resumed ends bitwise like the uninterrupted one: weights, optimizers, callbacks.

    Args:
        make: the module, its training data and the callbacks, anew at each call.
        epochs: of each run; the data are to have at least two batches.
        mid_epoch: whether to resume in the middle of the last epoch as well, for which Lightning needs data that can
            go on from there; else after an epoch alone.
        trainer_options: of the Trainer.

    Raises:
        AssertionError: the runs differ.
        ValueError: an epoch of one optimizer step, which has no middle.
    """
    check_integer("epochs", epochs, 2)
    with tempfile.TemporaryDirectory() as folder:
        keep_all = {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"}
        every = _Keep(folder, save_on_train_epoch_end=False, **keep_all)  # type: ignore[arg-type]
        ends = _Keep(folder, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True, filename="end-{step}")
        expected = _final_state(make, 0, epochs, [every, ends], None, trainer_options)
        *_, end, last = [-1, *_steps_of(folder, "end-step=*.ckpt")]
        inside = [step for step in _steps_of(folder, "step=*.ckpt") if end < step < last]
        if end < 0 or (mid_epoch and not inside):
            raise ValueError(
                f"{last} optimizer steps in {epochs} epochs leave no middle of an epoch to resume from: give more "
                "batches, and step optimizers that Lightning knows"
            )
        files = {"at an epoch's end": f"end-step={end}.ckpt"}
        if mid_epoch:
            files["in the middle of an epoch"] = f"step={inside[0]}.ckpt"
        for where, file in files.items():
            # From another random state, which is what a new process would begin with.
            resumed = _final_state(make, 1, epochs, [], Path(folder) / file, trainer_options)
            hint = (
                "state outside of the checkpoint. Random order, augmentation and dropout have to follow from (seed, "
                "rank, epoch, batch), as Lightning saves no random state; and the data have to begin at the batch "
                "where the run was stopped: see derived_seed and ResumableLoader in the project's examples/data.py"
            )
            _assert_equal(expected, resumed, f"an uninterrupted run and one resumed {where}", hint, 0.0, 0.0)


def assert_teacher_follows(
    make: Make, *, pairs: Sequence[tuple[str, str]] = (("student", "teacher"),), **trainer_options: Any
) -> None:
    """The teacher begins as the student and is moved once after each optimizer step, all of it by one momentum.

    That there is such a momentum in [0, 1] is found from the weights before and after the step, whoever moves them:
    teacher <- m teacher + (1 - m) student.

    Args:
        make: the module, its training data and the callbacks, anew at each call.
        pairs: names of the (student, teacher) submodules.
        trainer_options: of the Trainer; two micro-batches are accumulated unless they say otherwise.

    Raises:
        AssertionError: the teacher does not begin as the student, requires gradients, moves otherwise or not at all.
    """
    _seed(0)
    module, data, callbacks = make()
    follow = _Follow(pairs)
    accumulate = 2 if module.automatic_optimization else 1
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, **trainer_options}
    _trainer([*callbacks, follow], **options).fit(module, data)
    assert follow.moves, "the teacher never moved: add TeacherUpdateCallback() to the Trainer's callbacks"


class _Keep(ModelCheckpoint):
    """Apart from those that the user has."""


class _Follow(AfterOptimizerStep):
    """Compares the teachers after each batch with what one momentum for all would have made of them."""

    receipt = None

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.pairs, self.moves = pairs, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for student, teacher in self.pairs:
            ours, theirs = (_parameters(find_submodule(pl_module, name, PAIRS)) for name in (student, teacher))
            assert ours.keys() == theirs.keys(), f"{student!r} and {teacher!r} have parameters of other names"
            differ = [name for name in ours if not torch.equal(ours[name], theirs[name])]
            assert not differ, f"{teacher!r} does not begin as {student!r}: {differ[:3]} differ, use copy.deepcopy"
            required = [
                name for name, p in find_submodule(pl_module, teacher, PAIRS).named_parameters() if p.requires_grad
            ]
            assert not required, f"{teacher!r} requires gradients ({required[:3]}): {teacher}.requires_grad_(False)"
        self._before = self._teachers(pl_module)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = self.steps_taken
        super().on_train_batch_end(trainer, pl_module, *args)
        assert self.steps_taken > steps or torch.equal(self._teachers(pl_module), self._before), (
            f"the teacher moved before the end of batch {trainer.fit_loop.batch_idx}, which took no optimizer step: "
            "move it in a callback alone (TeacherUpdateCallback), not in training_step, and not in the module's own "
            "on_train_batch_end, which comes after ModelCheckpoint has saved"
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
            f"at optimizer step {trainer.global_step} the teacher moved by {share:.4g} times its way to the student: "
            "a momentum outside of [0, 1], or a teacher that is moved before the optimizer's step"
        )
        rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(self._before.abs(), student.abs())
        of_share = rounding.norm() / way.norm() if way.any() else 0.0  # the most that rounding may change it by
        off = (moved - share * way).abs() - rounding - of_share * way.abs()
        assert (off <= 0).all(), (
            f"at optimizer step {trainer.global_step} {int((off > 0).sum())} of {off.numel()} weights of the teacher "
            f"are not where one momentum ({1 - share:.6g}) would bring them: it is moved before the optimizer's step, "
            "more than once, or in part"
        )
        self.moves += bool(moved.any())

    def _teachers(self, pl_module: LightningModule) -> Tensor:
        return torch.cat([_flat(find_submodule(pl_module, name, PAIRS)) for _, name in self.pairs])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what a user's augmentation may draw from
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
    """A batch of tensors in any nesting -> `parts` of it; what has no samples goes to each part."""
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
        raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor of samples: give batches of tensors")
    return split


def _final_state(
    make: Make, seed: int, epochs: int, savers: list[ModelCheckpoint], ckpt_path: Path | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What is to be equal at the end of a run."""
    _seed(0)
    module, data, callbacks = make()
    _seed(seed)
    trainer = _trainer([*callbacks, *savers], max_epochs=epochs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about callbacks and loaders: here the values decide
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
    try:
        torch.testing.assert_close(given, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise AssertionError(f"{which} differ at the end. {error}\nWhat usually causes it: {hint}") from None
