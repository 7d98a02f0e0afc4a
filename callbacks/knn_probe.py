"""A callback that logs the kNN accuracy while DINO trains."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_head._arguments import check_integer, check_number
from dino_head.callbacks._checks import Checked
from dino_head.callbacks._checks.layout import find_submodule
from dino_head.callbacks._features import Loaders, evaluation, extract, labelled_loaders
from dino_head.metrics import KNNAccuracy


class KNNProbeCallback(Checked):
    """Logs the accuracy of a k-nearest-neighbour vote on the teacher's features, as `knn/top1`.

        Trainer(callbacks=[KNNProbeCallback(train, test), ModelCheckpoint(monitor="knn/top1", mode="max"), ...])

    The training samples vote on the test samples (`KNNAccuracy`); DINO trains on neither. The probe runs in the first,
    every `every_n_epochs`th and the last epoch (by max_epochs or max_steps): during validation, so that ModelCheckpoint
    finds the value, or at the end of an epoch without validation. The value stays until the next probe: use the same
    `every_n_epochs` in ModelCheckpoint and EarlyStopping, or they attribute it to later weights.

    Batches are (inputs, labels), or (inputs, labels, groups): samples of one group (patient, slide, scene) do not vote
    for each other. Inputs are moved to the device and passed to `module` as the loader yields them (hooks such as
    on_after_batch_transfer are not called), in evaluation mode and with the Trainer's precision. Several processes
    divide the work.

    Training is bitwise the same with and without it: modes, random states and the order of training samples do not
    change (except for a dataset's own random generator that training shares with the probe). If the probe cannot run
    (no labels, fewer voters than k, one class, features that are not finite, no data, an error while loading), it warns
    and training continues without a value.

    Args:
        train: Loader of labelled samples that vote, without augmentation; None for the first of `knn_dataloaders()` of
            the datamodule (or the LightningModule), or else its train_dataloader().
        test: Loader of labelled samples to classify; None for the second of knn_dataloaders(), or else
            val_dataloader(), or else test_dataloader(). From a list, a dict or a CombinedLoader of loaders, here and
            for `train`, the probe uses the first. The datamodule creates its loaders when training starts; the probe
            keeps them (also with reload_dataloaders_every_n_epochs), so that its values are comparable.
        module: Name of a submodule of the LightningModule that returns features (B, D), as in `named_modules()`; "" for
            the LightningModule itself, with its forward.
        k: Number of neighbours that vote, >= 1.
        temperature: Temperature of the votes' weights, > 0.
        every_n_epochs: Number of epochs from one probe to the next, >= 1.
        max_samples: Approximate maximum number of samples from each loader, in whole batches spread evenly over it. It
            limits the memory to a few times max_samples x D x 4 bytes and 64 MiB of similarities.

    Attributes:
        history: `epoch`, `step` (optimizer steps) and `top1` of each probe. Saved in checkpoints.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: When training starts, if the module does not exist, or there are no data.
    """

    def __init__(
        self,
        train: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        *,
        module: str = "teacher.backbone",
        k: int = 20,
        temperature: float = 0.07,
        every_n_epochs: int = 1,
        max_samples: int = 50_000,
    ) -> None:
        check_integer("k", k, 1)
        check_number("temperature", temperature, 0, float("inf"), exclude_minimum=True)
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("max_samples", max_samples, 1)
        self.train, self.test, self.module = train, test, module
        self.k, self.temperature = k, temperature
        self.every_n_epochs, self.max_samples = every_n_epochs, max_samples
        self.history: list[dict[str, float]] = []
        self._loaders: Loaders | None = None  # during training
        self._last: tuple[int, int] | None = None  # epoch and step of the last attempt
        self._warned: set[str] = set()

    @property
    def receipt(self) -> str | None:
        """The last and the best accuracy; None before the first probe."""
        if not self.history:
            return None
        last, best = self.history[-1], max(self.history, key=lambda probe: probe["top1"])
        return (
            f"knn/top1 {last['top1']:.4f} in epoch {last['epoch']:.0f}, the best {best['top1']:.4f} in "
            f"epoch {best['epoch']:.0f}"
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        self._loaders = self._last = None
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self.history = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find module and data."""
        super().on_train_start(trainer, pl_module)
        find_submodule(pl_module, self.module, "module=...")
        with evaluation(pl_module):  # creating loaders may draw random numbers
            self._loaders = labelled_loaders(trainer, self.train, self.test, type(self).__name__)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe before ModelCheckpoint reads the value."""
        self._probe(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe, if this epoch had no validation."""
        if self._last != (trainer.current_epoch, trainer.global_step):
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the datamodule's loaders, and print the receipt."""
        super().on_train_end(trainer, pl_module)
        self._loaders = None
        if self.receipt:
            rank_zero_info(self.receipt)

    def state_dict(self) -> dict[str, Any]:
        """The accuracies so far."""
        return {"history": self.history, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the accuracies of a resumed run."""
        self.history = state_dict["history"]
        if self.history:  # the checkpoint may lie between validation and the end of the epoch, which probe only once
            self._last = int(self.history[-1]["epoch"]), int(self.history[-1]["step"])

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        is_last = epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if self._loaders is None or not (epoch == 0 or (epoch + 1) % self.every_n_epochs == 0 or is_last):
            return
        self._last = epoch, trainer.global_step
        try:
            with evaluation(pl_module):
                top1 = self._accuracy(trainer, pl_module, self._loaders)
        except ValueError as error:
            if str(error) not in self._warned:
                self._warned.add(str(error))
                rank_zero_warn(f"knn/top1 has no value in epoch {epoch}, and training continues: {error}")
            return
        self.history.append({"epoch": float(epoch), "step": float(trainer.global_step), "top1": top1})
        pl_module.log("knn/top1", top1, prog_bar=True, sync_dist=True)

    def _accuracy(self, trainer: Trainer, pl_module: LightningModule, loaders: Loaders) -> float:
        module = find_submodule(pl_module, self.module, "module=...")
        train, test = (extract(trainer, pl_module, module, loader, self.max_samples) for loader in loaders)
        # Each process has all features and computes the same value.
        knn = KNNAccuracy(
            train.features, train.labels, self.k, self.temperature, groups=train.groups, sync_on_compute=False
        ).to(pl_module.device)
        knn.update(*test)
        return float(knn.compute())
