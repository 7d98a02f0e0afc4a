"""Base class of the datamodules that read files."""

from pathlib import Path

from lightning.pytorch import LightningDataModule

from dino_head.vision.files import BadFiles, printable


class FileData(LightningDataModule):
    """A LightningDataModule that prints the number of unreadable files at the end of a run, even if the run fails.

    Attributes:
        description: Text that identifies the files. A run can only be resumed with the same files.
        has_classes: Whether `knn_dataloaders()` returns loaders of labelled samples.
    """

    description: str
    has_classes: bool = False

    @property
    def bad_files(self) -> BadFiles:
        """The list of unreadable files, `bad_files.txt` in the Trainer's default_root_dir."""
        return BadFiles(Path(self.trainer.default_root_dir if self.trainer else ".") / "bad_files.txt")

    def setup(self, stage: str) -> None:
        """Start a new list, unless a run is resumed."""
        run = self.trainer
        if stage == "fit" and run and run.is_global_zero and not run.ckpt_path:
            self.bad_files.file.unlink(missing_ok=True)

    def teardown(self, stage: str) -> None:
        """Print the number of unreadable files, if there are any."""
        names = self.bad_files.names()
        if names and self.trainer and self.trainer.is_global_zero:
            print(printable(f"{len(names)} unreadable file{'s' * (len(names) > 1)} skipped: {self.bad_files.file}"))

    def on_exception(self, exception: BaseException) -> None:
        """Print the number of unreadable files, as Lightning does not call `teardown` after an error."""
        self.teardown("fit")
