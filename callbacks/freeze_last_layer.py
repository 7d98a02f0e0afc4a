"""The last layer frozen for the first epochs, and proved to be."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dino_head._arguments import check_integer
from dino_head.callbacks._step import AfterOptimizerStep
from dino_head.head import DINOProjectionHead
from dino_head.prototypes import cancel_gradients


@dataclass
class _Record:
    """What was seen of one freeze; saved in the checkpoint."""

    steps: int = 0  # optimizer steps taken while frozen
    cancelled: bool = False  # whether a gradient was ever cancelled
    compared_at: int = 0  # global step of the last comparison of values
    receipt: str | None = None


@dataclass
class _Target:
    """One module that the callback freezes."""

    name: str  # of the frozen module
    head: DINOProjectionHead | None  # where the limit is the head's own
    parameters: list[nn.Parameter]
    record: _Record = field(default_factory=_Record)
    before: list[Tensor] = field(default_factory=list)  # this process's values when the freeze was taken up
    steps_of_this_fit: int = 0

    def has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters)


class FreezeLastLayerCallback(AfterOptimizerStep):
    """Holds the last layer of DINO heads bitwise still for the first epochs or optimizer steps of a run.

    Without arguments it takes every `DINOProjectionHead` that has a trainable last layer, and each head's own
    `freeze_last_layer`. (Freezing it for the first epoch helps the start of training: arXiv:2104.14294, appendix.)

        Trainer(callbacks=[FreezeLastLayerCallback()])                            # as the heads say
        Trainer(callbacks=[FreezeLastLayerCallback(1)])                           # one epoch, whatever the heads say
        Trainer(callbacks=[FreezeLastLayerCallback(steps=500)])                   # 500 optimizer steps
        Trainer(callbacks=[FreezeLastLayerCallback(2, module="student.backbone")])  # any other submodule

    How: gradients are set to None in `on_after_backward`, before gradients are unscaled and clipped, so optimizers
    pass the layer by and the clip norm does not count it. `on_before_optimizer_step` is a second net, for backwards
    that Lightning does not see; it warns once.

    Proof: the weights are compared by value, on all processes, after the first two frozen optimizer steps of a fit, at the
    end of each frozen epoch, and when the freeze ends. What it saw is in `receipt`, and in the checkpoint.

    Args:
        freeze_last_layer: epochs to freeze; None: each head's own number; -1 and 0 freeze nothing.
        steps: optimizer steps to freeze, as `trainer.global_step` counts them (with several optimizers under manual
            optimization: each one's). At most one of the two limits.
        module: name of one submodule of the LightningModule. Of a `DINOProjectionHead` the last layer is frozen, any
            other module is frozen whole.

    Raises:
        ValueError: both limits, or one out of range.
        MisconfigurationException: when training starts, if the freeze could not take effect (nothing found, no
            limit, no trainable parameter, a parameter in no optimizer, a strategy that hides gradients); during
            training, if the layer moved, or if a whole freeze went by without a gradient to cancel.
    """

    def __init__(
        self, freeze_last_layer: int | None = None, *, steps: int | None = None, module: str | None = None
    ) -> None:
        super().__init__()
        if freeze_last_layer is not None and steps is not None:
            raise ValueError(f"set one limit, got freeze_last_layer={freeze_last_layer!r} (epochs) and steps={steps!r}")
        if freeze_last_layer is not None:
            check_integer("freeze_last_layer", freeze_last_layer, -1, " (epochs; -1 and 0 freeze nothing)")
        if steps is not None:
            check_integer("steps", steps, 0, " (optimizer steps)")
        self.freeze_last_layer = freeze_last_layer
        self.steps = steps
        self.module = module
        self._frozen: list[_Target] = []
        self._records: dict[str, _Record] = {}
        self._warned = False

    @property
    def receipt(self) -> str | None:
        """What was frozen, for how long and how it was proved, once a freeze has ended; before that None."""
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
        self._records = {name: _Record(**record) for name, record in state_dict["records"].items()}

    # Hooks, in the order in which a step calls them.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, refuse what could not be kept, and note the weights that have to stay.

        Here, not earlier: only now have strategy and checkpoint their final say on parameters and epoch.
        """
        if trainer.global_step == 0:
            self._records = {}
        self._frozen = []
        for target in self._find(pl_module):
            target.record = self._records.setdefault(target.name, _Record())
            if self._is_frozen(target, trainer.current_epoch, trainer.global_step):
                target.before = [_local(parameter).clone() for parameter in target.parameters]
                self._frozen.append(target)
            elif target.record.steps > 0 and target.record.receipt is None:
                self._write_receipt(trainer, target)  # resumed from a checkpoint of the freeze's very end
        if self._frozen:
            _check_trainer(trainer, self._frozen)
        super().on_train_start(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cancel. The limit is read at each call: `trainer.current_epoch` is right here also after a resume."""
        for target in self._frozen:
            if self._is_frozen(target, trainer.current_epoch, trainer.global_step):
                self._cancel(target, trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Cancel what a backward without `on_after_backward` left."""
        for target in self._frozen:
            if target.has_gradient() and self._is_frozen(target, trainer.current_epoch, trainer.global_step):
                self._cancel(target, trainer.current_epoch)
                if not self._warned:
                    self._warned = True
                    rank_zero_warn(
                        f"the gradients of {target.name} were cancelled only right before the optimizer's step, "
                        "after any clipping of your own: call self.manual_backward(loss) instead of loss.backward()"
                    )

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the step, compare after the first two, and end a freeze that is limited in steps."""
        for target in self._frozen:
            target.record.steps += 1
            target.steps_of_this_fit += 1
            if target.steps_of_this_fit <= 2:
                self._compare(trainer, pl_module, target)
        self._release(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and end a freeze whose last epoch this was."""
        for target in self._frozen:
            self._compare(trainer, pl_module, target)
        self._release(trainer, pl_module, trainer.current_epoch + 1)
        if self.steps:
            self.require_steps(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare and check also where the run ends before the freeze."""
        for target in self._frozen:
            self._compare(trainer, pl_module, target)
            self._check_cancelled(trainer, target)
        self._frozen = []

    # What the hooks are made of.

    def _find(self, pl_module: LightningModule) -> list[_Target]:
        heads = [(name, module) for name, module in pl_module.named_modules() if isinstance(module, DINOProjectionHead)]
        if self.module is not None:
            chosen = _submodule(pl_module, self.module)
            if not isinstance(chosen, DINOProjectionHead):
                if self.freeze_last_layer is None and self.steps is None:
                    raise MisconfigurationException(
                        f"{self.module!r} is a {type(chosen).__name__}, which has no freeze_last_layer of its own: "
                        "give the callback a limit, freeze_last_layer=1 (epochs) or steps=500"
                    )
                return _trainable([_Target(self.module, None, list(chosen.parameters()))])
            heads = [(self.module, chosen)]
        if not heads:
            raise MisconfigurationException(
                f"FreezeLastLayerCallback found no DINOProjectionHead in {type(pl_module).__name__}: make the head an "
                'attribute of the module, or name what to freeze, FreezeLastLayerCallback(1, module="head.last_layer")'
            )
        own_limit = self.freeze_last_layer is None and self.steps is None
        targets = _trainable(
            [
                _Target(f"{name}.last_layer", head if own_limit else None, list(head.last_layer.parameters()))
                for name, head in heads
            ]
        )
        if own_limit and all(target.head and target.head.freeze_last_layer == -1 for target in targets):
            raise MisconfigurationException(
                f"FreezeLastLayerCallback would freeze nothing: {', '.join(target.name for target in targets)} has "
                "freeze_last_layer=-1, the head's default: set it on the head, DINOProjectionHead(..., "
                "freeze_last_layer=1), or on the callback (0 says that nothing is to be frozen)"
            )
        return targets

    def _is_frozen(self, target: _Target, epoch: int, global_step: int) -> bool:
        if self.steps is not None:
            return global_step < self.steps
        limit = self.freeze_last_layer if target.head is None else target.head.freeze_last_layer
        return limit is not None and epoch < limit

    def _cancel(self, target: _Target, epoch: int) -> None:
        target.record.cancelled = target.record.cancelled or target.has_gradient()
        if target.head is None:
            cancel_gradients(target.parameters)
        else:
            target.head.cancel_last_layer_gradients(epoch)

    def _compare(self, trainer: Trainer, pl_module: LightningModule, target: _Target) -> None:
        # By value: a version counter misses fused optimizers. All processes take part, so that all stop together.
        now = [parameter for parameter in _submodule(pl_module, target.name).parameters() if parameter.requires_grad]
        moved = len(now) != len(target.before) or not all(map(_equal, now, target.before))
        if trainer.strategy.reduce_boolean_decision(moved, all=False):
            raise MisconfigurationException(
                f"{target.name} moved while it was frozen (seen at optimizer step {trainer.global_step}). Something "
                "other than the gradients that Lightning sees has written to it: a raw torch optimizer's step under "
                "manual optimization (use self.optimizers() and self.manual_backward), a callback that puts gradients "
                "or weights back, or code that replaces the module"
            )
        target.record.compared_at = trainer.global_step

    def _release(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        for target in [target for target in self._frozen if not self._is_frozen(target, epoch, trainer.global_step)]:
            if target.record.compared_at != trainer.global_step:
                self._compare(trainer, pl_module, target)
            self._check_cancelled(trainer, target)
            self._frozen.remove(target)
            self._write_receipt(trainer, target)

    def _check_cancelled(self, trainer: Trainer, target: _Target) -> None:
        # A process's shard may be empty, so one process that cancelled is enough.
        cancelled = trainer.strategy.reduce_boolean_decision(target.record.cancelled, all=False)
        if target.record.steps > 0 and not cancelled:
            raise MisconfigurationException(
                f"{target.name} was frozen for {target.record.steps} optimizer steps, but never had a gradient to cancel: "
                "it is not part of the loss, or was detached or set to requires_grad=False after training started. "
                "Use it in the loss, or take the callback away"
            )

    def _write_receipt(self, trainer: Trainer, target: _Target) -> None:
        record = target.record
        record.receipt = (
            f"{target.name} frozen for {record.steps} optimizer steps, bitwise unchanged on {trainer.world_size} of "
            f"{trainer.world_size} ranks at step {record.compared_at}, released at step {trainer.global_step}"
        )
        rank_zero_info(record.receipt)


def _submodule(pl_module: LightningModule, name: str) -> nn.Module:
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(child for child, _ in pl_module.named_children())
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no submodule {name!r} ({error}); it has {names}: give FreezeLastLayerCallback "
            "a name as named_modules() lists them"
        ) from None


def _trainable(targets: Sequence[_Target]) -> list[_Target]:
    """The targets that can be trained, with the parameters that can; the teacher's heads have none."""
    for target in targets:
        target.parameters = [parameter for parameter in target.parameters if parameter.requires_grad]
    found = [target for target in targets if target.parameters]
    if not found:
        raise MisconfigurationException(
            f"{', '.join(target.name for target in targets)} has no trainable parameter after the strategy's set-up: with "
            "FSDP use fully_shard (ModelParallelStrategy) or use_orig_params=True, which leave the parameters in their "
            "modules; otherwise let them require gradients (the callback does the freezing)"
        )
    return found


def _check_trainer(trainer: Trainer, targets: Sequence[_Target]) -> None:
    """Refuse a trainer under which cancelling gradients would not freeze, or would break something else."""
    strategy = trainer.strategy
    if any("DeepSpeed" in kind.__name__ for kind in type(strategy).__mro__):
        raise MisconfigurationException(
            f"{type(strategy).__name__} keeps gradients outside of parameter.grad, where FreezeLastLayerCallback cannot "
            "cancel them: use DDP or fully_shard (ModelParallelStrategy)"
        )
    if getattr(strategy.model, "static_graph", False) and not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            "FreezeLastLayerCallback does not work with static_graph=True under manual optimization: gradients are "
            "reduced after on_after_backward there and must not be missing. Use static_graph=False or automatic "
            "optimization"
        )
    frozen = {id(parameter): target.name for target in targets for parameter in target.parameters}
    optimized = [
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in trainer.optimizers
    ]
    # Without any, the user steps optimizers of their own, which only the comparison can watch.
    if optimized and not frozen.keys() <= set().union(*optimized):
        name = next(name for key, name in frozen.items() if not any(key in keys for keys in optimized))
        raise MisconfigurationException(
            f"a parameter of {name} is in no optimizer, so that it would never train, also after the freeze: pass all of "
            "the student's parameters to the optimizer in configure_optimizers"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None and any(
        keys <= frozen.keys() for keys in optimized
    ):
        raise MisconfigurationException(
            f"an optimizer holds {', '.join(target.name for target in targets)} alone, and a GradScaler stops with 'No inf "
            "checks were recorded' at an optimizer without gradients: make it a parameter group of the other optimizer"
        )


def _local(parameter: nn.Parameter) -> Tensor:
    """This process's values."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def _equal(parameter: nn.Parameter, before: Tensor) -> bool:
    value = _local(parameter)
    return value.shape == before.shape and torch.equal(value, before)
