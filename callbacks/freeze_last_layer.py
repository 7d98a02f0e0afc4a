"""A callback that freezes the last layer for the first epochs, and checks that it did not change."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from dino_head._arguments import check_integer
from dino_head.callbacks._after_step import AfterOptimizerStep, refuse_deepspeed
from dino_head.callbacks._checks.layout import find_submodule, local_part, read
from dino_head.head import DINOProjectionHead
from dino_head.prototypes import cancel_gradients

MODULE = 'module="student.head"'  # the argument, as errors show it
STEPS_AFTER_RELEASE = 3


class FreezeLastLayerCallback(AfterOptimizerStep):
    """Keeps the last layer of DINO heads bitwise unchanged for the first epochs or optimizer steps of a run.

    Without arguments it freezes the last layer of every `DINOProjectionHead` that can be trained, for the epochs of the
    head's own `freeze_last_layer`. (The authors freeze it for one epoch: arXiv:2104.14294, their
    `--freeze_last_layer`.)

        FreezeLastLayerCallback()                                # the limits of the heads
        FreezeLastLayerCallback(1)                               # one epoch, whatever the limits of the heads
        FreezeLastLayerCallback(steps=500)                       # 500 optimizer steps
        FreezeLastLayerCallback(2, module="student.backbone")    # any other submodule

    Gradients are set to None in `on_after_backward`, before they are unscaled and clipped, so optimizers skip the layer
    and the clip norm does not include it. `on_before_optimizer_step` does the same after a backward that Lightning does
    not see, and warns once.

    The weights are compared by value, on all processes, after the first two frozen optimizer steps of a fit, at the end
    of each frozen epoch, when the freeze ends, and after that until they change, for at most three steps. The result is
    in `receipt`, and in the checkpoint.

    Args:
        freeze_last_layer: Number of epochs to freeze; None for each head's own limit; -1 and 0 freeze nothing.
        steps: Number of optimizer steps to freeze, >= 0, as `trainer.global_step` counts them (with several optimizers
            under manual optimization, the steps of all). Set at most one of the two limits.
        module: Name of one submodule of the LightningModule. For a `DINOProjectionHead`, the last layer is frozen; for
            any other module, all parameters are (buffers, such as running statistics, still change).

    Raises:
        ValueError: Both limits are set, or one is out of range.
        MisconfigurationException: When training starts, if the freeze could not take effect: no module found, no limit,
            no trainable parameter, a parameter in no optimizer, or a strategy that hides gradients. During training,
            if the layer changed, or if a whole freeze passed without a gradient to cancel.
    """

    def __init__(
        self, freeze_last_layer: int | None = None, *, steps: int | None = None, module: str | None = None
    ) -> None:
        super().__init__()
        if freeze_last_layer is not None and steps is not None:
            raise ValueError(
                f"set one limit, got freeze_last_layer={freeze_last_layer!r} (epochs) and steps={steps!r}: omit one"
            )
        if freeze_last_layer is not None:
            check_integer("freeze_last_layer", freeze_last_layer, -1, " (epochs; -1 and 0 freeze nothing)")
        if steps is not None:
            check_integer("steps", steps, 0, " (optimizer steps)")
        if module == "":
            raise ValueError("module must name a submodule, got '': omit it to freeze the heads' last layers")
        self.freeze_last_layer = freeze_last_layer
        self.steps = steps
        self.module = module
        self._freezes: list[_Freeze] = []
        self._running: list[_Freeze] = []  # the freezes that have not ended
        self._released: list[_Freeze] = []  # ended freezes whose weights have not changed since
        self._records: dict[str, _Record] = {}
        self._warned = False

    @property
    def receipt(self) -> str | None:
        """The frozen layers, for how long, and the last check; None before a freeze or the run has ended."""
        lines = [record.receipt for record in self._records.values() if record.receipt is not None]
        return "; ".join(lines) if lines else None

    @property
    def state_key(self) -> str:
        """Built from the arguments, so that a Trainer can have several of these callbacks."""
        return self._generate_state_key(freeze_last_layer=self.freeze_last_layer, steps=self.steps, module=self.module)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the record of each freeze."""
        records = {name: asdict(record) for name, record in self._records.items()}
        return {**super().state_dict(), "records": records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the records of a resumed run."""
        super().load_state_dict(state_dict)
        self._records = {name: _Record(**record) for name, record in state_dict["records"].items()}
        for freeze in self._freezes:  # within a run, as after the learning rate finder
            freeze.record = self._records.setdefault(freeze.name, freeze.record)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self._records = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, raise an error if they cannot be frozen, and copy their weights.

        Not earlier, because the strategy and the checkpoint may change parameters and epoch.
        """
        has_limit = self.freeze_last_layer is not None or self.steps is not None
        self._freezes = _find_freezes(pl_module, self.module, has_limit)
        self._running, self._released = [], []
        for freeze in self._freezes:
            freeze.record = self._records.setdefault(freeze.name, _Record(since=trainer.global_step))
            freeze.copied_at = trainer.global_step
            if self._is_frozen(freeze, trainer):
                freeze.record.receipt = None  # from a run that ended inside the freeze
                freeze.before = {name: value.clone() for name, value in _values(pl_module, freeze.name).items()}
                self._running.append(freeze)
            elif freeze.record.cancelled and freeze.record.receipt is None:
                self._write_receipt(trainer, freeze)  # resumed from a checkpoint of the freeze's last step
        if self._running:
            _check_trainer(trainer, self._running)
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a freeze whose last epoch had no last batch, because data may be shorter than their reported length."""
        self._end_freezes(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cancel gradients. Each call reads the limit, as `trainer.current_epoch` is correct after a resume too."""
        super().on_after_backward(trainer, pl_module)
        for freeze in self._running:
            if self._is_frozen(freeze, trainer):
                self._cancel(freeze, trainer)
        if self.steps is not None:
            self._end_freezes(trainer, pl_module)  # under manual optimization the limit may fall inside a batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Cancel gradients of a backward that did not call `on_after_backward`."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        for freeze in self._running:
            if freeze.has_gradient() and self._is_frozen(freeze, trainer):
                self._cancel(freeze, trainer)
                if not self._warned:
                    self._warned = True
                    rank_zero_warn(
                        f"the gradients of {freeze.name} were cancelled only right before the optimizer's step, after "
                        "any clipping of your own: call self.manual_backward(loss) instead of loss.backward()"
                    )

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights after the first two steps and after the release, and end a freeze limited in steps."""
        for freeze in self._running:
            freeze.steps_of_this_fit += 1
        self._compare(trainer, pl_module, [freeze for freeze in self._running if freeze.steps_of_this_fit <= 2])
        self._watch_released(trainer, pl_module)
        self._end_freezes(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights, and end a freeze after its last epoch (unless, say, max_steps cut the epoch short)."""
        self._compare(trainer, pl_module, self._running)
        self._end_freezes(trainer, pl_module, epochs_ahead=int(trainer.is_last_batch))
        if self.steps:
            self.require_steps(trainer, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights, and write the receipts, if the run ends before the freeze."""
        self._compare(trainer, pl_module, self._running)
        for freeze in self._running:
            self._check_cancelled(trainer, freeze)
            self._write_receipt(trainer, freeze, "still frozen when the run ended")
        self._released, self._running = [*self._released, *self._running], []
        for freeze in list(self._released):
            self._finish(freeze)
        super().on_train_end(trainer, pl_module)

    def _is_frozen(self, freeze: "_Freeze", trainer: Trainer, epochs_ahead: int = 0) -> bool:
        if self.steps is not None:
            return trainer.global_step < self.steps
        limit = self.freeze_last_layer if freeze.head is None else freeze.head.freeze_last_layer
        return limit is not None and trainer.current_epoch + epochs_ahead < limit

    def _cancel(self, freeze: "_Freeze", trainer: Trainer) -> None:
        if not freeze.record.cancelled:
            freeze.record.cancelled = freeze.has_gradient()
        if freeze.head is None:
            cancel_gradients(freeze.parameters)
        else:
            freeze.head.cancel_last_layer_gradients(trainer.current_epoch)

    def _compare(self, trainer: Trainer, pl_module: LightningModule, freezes: Sequence["_Freeze"]) -> None:
        for freeze in freezes:
            freeze.record.compared_at = trainer.global_step
        changed = _changed(pl_module, freezes)
        if changed:
            raise MisconfigurationException(
                f"{_names(changed)} changed while frozen (seen at optimizer step {trainer.global_step}). Something "
                "other than the gradients that Lightning sees has changed the weights: a raw torch optimizer's step "
                "under manual optimization (use self.optimizers() and self.manual_backward), a callback that "
                "restores gradients or weights, or code that replaces the module"
            )

    def _watch_released(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the weights change again, in the first steps after the freeze."""
        changed = _changed(pl_module, self._released)
        for freeze in list(self._released):
            freeze.steps_since_release += 1
            if freeze in changed or freeze.steps_since_release == STEPS_AFTER_RELEASE:
                seen = f"seen to change at step {trainer.global_step}"
                missed = f"unchanged in the {STEPS_AFTER_RELEASE} steps after"
                freeze.record.receipt = f"{freeze.record.receipt}, {seen if freeze in changed else missed}"
                self._finish(freeze)

    def _finish(self, freeze: "_Freeze") -> None:
        """Print the receipt, and discard the copy of the weights."""
        self._released.remove(freeze)
        freeze.before = {}
        rank_zero_info(freeze.record.receipt)

    def _end_freezes(self, trainer: Trainer, pl_module: LightningModule, epochs_ahead: int = 0) -> None:
        ended = [freeze for freeze in self._running if not self._is_frozen(freeze, trainer, epochs_ahead)]
        self._compare(trainer, pl_module, [one for one in ended if one.record.compared_at != trainer.global_step])
        for freeze in ended:
            self._check_cancelled(trainer, freeze)
            self._running.remove(freeze)
            self._released.append(freeze)
            self._write_receipt(trainer, freeze)

    def _check_cancelled(self, trainer: Trainer, freeze: "_Freeze") -> None:
        # A head that shares the layer, or another instance, may have cancelled first, and the shard of a process may
        # be empty: it is enough if one of them cancelled.
        mine = {id(parameter) for parameter in freeze.parameters}
        cancelled = any(
            other.record.cancelled and not mine.isdisjoint(map(id, other.parameters))
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, FreezeLastLayerCallback)
            for other in callback._freezes
        )
        cancelled = trainer.strategy.reduce_boolean_decision(cancelled, all=False)
        steps = trainer.global_step - freeze.record.since
        if not cancelled and (steps > 0 or _has_unseen_steps(trainer)):
            raise MisconfigurationException(
                f"{freeze.name} was frozen for {steps} optimizer steps, but never had a gradient to cancel: it is not "
                "part of the loss, or was detached or set to requires_grad=False after training started. Use it in "
                "the loss, or remove the callback"
            )

    def _write_receipt(self, trainer: Trainer, freeze: "_Freeze", end: str = "released") -> None:
        record, ranks = freeze.record, trainer.world_size
        steps = f"{trainer.global_step - record.since} optimizer steps"
        if _has_unseen_steps(trainer):
            steps = "unseen steps"
        # After a resume, the weights are compared with those of the checkpoint.
        resumed_inside = freeze.before and freeze.copied_at > record.since
        resumed = f" (since step {freeze.copied_at}, where the run was resumed)" if resumed_inside else ""
        record.receipt = (
            f"{freeze.name} frozen for {steps}, bitwise unchanged on {ranks} of {ranks} ranks at step "
            f"{record.compared_at}{resumed}, {end} at step {trainer.global_step}"
        )


@dataclass
class _Record:
    """What was observed in one freeze; saved in the checkpoint."""

    since: int = 0  # global step at which it began
    cancelled: bool = False  # whether there was ever a gradient to cancel
    compared_at: int = 0  # global step of the last comparison of values
    receipt: str | None = None


@dataclass(eq=False)
class _Freeze:
    """One module that is frozen for a while."""

    name: str
    head: DINOProjectionHead | None  # if the limit is the head's own
    parameters: list[nn.Parameter]  # the trainable ones
    record: _Record = field(default_factory=_Record)
    before: dict[str, Tensor] = field(default_factory=dict)  # this process's values when this fit began
    copied_at: int = 0  # global step of those values
    steps_of_this_fit: int = 0
    steps_since_release: int = 0

    def has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters)


