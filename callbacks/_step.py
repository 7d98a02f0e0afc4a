"""The hook that Lightning lacks: after each real optimizer step, once."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer


class AfterOptimizerStep(Callback):
    """Calls `after_optimizer_step` once for each batch in which an optimizer stepped, and saves the count.

    It hooks into `on_train_batch_end`, where `trainer.global_step` tells whether the batch ended an accumulation
    window. (`on_before_zero_grad` would lag a step and lose the last one.) A callback's hook runs before
    ModelCheckpoint's, so a checkpoint holds what the step led to.
    """

    def __init__(self) -> None:
        self.steps_taken = 0
        self._global_step: int | None = None

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the step is counted in `steps_taken`."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the saved count, or start one."""
        if trainer.global_step == 0:  # a fresh fit, also of a callback that served another one
            self.steps_taken, self._global_step = 0, 0
        elif self._global_step is None:  # added to a run that is under way
            self.steps_taken = self._global_step = trainer.global_step
        else:
            # A checkpoint written between an optimizer's step and this hook (Ctrl-C) is caught up with.
            self._count(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """See the class."""
        self._count(trainer, pl_module)

    def require_steps(self, trainer: Trainer) -> None:
        """Refuse a run whose optimizer steps cannot be seen; for the end of an epoch."""
        if trainer.global_step == 0:
            raise MisconfigurationException(
                f"{type(self).__name__} counts optimizer steps, and saw none in a whole epoch: with manual "
                "optimization, step the optimizers that self.optimizers() returns; Lightning does not see the steps "
                "of a raw torch optimizer"
            )

    def _count(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self.steps_taken += 1
            self.after_optimizer_step(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The count, and the global step it was last raised at."""
        return {"steps_taken": self.steps_taken, "global_step": self._global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of a run that goes on."""
        self.steps_taken = state_dict["steps_taken"]
        self._global_step = state_dict["global_step"]
