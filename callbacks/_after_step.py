"""Base classes of callbacks that act once after each real optimizer step or follow a schedule over the run."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from dino_head._arguments import check_integer
from dino_head.callbacks._checks import Checked


class AfterOptimizerStep(Checked):
    """Calls `after_optimizer_step` once for each batch in which an optimizer stepped, and saves the count.

    A post-hook of the optimizers records a step, and `on_train_batch_end` acts on it. So batches inside an
    accumulation window and steps that a GradScaler skips do not count, and steps of raw optimizers do.
    (`trainer.global_step` counts skipped steps and no raw optimizers; `on_before_zero_grad` is one step late and misses
    the last one.) The hooks of callbacks run before ModelCheckpoint's, so a checkpoint contains the result of its step.

    It cannot detect steps in which the optimizer itself does nothing, or optimizers that Lightning does not know.
    """

    def __init__(self) -> None:
        self.steps_taken = 0
        self._has_count = False  # whether a checkpoint or an earlier fit of this Trainer set `steps_taken`
        self._is_pending = False  # an optimizer stepped, and `after_optimizer_step` has not been called yet
        self._step_hooks: list[Any] = []

    @property
    def receipt(self) -> str | None:
        """One line about what was observed; None before there is anything to report."""
        raise NotImplementedError

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on a step, which `steps_taken` already includes."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._has_count = self._is_pending = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add hooks to the optimizers, and continue from the saved count or start a new one."""
        super().on_train_start(trainer, pl_module)
        # In the middle of an epoch, Lightning restores a loader while it sets the data up, and silently skips this if
        # the data were set up before.
        if trainer.fit_loop.restarting and any(getattr(trainer.fit_loop, "_combined_loader_states_to_load", ())):
            raise MisconfigurationException(
                "the state of the data loader was not restored from the checkpoint, which would change the order of "
                "the batches: something used the training data earlier, often trainer.estimated_stepping_batches in "
                "configure_optimizers. Read it in the LambdaLR's function, after step 0"
            )
        if not self._has_count:  # a new run, or a callback that was added to a run in progress
            self.steps_taken, self._has_count = trainer.global_step, True
        for optimizer in trainer.optimizers:
            self._step_hooks.append(optimizer.register_step_post_hook(self._note_step))
        # A checkpoint may have been written between an optimizer's step and `after_optimizer_step`.
        self._catch_up(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Act, if an optimizer stepped in this batch."""
        self._catch_up(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks."""
        super().on_train_end(trainer, pl_module)
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        super().on_exception(trainer, pl_module, exception)
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and the receipt so far."""
        return {"steps_taken": self.steps_taken, "is_pending": self._is_pending, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the count of a resumed run."""
        self.steps_taken, self._is_pending = state_dict["steps_taken"], state_dict["is_pending"]
        self._has_count = True

    def require_steps(self, trainer: Trainer, seen: int) -> None:
        """Raise an error at the end of an epoch without any detected optimizer step."""
        if seen == 0 and trainer.global_step == 0 and not trainer.should_stop:
            raise MisconfigurationException(
                f"{type(self).__name__} counts optimizer steps, and saw none in a whole epoch: under manual "
                "optimization, step the optimizers that self.optimizers() returns; Lightning does not see the steps "
                "of a raw torch optimizer"
            )

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A GradScaler also calls fused optimizers for a step that they have to skip, which it marks by `found_inf`.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._is_pending = True

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_pending:
            self.steps_taken += 1
            self.after_optimizer_step(trainer, pl_module)
            self._is_pending = False

    def _unhook(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []


class AfterScheduledStep(AfterOptimizerStep):
    """Follows a schedule over all optimizer steps of a run; its length is fixed at the start of the run and saved.

    A run that is resumed with another length would silently follow another schedule from there on; this raises an
    error unless `total_steps` sets the length.

    Args:
        total_steps: Number of optimizer steps of the whole schedule, >= 1; None for the length of the run, from the
            Trainer.
    """

    def __init__(self, total_steps: int | None) -> None:
        super().__init__()
        if total_steps is not None:
            check_integer("total_steps", total_steps, 1, " (optimizer steps of the whole schedule)")
            total_steps = int(total_steps)  # NumPy integers could not be loaded from a checkpoint
        self.total_steps = total_steps
        self._horizon: int | None = None  # number of steps of the current schedule
        self._epoch = -1  # in which the length was compared

    @property
    def needs_horizon(self) -> bool:
        """Whether the schedule depends on the length of the run."""
        return True

    def progress(self) -> str:
        """Text with the steps taken and the steps of the schedule."""
        if not self.needs_horizon or self._horizon is None:
            return f"{self.steps_taken} optimizer steps"
        if self.steps_taken > self._horizon:
            return f"{self.steps_taken} optimizer steps, of a schedule of {self._horizon}"
        return f"{self.steps_taken} of {self._horizon} optimizer steps"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self._horizon = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the length of the schedule, or compare it with the length at the start of the run."""
        if self.needs_horizon:
            horizon = self.total_steps or self._length(trainer)
            if self._horizon not in (None, horizon) and self.total_steps is None:
                raise MisconfigurationException(
                    f"{type(self).__name__} follows a schedule of {self._horizon} optimizer steps, but this run has "
                    f"{horizon}, which would change the rest of the schedule. Keep max_epochs, max_steps, batch size, "
                    f"accumulation and number of processes, or choose a length: total_steps={self._horizon} keeps the "
                    f"schedule that the run began with, total_steps={horizon} switches to the schedule of a run of "
                    "this length (a LambdaLR of yours needs the same choice)"
                )
            self._horizon = horizon
        self._epoch = -1
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise an error if the number of batches or their accumulation has changed since the start of the run.

        It runs at the first batch of each epoch, after all callbacks that may change them.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.current_epoch == self._epoch:
            return
        self._epoch = trainer.current_epoch
        if self.needs_horizon and self.total_steps is None and self._length(trainer) != self._horizon:
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule of {self._horizon} optimizer steps, but with the batches "
                f"and accumulation of epoch {trainer.current_epoch} the run has {self._length(trainer)}: fix the "
                "length with max_steps in the Trainer, or with total_steps in the callback"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the receipt."""
        super().on_train_end(trainer, pl_module)
        rank_zero_info(self.receipt)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the length of the schedule."""
        return {**super().state_dict(), "horizon": self._horizon}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the count and the schedule of a resumed run."""
        super().load_state_dict(state_dict)
        self._horizon = state_dict["horizon"]

    def _length(self, trainer: Trainer) -> int:
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):  # negative for data without a length
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule over the whole run, and the length of this run is unknown: "
                "set max_epochs or max_steps in the Trainer, for data without a length max_steps or "
                f"limit_train_batches, or {type(self).__name__}(..., total_steps=100_000)"
            )
        epochs = trainer.max_epochs
        if epochs is not None and epochs > 1 and _adds_an_epoch(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule over the whole run, but StochasticWeightAveraging adds an "
                "epoch without training, to update batch norm: set total_steps to the number of optimizer steps "
                f"without this epoch, {type(self).__name__}(..., total_steps="
                f"{int(steps * (epochs - 1) / epochs)})"
            )
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule over the whole run, and under manual optimization the "
                "Trainer does not know the number of optimizer steps: set total_steps, the number of batches in which "
                "an optimizer steps"
            )
        return int(steps)


def _adds_an_epoch(trainer: Trainer) -> bool:
    """Whether StochasticWeightAveraging makes the run longer, which it does for modules with batch norm."""
    kinds = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}  # type: ignore[attr-defined]
    has_norms = any(isinstance(module, _BatchNorm) for module in trainer.lightning_module.modules())
    return "StochasticWeightAveraging" in kinds and has_norms


def refuse_deepspeed(trainer: Trainer, callback: str, reason: str) -> None:
    """Raise an error under any DeepSpeed strategy."""
    strategy = trainer.strategy
    if any("DeepSpeed" in kind.__name__ for kind in type(strategy).__mro__):
        raise MisconfigurationException(
            f"{callback} does not work under {type(strategy).__name__}, which {reason}: use DDP or fully_shard "
            "(ModelParallelStrategy)"
        )
