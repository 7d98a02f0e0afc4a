"""`dino-head fit`: LightningCLI with recipes, short flags and one folder for all output of a run."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from dino_head.callbacks import CollapseMonitorCallback, KNNProbeCallback, ReportCallback
from dino_head.cli.flags import Command, config_file, rewritten
from dino_head.cli.run_callbacks import CheckBackbone, CheckpointOnInterrupt, how_to_resume
from dino_head.cli.run_folder import AtomicCheckpointIO, check_same_data, open_run
from dino_head.vision.data_wait import DataWait

Kind = TypeVar("Kind", bound=Callback)
NOISE = (  # lines of jsonargparse's errors that do not help
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path",
    "a dict with",
)


class FitCLI(LightningCLI):
    """Model, data and Trainer of a run, built from its command.

    Args:
        arguments: Arguments after `dino-head fit`.

    Attributes:
        out: Folder of the run.
        checkpoint: Checkpoint to resume from, or None for a new run.
        results: Contents of summary.json, after the run.
    """

    out: Path
    checkpoint: Path | None
    results: dict[str, Any]

    def __init__(self, arguments: Sequence[str]) -> None:
        self.command = Command()
        self.flags, self.paths = self.command.parse_known_args(arguments)
        if self.flags.config:
            self.file = config_file(self.command, self.flags.config)
        elif not self.flags.resume:
            self.command.error("argument --config: required, the name of a recipe or a file (see --help)")
        elif not self.flags.out:
            self.command.error("argument --resume: needs --out DIR, the folder of the run, or the --config of the run")
        else:
            self.file = Path(self.flags.out) / "config.yaml"
            if not self.file.is_file():
                self.command.error(f"argument --resume: {self.flags.out} contains no run: start it with --config")
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,  # open_run saves the configuration
            parser_kwargs={"exit_on_error": False},
            run=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the file, then the short flags, then the full paths; later values override earlier ones."""
        flags = rewritten(self.flags)
        file = f"--config={self.file}"
        try:
            self.config = parser.parse_args([file, *_configs(flags.values()), *self.paths])
        except (argparse.ArgumentError, ValueError, TypeError) as error:
            self._refuse(parser, file, flags, error)
        if self.config.trainer.default_root_dir is None:
            self.config.trainer.default_root_dir = str(Path("runs") / self.file.stem)
        self.out = Path(self.config.trainer.default_root_dir)

    def _refuse(self, parser: LightningArgumentParser, file: str, flags: dict[str, str], error: Exception) -> NoReturn:
        """Exit with an error that names the first flag at which parsing fails."""
        names = [f"--config {self.file}", *flags]
        for count, name in enumerate(names):
            try:
                parser.parse_args([file, *_configs(list(flags.values())[:count])])
            except (argparse.ArgumentError, ValueError, TypeError) as of_flag:
                if not _needs_data(of_flag):
                    self.command.error(f"argument {name}: {_reason(of_flag)}")
        if _needs_data(error):
            self.command.error("argument --data: required, a folder or the name of a data set on the Hub")
        self.command.error(_reason(error))

    def before_instantiate_classes(self) -> None:
        """Prepare the folder of the run."""
        config = self.parser.dump(self.config, skip_none=False)
        try:
            self.checkpoint = open_run(self.out, config, self.flags.resume)
        except ValueError as error:
            self.command.error(str(error))

    def instantiate_classes(self) -> None:
        """Build all objects; if a class rejects a value, exit with an error of one line."""
        try:
            super().instantiate_classes()
            if (description := getattr(self.datamodule, "description", None)) is not None:
                check_same_data(self.out, description, resume=self.checkpoint is not None)
        except (ValueError, MisconfigurationException) as error:
            self.command.error(_reason(error))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, which writes only to the folder of the run."""
        settings = self.config_init["trainer"]
        given = settings["callbacks"] or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if not getattr(self.datamodule, "has_classes", True):
            callbacks = [callback for callback in callbacks if not isinstance(callback, KNNProbeCallback)]
        _refuse_savers_on_exception(callbacks)
        for callback in (Timer(), CheckBackbone()):
            if not any(isinstance(other, type(callback)) for other in callbacks):
                callbacks.append(callback)
        logger = settings["logger"]
        if (logger is None or logger is True) and not settings["barebones"]:
            logger = CSVLogger(self.out, name="metrics")
        limit = Timer(settings["max_time"]).time_remaining()
        # CheckpointOnInterrupt applies the limit; Lightning would warn that it ignores it because of the Timer.
        options = {"callbacks": callbacks, "logger": logger, "max_time": None, **kwargs}
        trainer = super().instantiate_trainer(**options)
        trainer.callbacks.append(CheckpointOnInterrupt(self.out, limit))  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.out / "checkpoints").resolve())
            elif isinstance(callback, ReportCallback) and callback.dirpath is None:
                callback.dirpath = self.out
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def _refuse_savers_on_exception(callbacks: Sequence[Callback]) -> None:
    """Raise ValueError for callbacks that save after an error."""
    for callback in callbacks:
        if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            raise ValueError(
                f"{type(callback).__name__} would save after an error, in the middle of a batch, from where no run "
                "resumes exactly: remove it (or save_on_exception). After an error, --resume continues from the last "
                "checkpoint"
            )


def _configs(configs: Any) -> list[str]:
    return [f"--config={config}" for config in configs]


def _reason(error: Exception) -> str:
    """The message of jsonargparse in one line, without the list of types that it tried."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE))


