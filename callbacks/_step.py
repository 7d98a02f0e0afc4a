"""The hook that Lightning lacks: after each real optimizer step, once."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class AfterOptimizerStep(Callback):
    """Calls `after_optimizer_step` once for each batch in which an optimizer stepped, and saves the count.

    PyTorch's post-hook of the optimizers notes a step, and `on_train_batch_end` acts on it. So batches inside an
    accumulation window and steps that a GradScaler skips do not count, and raw optimizers do. (`trainer.global_step`
    counts skipped steps and no raw optimizers; `on_before_zero_grad` would lag a step and lose the last one.) A
    callback's hook runs before ModelCheckpoint's, so a checkpoint holds what the step led to.

    What cannot be seen: a step that does nothing of its own accord, and optimizers that Lightning does not know.
    """

    def __init__(self) -> None:
        self.steps_taken = 0
        self._has_count = False  # from a checkpoint, or from an earlier fit of the same trainer
        self._is_pending = False  # an optimizer stepped, and what follows from it has not been done
        self._step_hooks: list[Any] = []

    @property
    def receipt(self) -> str | None:
        """One line that says what was kept; None before there is anything to say."""
        raise NotImplementedError

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the step is counted in `steps_taken`."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._has_count = self._is_pending = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizers, and go on from the saved count or start one."""
        # In the middle of an epoch Lightning restores a loader while it sets the data up, and says nothing if that was
        # done before.
        if trainer.fit_loop.restarting and any(getattr(trainer.fit_loop, "_combined_loader_states_to_load", ())):
            raise MisconfigurationException(
                "the state of the data loader was not restored from the checkpoint, so that the order of the batches "
                "would be another one: something has asked for the training data before. It is often "
                "trainer.estimated_stepping_batches in configure_optimizers: ask for it in the LambdaLR's function, "
                "after step 0"
            )
        if not self._has_count:  # a new run, or a callback that is added to a run under way
            self.steps_taken, self._has_count = trainer.global_step, True
        for optimizer in trainer.optimizers:
            self._step_hooks.append(optimizer.register_step_post_hook(self._note_step))
        # A checkpoint written between an optimizer's step and what follows from it is caught up with.
        self._catch_up(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """See the class."""
        self._catch_up(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no longer."""
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no longer."""
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """The count, and what was kept so far."""
        return {"steps_taken": self.steps_taken, "is_pending": self._is_pending, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of a run that goes on."""
        self.steps_taken, self._is_pending = state_dict["steps_taken"], state_dict["is_pending"]
        self._has_count = True

    def require_steps(self, trainer: Trainer, seen: int) -> None:
        """Refuse a run whose optimizer steps cannot be seen; for the end of an epoch."""
        if seen == 0 and trainer.global_step == 0 and not trainer.should_stop:
            raise MisconfigurationException(
                f"{type(self).__name__} counts optimizer steps, and saw none in a whole epoch: with manual "
                "optimization, step the optimizers that self.optimizers() returns; Lightning does not see the steps "
                "of a raw torch optimizer"
            )

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Fused optimizers are called also for a step that they skip, and told so by GradScaler.
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
