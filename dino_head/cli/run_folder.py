"""The folder of a run: its settings, its checkpoints, Ctrl-C and going on."""

import argparse
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((out / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime)


def check_readable(file: Path) -> None:
    """Raise ValueError if the file is not a whole checkpoint."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # whatever is in the file
        raise ValueError(
            f"{file} is no whole checkpoint ({type(error).__name__}). Nothing was changed: go on from another one. (To "
            "resume a run from the one before it, move this one away.)"
        ) from None


def parse_run(
    parser: argparse.ArgumentParser, limits: Mapping[str, tuple[float, float]], arguments: Sequence[str] | None
) -> Any:
    """The options, kept in the folder `--out`: a resumed run takes up those that it was started with.

    Args:
        parser: has --out and --resume as well.
        limits: the smallest and the largest value of the options that have some.
        arguments: None for those of the command line.
    """
    args = parser.parse_args(arguments)
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            limit = f"at least {least}" if getattr(args, name) < least else f"at most {most}"
            parser.error(f"--{name.replace('_', '-')} must be {limit}, got {getattr(args, name)}")
    settings = args.out / "settings.json"
    if not args.resume:
        started_too_early = not checkpoints(args.out) and settings.exists()  # and ended before there was anything
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())) and not started_too_early:
            parser.error(f"{args.out} holds a run already: go on with --resume, or choose another folder with --out")
        args.out.mkdir(parents=True, exist_ok=True)
        options = {name: value for name, value in vars(args).items() if name not in {"out", "resume"}}
        settings.write_text(json.dumps(options, indent=2))
        return args
    if not checkpoints(args.out):
        parser.error(f"{args.out} holds no checkpoint to resume from: start the run without --resume")
    try:
        check_readable(checkpoints(args.out)[-1])
    except ValueError as error:
        parser.error(str(error))
    started = argparse.Namespace(**json.loads(settings.read_text()))
    args = parser.parse_args(arguments, argparse.Namespace(**vars(started)))
    for name, value in vars(started).items():
        if getattr(args, name) != value:
            parser.error(
                f"the run in {args.out} was started with {name}={value}, got {getattr(args, name)}: a resumed run "
                "keeps its settings; leave the option out, or start another run with --out"
            )
    return args


def check_same_data(out: Path, description: str, resume: bool) -> None:
    """Stop a resumed run whose data are not those that it began with; `description` is kept in the folder."""
    file = out / "data.txt"
    if resume and file.exists() and file.read_text() != description:
        raise SystemExit(
            f"the data have changed since the run in {out} began ({file.read_text()}, now {description}), and their "
            "order with them: put the files back, or begin another run with --out. Nothing was changed"
        )
    file.write_text(description)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place first, so that a full disk or a kill leaves no half one there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write, then rename."""
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        part.replace(path)


class StopAtBatchEnd(Callback):
    """Lets Ctrl-C end the run after its batch, with a checkpoint from which it goes on exactly; for the last place."""

    def __init__(self, file: Path) -> None:
        self.file, self.is_asked, self.handler = file, False, signal.getsignal(signal.SIGINT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        self.is_asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        if self.is_asked:  # Ctrl-C for the second time: at once
            raise KeyboardInterrupt
        self.is_asked = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save, and say how to go on."""
        if self.is_asked:
            trainer.save_checkpoint(self.file)
            print(f"\nstopped: {self.file} is written; go on with --resume --out {self.file.parents[1]}")
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ctrl-C as it was."""
        signal.signal(signal.SIGINT, self.handler)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ctrl-C as it was."""
        signal.signal(signal.SIGINT, self.handler)
