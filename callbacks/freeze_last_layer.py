"""The last layer frozen for the first epochs, and proved to be."""

from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from dino_head._arguments import check_integer
from dino_head.callbacks._access import find_submodule, local_part
from dino_head.callbacks._find import MODULE, Record, Target, check_trainer, find_targets
from dino_head.callbacks._step import AfterOptimizerStep
from dino_head.prototypes import Prototypes, cancel_gradients


class FreezeLastLayerCallback(AfterOptimizerStep):
    """Holds the last layer of DINO heads bitwise still for the first epochs or optimizer steps of a run.

    Without arguments it takes every `DINOProjectionHead` that has a trainable last layer, and each head's own
    `freeze_last_layer`. (The authors freeze it for the first epoch: arXiv:2104.14294, their `--freeze_last_layer`.)

        FreezeLastLayerCallback()                                # as the heads say
        FreezeLastLayerCallback(1)                               # one epoch, whatever the heads say
        FreezeLastLayerCallback(steps=500)                       # 500 optimizer steps
        FreezeLastLayerCallback(2, module="student.backbone")    # any other submodule

    How: gradients are set to None in `on_after_backward`, before they are unscaled and clipped, so that optimizers
    pass the layer by and the clip norm does not count it. `on_before_optimizer_step` is a second net, for a backward
    that Lightning does not see; it warns once.

    Proof: the weights are compared by value, on all processes, after the first two frozen optimizer steps of a fit,
    at the end of each frozen epoch, and when the freeze ends. What it saw is in `receipt`, and in the checkpoint.

    Args:
        freeze_last_layer: epochs to freeze; None: each head's own number; -1 and 0 freeze nothing.
        steps: optimizer steps to freeze, as `trainer.global_step` counts them (with several optimizers under manual
            optimization each one's count). At most one of the two limits.
        module: name of one submodule of the LightningModule. Of a `DINOProjectionHead` the last layer is frozen, of
            any other module all parameters (buffers, such as running statistics, go on).

    Raises:
        ValueError: both limits, or one out of range.
        MisconfigurationException: when training starts, if the freeze could not take effect (nothing found, no limit,
            no trainable parameter, a parameter in no optimizer, a strategy that hides gradients); during training, if
            the layer moved, or if a whole freeze went by without a gradient to cancel.
    """

    def __init__(
        self, freeze_last_layer: int | None = None, *, steps: int | None = None, module: str | None = None
    ) -> None:
        super().__init__()
        if freeze_last_layer is not None and steps is not None:
            raise ValueError(
                f"set one limit, got freeze_last_layer={freeze_last_layer!r} (epochs) and steps={steps!r}: "
                "leave one of them out"
            )
        if freeze_last_layer is not None:
            check_integer("freeze_last_layer", freeze_last_layer, -1, " (epochs; -1 and 0 freeze nothing)")
        if steps is not None:
            check_integer("steps", steps, 0, " (optimizer steps)")
        if module == "":
            raise ValueError("module must name a submodule, got '': leave it out to freeze the heads' last layers")
        self.freeze_last_layer = freeze_last_layer
        self.steps = steps
        self.module = module
        self._targets: list[Target] = []
        self._frozen: list[Target] = []  # those whose freeze has not ended
        self._records: dict[str, Record] = {}
        self._warned = False

    @property
    def receipt(self) -> str | None:
        """What was frozen, for how long and how it was proved, once a freeze or the run has ended; before that None."""
        lines = [record.receipt for record in self._records.values() if record.receipt is not None]
        return "; ".join(lines) if lines else None

    @property
    def state_key(self) -> str:
        """Made of the arguments, so that several of them get along in one Trainer."""
        return self._generate_state_key(freeze_last_layer=self.freeze_last_layer, steps=self.steps, module=self.module)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the record of each freeze."""
        records = {name: asdict(record) for name, record in self._records.items()}
        return {**super().state_dict(), "records": records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the records of a run that goes on."""
        super().load_state_dict(state_dict)
        self._records = {name: Record(**record) for name, record in state_dict["records"].items()}

    # Hooks, in the order in which a run calls them.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self._records = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, refuse what could not be kept, and note the weights that have to stay.

        Here, not earlier: only now have strategy and checkpoint had their say on parameters and epoch.
        """
        has_limit = self.freeze_last_layer is not None or self.steps is not None
        self._targets = find_targets(pl_module, self.module, has_limit)
        self._frozen = []
        for target in self._targets:
            target.record = self._records.setdefault(target.name, Record(since=trainer.global_step))
            target.taken_up_at = trainer.global_step
            if self._is_frozen(target, trainer):
                target.record.receipt = None  # of a run that ended inside the freeze
                target.before = {name: value.clone() for name, value in _values(pl_module, target.name).items()}
                self._frozen.append(target)
            elif target.record.cancelled and target.record.receipt is None:
                self._write_receipt(trainer, target)  # resumed from a checkpoint of the freeze's very end
        if self._frozen:
            check_trainer(trainer, self._frozen)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a freeze whose last epoch ended without a last batch: data may stop short of their announced length."""
        self._release(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let frozen last layers spend nothing on gradients that would be cancelled."""
        if self.steps is None or pl_module.automatic_optimization:  # else the freeze may end inside the batch
            for target in self._frozen:
                if isinstance(target.module, Prototypes):
                    target.module.frozen = self._is_frozen(target, trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cancel. The limit is read at each call: `trainer.current_epoch` is right here also after a resume."""
        for target in self._frozen:
            if self._is_frozen(target, trainer):
                self._cancel(target, trainer)
        if self.steps is not None:
            self._release(trainer, pl_module)  # under manual optimization the limit may fall inside a batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Cancel what a backward without `on_after_backward` left."""
        for target in self._frozen:
            if target.has_gradient() and self._is_frozen(target, trainer):
                self._cancel(target, trainer)
                if not self._warned:
                    self._warned = True
                    rank_zero_warn(
                        f"the gradients of {target.name} were cancelled only right before the optimizer's step, after "
                        "any clipping of your own: call self.manual_backward(loss) instead of loss.backward()"
                    )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Outside of training steps no layer is marked, so that no copy or pickle of one is."""
        self._unmark()
        super().on_train_batch_end(trainer, pl_module, *args)

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the step, compare after the first two, and end a freeze that is limited in steps."""
        for target in self._frozen:
            target.steps_of_this_fit += 1
            if target.steps_of_this_fit <= 2:
                self._compare(trainer, pl_module, target)
        self._release(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and end a freeze whose last epoch this was (and was not cut short, by max_steps for instance)."""
        self._unmark()  # of a batch that was left out
        for target in self._frozen:
            self._compare(trainer, pl_module, target)
        self._release(trainer, pl_module, epochs_ahead=int(trainer.is_last_batch))
        if self.steps:
            self.require_steps(trainer, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare and check also where the run ends before the freeze."""
        for target in self._frozen:
            self._compare(trainer, pl_module, target)
            self._check_cancelled(trainer, target)
            self._write_receipt(trainer, target, "still frozen when the run ended")
        self._unmark()
        self._frozen = []
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no layer marked that an interrupted step has left."""
        self._unmark()
        super().on_exception(trainer, pl_module, exception)

    # What the hooks are made of.

    def _is_frozen(self, target: Target, trainer: Trainer, epochs_ahead: int = 0) -> bool:
        if self.steps is not None:
            return trainer.global_step < self.steps
        limit = self.freeze_last_layer if target.head is None else target.head.freeze_last_layer
        return limit is not None and trainer.current_epoch + epochs_ahead < limit

    def _unmark(self) -> None:
        for target in self._targets:
            if isinstance(target.module, Prototypes):
                target.module.frozen = False

    def _cancel(self, target: Target, trainer: Trainer) -> None:
        if not target.record.cancelled:
            target.record.cancelled = target.has_gradient()
        if target.head is None:
            cancel_gradients(target.parameters)
        else:
            target.head.cancel_last_layer_gradients(trainer.current_epoch)

    def _compare(self, trainer: Trainer, pl_module: LightningModule, target: Target) -> None:
        # By value: a version counter misses fused optimizers. All processes take part, so that all stop together.
        now = _values(pl_module, target.name)
        moved = now.keys() != target.before.keys() or any(
            now[name].shape != before.shape or not torch.equal(now[name], before)
            for name, before in target.before.items()
        )
        if trainer.strategy.reduce_boolean_decision(moved, all=False):
            raise MisconfigurationException(
                f"{target.name} moved while it was frozen (seen at optimizer step {trainer.global_step}). Something "
                "other than the gradients that Lightning sees has written to it: a raw torch optimizer's step under "
                "manual optimization (use self.optimizers() and self.manual_backward), a callback that puts gradients "
                "or weights back, or code that replaces the module"
            )
        target.record.compared_at = trainer.global_step

    def _release(self, trainer: Trainer, pl_module: LightningModule, epochs_ahead: int = 0) -> None:
        for target in [target for target in self._frozen if not self._is_frozen(target, trainer, epochs_ahead)]:
            if target.record.compared_at != trainer.global_step:
                self._compare(trainer, pl_module, target)
            self._check_cancelled(trainer, target)
            self._frozen.remove(target)
            self._write_receipt(trainer, target)
            target.before = {}

    def _check_cancelled(self, trainer: Trainer, target: Target) -> None:
        # A head that shares the layer, or another instance, may have cancelled first, and a process's shard may be
        # empty: one that cancelled is enough.
        mine = {id(parameter) for parameter in target.parameters}
        cancelled = any(
            other.record.cancelled and not mine.isdisjoint(map(id, other.parameters))
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, FreezeLastLayerCallback)
            for other in callback._targets
        )
        cancelled = trainer.strategy.reduce_boolean_decision(cancelled, all=False)
        steps = trainer.global_step - target.record.since
        if not cancelled and (steps > 0 or _has_unseen_steps(trainer)):
            raise MisconfigurationException(
                f"{target.name} was frozen for {steps} optimizer steps, but never had a gradient to "
                "cancel: it is not part of the loss, or was detached or set to requires_grad=False after training "
                "started. Use it in the loss, or take the callback away"
            )

    def _write_receipt(self, trainer: Trainer, target: Target, end: str = "released") -> None:
        record, ranks = target.record, trainer.world_size
        steps = f"{trainer.global_step - record.since} optimizer steps"
        if _has_unseen_steps(trainer):
            steps = "unseen steps"
        # The proof begins anew with the weights that a checkpoint brings, and the receipt claims no more.
        resumed_inside = target.before and target.taken_up_at > record.since
        resumed = f" (since step {target.taken_up_at}, where the run was resumed)" if resumed_inside else ""
        record.receipt = (
            f"{target.name} frozen for {steps}, bitwise unchanged on {ranks} of {ranks} ranks at step "
            f"{record.compared_at}{resumed}, {end} at step {trainer.global_step}"
        )
        rank_zero_info(record.receipt)


def _values(pl_module: LightningModule, name: str) -> dict[str, Tensor]:
    """This process's part of all parameters of the module that now has this name."""
    return {key: local_part(parameter) for key, parameter in find_submodule(pl_module, name, MODULE).named_parameters()}


def _has_unseen_steps(trainer: Trainer) -> bool:
    """Whether batches were trained without a step that Lightning knows of: with a raw optimizer."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.global_step == 0 and batches.started > 0  # type: ignore[attr-defined]