def _find_freezes(pl_module: LightningModule, name: str | None, has_limit: bool) -> list[_Freeze]:
    """The last layers of all heads, or the one named module; `has_limit`: whether the callback sets a limit."""
    heads = [(path, found) for path, found in pl_module.named_modules() if isinstance(found, DINOProjectionHead)]
    if name is not None:
        chosen = find_submodule(pl_module, name, MODULE)
        chosen = getattr(chosen, "_orig_mod", chosen)  # of torch.compile
        if not isinstance(chosen, DINOProjectionHead):
            if not has_limit:
                raise MisconfigurationException(
                    f"{name!r} is a {type(chosen).__name__}, which has no freeze_last_layer of its own: set a limit in "
                    "the callback, freeze_last_layer=1 (epochs) or steps=500"
                )
            return _trainable([(name, chosen, None)])
        heads = [(name, chosen)]
    if not heads:
        raise MisconfigurationException(
            f"FreezeLastLayerCallback found no DINOProjectionHead in {type(pl_module).__name__}: make the head an "
            'attribute of the module, or name a module to freeze, FreezeLastLayerCallback(1, module="head.last_layer")'
        )
    freezes = _trainable([(f"{path}.last_layer", head.last_layer, None if has_limit else head) for path, head in heads])
    if not has_limit and all(freeze.head and freeze.head.freeze_last_layer == -1 for freeze in freezes):
        raise MisconfigurationException(
            f"FreezeLastLayerCallback would freeze nothing: {_names(freezes)} has freeze_last_layer=-1, the head's "
            "default: set it on the head, DINOProjectionHead(..., freeze_last_layer=1), or on the callback "
            "(0 freezes nothing without this error)"
        )
    return freezes


