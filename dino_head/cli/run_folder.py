"""The folder of a run: its configuration, its data and its checkpoints.

DIR/config.yaml      the effective configuration
DIR/data.txt         a description of the training data
DIR/checkpoints/     the checkpoints, for resuming
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only


def checkpoints(out: Path) -> list[Path]:
    """Checkpoints of a run, in no order: ours, and those that Lightning writes to requeue a SLURM job."""
    return [*(out / "checkpoints").glob("*.ckpt"), *out.glob("hpc_ckpt_*.ckpt")]


def check_readable(file: Path) -> int:
    """Number of batches that the run of a checkpoint has trained on.

    Raises:
        ValueError: The file, or the folder of a sharded checkpoint, is incomplete.
    """
    try:
        if file.is_dir():
            saved = torch.load(file / "meta.pt", map_location="cpu", weights_only=True)  # Lightning writes it last
        else:
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # without reading the weights
            saved["state_dict"]
        batches: int = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    except Exception as error:  # depends on the damage
        raise ValueError(
            f"{file} is not a complete checkpoint ({type(error).__name__}). Nothing was changed: use another "
            "checkpoint. (To resume a run from its previous checkpoint, move this one away. Without any, --resume "
            "starts it anew.)"
        ) from None
    return batches


def open_run(out: Path, config: str, resume: bool) -> Path | None:
    """Prepare the folder of a run.

    Args:
        out: Folder of the run.
        config: Effective configuration of the run, in YAML.
        resume: Whether to resume the run in the folder, if it has a checkpoint.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        ValueError: The folder contains a run and `resume` is False; it contains other files; the run has another
            configuration; a checkpoint is incomplete.
    """
    saved = out / "config.yaml"
    if resume and checkpoints(out) and saved.exists():
        # By content, because copies have new times; the times order checkpoints of the same batch.
        newest = max(checkpoints(out), key=lambda file: (check_readable(file), file.stat().st_mtime))
        _check_same_settings(out, saved.read_text(encoding="utf-8"), config)
        return newest
    has_not_trained = saved.exists() and not checkpoints(out)  # the run ended before its first checkpoint
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not has_not_trained:
        remedy = "resume the run with --resume" if saved.exists() else "a run without config.yaml cannot be resumed"
        raise ValueError(
            f"{out} already contains a run or other files: {remedy}; to start another run, choose another folder with "
            "--out"
        )
    _write(saved, config)
    _set_aside(out / "report.html")
    return None


@rank_zero_only
def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@rank_zero_only
def _set_aside(report: Path) -> None:
    """Rename the report of a run whose checkpoints are gone, so that the new run can write its own."""
    if report.exists():
        report.replace(report.with_name("report.previous.html"))


def _check_same_settings(out: Path, was: str, got: str) -> None:
    before, now = (dict(_settings(yaml.safe_load(text))) for text in (was, got))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    # The same folder by another path, and a time limit, change no result.
    names = [name for name in names if not name.startswith(("trainer.default_root_dir", "trainer.max_time"))]
    if names:
        first = ", ".join(f"{name}={before.get(name)} (got {now.get(name)})" for name in names[:3])
        more = f" and {len(names) - 3} other settings" if len(names) > 3 else ""
        raise ValueError(
            f"the run in {out} was started with {first}{more}: a resumed run keeps its settings; drop these flags, or "
            "start another run with --out"
        )


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested configuration, with their paths."""
    if isinstance(value, (dict, list)) and value:
        for name, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _settings(below, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def check_same_data(out: Path, description: str, resume: bool) -> None:
    """Raise ValueError if a run is resumed with other data than at its start; else save the description."""
    file = out / "data.txt"
    was = file.read_text(encoding="utf-8") if resume and file.exists() else description
    if was != description:
        raise ValueError(
            f"the data have changed since the run in {out} was started ({was}, now {description}), and with them the "
            "order of the samples: restore the files, or start another run with --out. Nothing was changed"
        )
    _write(file, description)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file first, so that a full disk or a kill leaves no incomplete file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write, then rename."""
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        part.replace(path)
