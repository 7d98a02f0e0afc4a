"""A callback that writes a page about a run, with charts and pictures."""

import io
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_head._arguments import check_integer
from dino_head._extras import packages_of_extras
from dino_head.callbacks._checks import Checked
from dino_head.callbacks._checks.layout import find_submodule
from dino_head.callbacks._features import Loaders, as_text, evaluation, is_sharded, labelled_loaders
from dino_head.callbacks.collapse_monitor import CollapseMonitorCallback
from dino_head.callbacks.knn_probe import KNNProbeCallback
from dino_head.callbacks.report.curves import read_curves, rescale_curves
from dino_head.callbacks.report.page import render_page
from dino_head.callbacks.report.pictures import PatchMaps, Samples, attention_maps, patch_tokens, take_samples

Kind = TypeVar("Kind", bound=Callback)


class ReportCallback(Checked):
    """Writes a page about the run, `report.html`, and its pictures as PNG files.

        Trainer(callbacks=[CollapseMonitorCallback(), KNNProbeCallback(train, test), ReportCallback("runs/mine"), ...])

    The page shows the results of the other callbacks: from CollapseMonitorCallback each loss split into entropy and KL
    beside ln K, the terms of the total loss, the rank, the schedules and the diagnoses; from KNNProbeCallback the
    accuracy; and all receipts. It also shows features of labelled or unlabelled images: a map of
    the held-out images (principal components) and some of them beside their nearest neighbours among the training
    images. For backbones with the methods of the authors' models, it shows the first three principal components of the
    patch tokens as colours (`get_intermediate_layers(images, n=1)`) and the attention of the class token
    (`get_last_selfattention(images)`).

    `curves.json` contains the curves; the report of another run can draw them with `reference`.

    The page is a single, self-contained file. It is written after each validation (in a run without validation, every
    `every_n_epochs` epochs) and at the end; files are replaced atomically. Loggers that accept images (`log_image`, or
    an `experiment` with `add_image`) receive the pictures too. If something cannot be drawn, the callback warns and
    training continues; training is bitwise the same with and without the report. `fast_dev_run` writes no report.
    Needs matplotlib.

    Args:
        dirpath: Folder for the files; None for the logger's folder, or the Trainer's default_root_dir.
        train: Loader of training images, the candidates for neighbours: batches of (images, labels) or of images; None
            for the loader of KNNProbeCallback, or else of the datamodule, or else no such pictures.
        test: Loader of held-out images; None as for `train`.
        module: Name of the submodule that returns features, as for KNNProbeCallback, whose own module is used with its
            loaders.
        every_n_epochs: Number of epochs from one report to the next in a run without validation, >= 1.
        max_samples: Approximate maximum number of samples from each loader, spread evenly over it.
        reference: File curves.json of a good run. Its normalized loss and entropy and its kNN accuracy are drawn as
            dashed lines, at the same share of the run.

    Raises:
        ValueError: An argument is out of range, or the reference is not a curves.json.
        MisconfigurationException: When training starts, if the folder contains the report of another run, one loader
            is missing, or the module does not exist.
        ModuleNotFoundError: matplotlib is not installed.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        train: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        *,
        module: str = "teacher.backbone",
        every_n_epochs: int = 10,
        max_samples: int = 1000,
        reference: str | Path | None = None,
    ) -> None:
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("max_samples", max_samples, 1)
        self.dirpath, self.train, self.test, self.module = dirpath, train, test, module
        self.every_n_epochs, self.max_samples = every_n_epochs, max_samples
        self._reference = None if reference is None else read_curves(Path(reference))
        self._folder = Path()
        self._source: tuple[str, Loaders] | None = None  # module and loaders
        self._written, self._seconds = 0, 0.0

    @property
    def receipt(self) -> str | None:
        """The path of the page, and how often and in how much time it was written; None before the first page."""
        if not self._written:
            return None
        return f"{self._folder / 'report.html'} written {self._written} times, in {self._seconds:.1f} s together"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._written, self._seconds = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find folder and images, and raise an error instead of overwriting the report of another run."""
        super().on_train_start(trainer, pl_module)
        _charts()
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        exists = trainer.strategy.broadcast((self._folder / "report.html").exists())
        if exists and trainer.global_step == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{self._folder} contains the report of another run: move it away, or give ReportCallback another "
                "dirpath"
            )
        self._source = self._find_source(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a run without validation, write the report after all callbacks have finished the previous epoch."""
        epochs = trainer.current_epoch
        if not trainer.enable_validation and epochs and epochs % self.every_n_epochs == 0 and trainer.global_step:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report after each validation of a fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last report, and print the receipt."""
        super().on_train_end(trainer, pl_module)
        self._write(trainer, pl_module)
        rank_zero_info(self.receipt)

    def state_dict(self) -> dict[str, Any]:
        """How often and in how much time the page was written."""
        return {"written": self._written, "seconds": self._seconds, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the counts of a resumed run."""
        self._written, self._seconds = state_dict["written"], state_dict["seconds"]

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        start = time.perf_counter()
        try:
            with evaluation(pl_module):
                self._draw(trainer, pl_module, start)
        except Exception as error:  # a failed report must not end the run
            rank_zero_warn(f"no report in epoch {trainer.current_epoch}, and training continues: {as_text(error)}")
            return
        self._written += 1
        self._seconds += time.perf_counter() - start

    def _draw(self, trainer: Trainer, pl_module: LightningModule, start: float) -> None:
        monitor, probe = _find(trainer, CollapseMonitorCallback), _find(trainer, KNNProbeCallback)
        train, test, maps = self._images(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        measurements, probes = monitor.history if monitor else [], probe.history if probe else []
        terms = monitor.terms if monitor else []
        steps = trainer.estimated_stepping_batches
        if measurements or probes:
            curves = {"steps": steps, "looks": measurements, "probes": probes, **({"terms": terms} if terms else {})}
            _replace_file(self._folder / "curves.json", json.dumps(curves).encode())
        reference = None if self._reference is None else rescale_curves(self._reference, steps)
        pictures = []
        drawn = _charts().draw_charts(measurements, probes, train, test, maps, reference, terms)
        for name, title, caption, figure in drawn:
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=100)
            pictures.append((title, caption, png.getvalue()))
            file = self._folder / f"{name}.png"
            _replace_file(file, png.getvalue())
            _log_picture(trainer, f"report/{name}", file)
        subtitle = (
            f"{type(pl_module).__name__} after {trainer.current_epoch} whole epochs, {trainer.global_step} optimizer "
            "steps. Values are from the last measurement. "
            f"{'' if self._source else 'No images: pass two loaders to ReportCallback or KNNProbeCallback. '}"
            f"Drawn in {time.perf_counter() - start:.1f} s."
        )
        receipts = [getattr(c, "receipt", None) for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        text = render_page(
            subtitle,
            _last_values(measurements, probes, terms),
            monitor.diagnoses if monitor else [],
            _without_diagnosis(monitor),
            pictures,
            [receipt for receipt in receipts if isinstance(receipt, str)],
        )
        _replace_file(self._folder / "report.html", text.encode())

    def _images(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Samples | None, Samples | None, PatchMaps]:
        """Training and held-out samples, and maps of the first held-out ones; after an error, only those before it."""
        train = test = None
        maps = PatchMaps()
        if self._source is None:
            return train, test, maps
        name, loaders = self._source
        module = find_submodule(pl_module, name, "module=...")
        if not trainer.is_global_zero and not is_sharded(module):
            return train, test, maps
        try:
            train, test = (take_samples(trainer, pl_module, module, loader, self.max_samples) for loader in loaders)
            if test.inputs is not None:
                maps = PatchMaps(patch_tokens(module, test.inputs), attention_maps(module, test.inputs))
        except Exception as error:  # any error of the user's code
            rank_zero_warn(
                f"a report with fewer pictures in epoch {trainer.current_epoch}, and training continues: "
                f"{as_text(error)}"
            )
        return train, test, maps

    def _find_source(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, Loaders] | None:
        """Module and loaders of this callback, of KNNProbeCallback, or of the datamodule; None if there are none."""
        train, test, name = self.train, self.test, self.module
        probe = _find(trainer, KNNProbeCallback)
        if probe is not None and train is None and test is None:
            train, test, name = probe.train, probe.test, probe.module
        try:
            with evaluation(pl_module):  # creating loaders may draw random numbers
                loaders = labelled_loaders(trainer, train, test, type(self).__name__)
        except MisconfigurationException:
            if train is not None or test is not None:
                raise
            return None
        find_submodule(pl_module, name, "module=...")
        return name, loaders


def _charts() -> Any:
    """The module that needs matplotlib, imported on use."""
    with packages_of_extras("ReportCallback"):
        from dino_head.callbacks.report import charts
    return charts


def _find(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def _replace_file(file: Path, content: bytes) -> None:
    """Replace the file atomically, so that an error or a kill leaves no incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _last_values(
    measurements: list[dict[str, float]], probes: list[dict[str, float]], terms: list[dict[str, float]]
) -> dict[str, str]:
    """The last values, by their names on the page."""
    values = {}
    for row in [row for row in measurements if "loss" in row][-1:]:
        values["loss, nats"] = f"{row['loss']:.3f}"
        values["loss, normalized"] = f"{row['loss_normalized']:.3f}"
        values["teacher entropy"] = f"{row['teacher_entropy']:.3f}"
        values["KL"] = f"{row['kl']:.3f}"
        values["RankMe"] = f"{row['rankme']:.1f}"
        values["prototype perplexity"] = f"{row['prototype_perplexity']:.1f}"
    for row in [row for row in measurements if "ibot/loss" in row][-1:]:
        values["patch loss, nats"] = f"{row['ibot/loss']:.3f}"
        values["patch loss, normalized"] = f"{row['ibot/loss_normalized']:.3f}"
        values["patch KL"] = f"{row['ibot/kl']:.3f}"
        values["patch RankMe"] = f"{row['ibot/rankme']:.1f}"
    for row in [row for row in terms if "koleo" in row][-1:]:
        values["KoLeo"] = f"{row['koleo']:.3f}"
    for row in probes[-1:]:
        values["kNN top-1"] = f"{100 * row['top1']:.2f}%"
    return values


def _without_diagnosis(monitor: CollapseMonitorCallback | None) -> str:
    """The reason why the page has no diagnosis."""
    if monitor is None:
        return "No diagnosis: there is no CollapseMonitorCallback in this Trainer."
    if not monitor.has_judged:
        return f"Too early to tell: a diagnosis needs {monitor.patience} measurements."
    return "Nothing is wrong, as far as the statistics of the loss can tell."


def _log_picture(trainer: Trainer, name: str, file: Path) -> None:
    """Log to loggers that accept images: Weights & Biases and others with log_image, TensorBoard with add_image."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(file)], step=trainer.global_step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            pixels = _charts().read_pixels(file)
            logger.experiment.add_image(  # type: ignore[attr-defined]
                name, pixels, trainer.global_step, dataformats="HWC"
            )