def _trainable(modules: Sequence[tuple[str, nn.Module, DINOProjectionHead | None]]) -> list[_Freeze]:
    """Freezes of the modules that have trainable parameters; a teacher's head has none."""
    freezes = [
        _Freeze(name, head, [parameter for parameter in module.parameters() if parameter.requires_grad])
        for name, module, head in modules
    ]
    found = [freeze for freeze in freezes if freeze.parameters]
    if not found:
        raise MisconfigurationException(
            f"{_names(freezes)} has no trainable parameter after the strategy's set-up: with FSDP use fully_shard "
            "(ModelParallelStrategy) or use_orig_params=True, which keep the parameters in their modules; otherwise "
            "let them require gradients (the callback does the freezing)"
        )
    return found


def _check_trainer(trainer: Trainer, freezes: Sequence[_Freeze]) -> None:
    """Raise an error if cancelling gradients would not freeze under this Trainer, or would break something else."""
    reason = f"keeps gradients outside of parameter.grad, so that those of {_names(freezes)} cannot be cancelled"
    refuse_deepspeed(trainer, "FreezeLastLayerCallback", reason)
    if getattr(trainer.strategy.model, "static_graph", False) and not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            f"{_names(freezes)} cannot be frozen with static_graph=True under manual optimization, where gradients are "
            "reduced after on_after_backward and must not be missing: use static_graph=False or automatic optimization"
        )
    frozen = {id(parameter): freeze.name for freeze in freezes for parameter in freeze.parameters}
    optimized = [
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in trainer.optimizers
    ]
    # Without any optimizer, users step raw ones, and only the comparison of values can detect them.
    if optimized and not frozen.keys() <= set().union(*optimized):
        name = next(name for key, name in frozen.items() if not any(key in keys for keys in optimized))
        raise MisconfigurationException(
            f"a parameter of {name} is in no optimizer, though it requires a gradient, and would never train: if it is "
            "a teacher's, use teacher.requires_grad_(False); if it is the student's, pass all of its parameters to the "
            "optimizer in configure_optimizers"
        )
    has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
    if has_scaler and any(keys <= frozen.keys() for keys in optimized):
        raise MisconfigurationException(
            f"an optimizer has no parameters but those of {_names(freezes)}, and a GradScaler stops with 'No inf "
            "checks were recorded' at an optimizer without gradients: make them a parameter group of another optimizer"
        )