def _needs_data(error: Exception) -> bool:
    return _reason(error).endswith("are required: data")


def with_recipe(
    recipe: str, arguments: Sequence[str] | None, rule: Callable[[argparse.Namespace], Sequence[str]] | None = None
) -> list[str]:
    """Arguments of `dino-head fit` for a script that fits a recipe; a resumed run keeps its own configuration.

    Args:
        recipe: Name of the recipe.
        arguments: Arguments of the script; by default, those of the command line.
        rule: Function that maps the short flags to arguments for which the script has its own defaults.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags, _ = Command().parse_known_args(given)
    out = flags.out or f"runs/{recipe}"
    if flags.resume and (Path(out) / "config.yaml").is_file():
        return ["--out", out, *given]
    return ["--config", recipe, *(rule(flags) if rule else []), *given]


def fit(arguments: Sequence[str]) -> FitCLI:
    """Train as the command describes, and write DIR/summary.json.

    Args:
        arguments: Arguments after `dino-head fit`.

    Returns:
        Model, data and Trainer after the run.

    Raises:
        SystemExit: The command is wrong, a part of this library refuses its arguments or data, the run cannot write
            its files, or it was stopped by a signal or its time limit.
    """
    cli = FitCLI(arguments)
    interrupt = _find(cli.trainer, CheckpointOnInterrupt)
    try:
        if cli.checkpoint is not None:
            cli.trainer.ckpt_path = cli.checkpoint  # an argument of fit would be unknown in the datamodule's setup
        cli.trainer.fit(cli.model, cli.datamodule)
    except OSError as error:
        raise SystemExit(f"stopped: {error}. Free disk space or repair the cause. {how_to_resume(cli.out)}") from error
    except (ValueError, MisconfigurationException) as error:
        if not _is_ours(error):
            raise
        cli.command.error(str(error))
    except SystemExit as end:  # Lightning's, with code 1 or 0
        if interrupt is None or not interrupt.exit_code:
            raise
        raise SystemExit(interrupt.exit_code) from end
    summary = cli.out / "summary.json"
    if interrupt is not None and not interrupt.has_trained and summary.exists():
        rank_zero_info(f"the run in {cli.out} was complete: nothing was changed")
        cli.results = json.loads(summary.read_text(encoding="utf-8"))
        return cli
    cli.results = _results(cli)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        summary.write_text(json.dumps(cli.results, indent=2), encoding="utf-8")
    return cli


def _is_ours(error: Exception) -> bool:
    """Whether a module of this library raised the error, whose message then names the remedy."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("dino_head.")


def _results(cli: FitCLI) -> dict[str, Any]:
    data = cli.datamodule
    timer, wait = _find(cli.trainer, Timer), _find(cli.trainer, DataWait)
    probe, monitor = _find(cli.trainer, KNNProbeCallback), _find(cli.trainer, CollapseMonitorCallback)
    receipts = [getattr(callback, "receipt", None) for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    results = {
        "epochs": cli.trainer.current_epoch,
        "seconds": timer and round(timer.time_elapsed("train"), 1),
        "data": getattr(data, "description", None),
        "bad_files": len(data.bad_files.names()) if hasattr(data, "bad_files") else None,
        "data_wait": wait and wait.share,
        "knn_history": probe and [{"epoch": int(row["epoch"]), "top1": round(row["top1"], 4)} for row in probe.history],
        "diagnoses": monitor and monitor.diagnoses,
        "receipts": [receipt for receipt in receipts if receipt],
    }
    return {name: result for name, result in results.items() if result is not None}


def _find(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def main(arguments: Sequence[str]) -> None:
    """Train, and print the summary."""
    cli = fit(arguments)
    if cli.trainer.is_global_zero:
        print(json.dumps(cli.results, indent=2))
