"""A LightningDataModule of NIfTI files.

Files that cannot be read are skipped, counted, and listed in bad_files.txt in the Trainer's default_root_dir.
"""

from dino_head.vision.file_data import FileData
from dino_head.vision.files import ReplaceUnreadable, fingerprint
from dino_head.vision.loaders import ResumableLoader
from dino_head.vision.volumes import VolumeFiles


class VolumeData(FileData):
    """Datamodule of volumes (B, 1, size, size, size) with values in [0, 1], without labels.

    Args:
        data: Folder of NIfTI files (.nii, .nii.gz), searched with all its subfolders.
        batch_size: Number of volumes in a batch of each process.
        workers: Number of worker processes that read files, for each training process.
        size: Number of voxels along each axis after resizing, before augmentation.
        seed: Seed of the order of the volumes.
    """

    def __init__(self, data: str, batch_size: int = 32, workers: int = 0, size: int = 24, seed: int = 0) -> None:
        super().__init__()
        self.volumes = VolumeFiles(data, size)
        self.batch_size, self.workers, self.size, self.seed = batch_size, workers, size, seed
        self.description = fingerprint(self.volumes.files)

    def train_dataloader(self) -> ResumableLoader:
        """The volumes, shuffled in another order in each epoch."""
        assert self.trainer is not None
        volumes = ReplaceUnreadable(self.volumes, self.bad_files)
        return ResumableLoader(volumes, self.batch_size, self.trainer, self.seed, num_workers=self.workers)