def _names(freezes: Sequence[_Freeze]) -> str:
    return ", ".join(freeze.name for freeze in freezes)


def _values(pl_module: LightningModule, name: str) -> dict[str, Tensor]:
    """This process's part of all parameters of the module that currently has this name."""
    return {key: local_part(parameter) for key, parameter in find_submodule(pl_module, name, MODULE).named_parameters()}


def _changed(pl_module: LightningModule, freezes: Sequence[_Freeze]) -> list[_Freeze]:
    """Freezes whose weights differ from those at the start of the fit, on any process; one transfer from the device."""
    # By value, because version counters miss fused optimizers.
    flags = []
    for freeze in freezes:
        now = _values(pl_module, freeze.name)
        is_same = now.keys() == freeze.before.keys() and all(
            now[name].shape == before.shape for name, before in freeze.before.items()
        )
        different = [(now[name] != before).any() for name, before in freeze.before.items()] if is_same else []
        device = next(iter(now.values())).device
        flags.append(torch.stack(different).any() if different else torch.tensor(not is_same, device=device))
    changed = read(torch.stack(flags)) if flags else []
    return [freeze for freeze, is_changed in zip(freezes, changed, strict=True) if is_changed]


def _has_unseen_steps(trainer: Trainer) -> bool:
    """Whether batches were trained without a step that Lightning can see, with a raw optimizer."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.global_step == 0 and batches.started > 0  # type: ignore[attr-defined]
