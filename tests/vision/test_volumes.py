from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers.scans import add_damaged_scans, write_scan, write_scans
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from monai import transforms as mt
from torch.utils.data import DataLoader

from dino_head.callbacks import KNNProbeCallback
from dino_head.vision import VolumeData, read_volume
from dino_head.vision.files import BadFiles, ReplaceUnreadable
from dino_head.vision.volumes import VolumeFiles

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*fork.*")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


def test_a_volume_equals_what_monai_makes_of_the_file(scans):
    """With files in four orientations."""
    read = mt.Compose(
        [
            mt.LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True),
            mt.Orientation(axcodes="RAS", labels=None),
            mt.ScaleIntensityRangePercentiles(1, 99, 0.0, 1.0, clip=True),
            mt.Resize((24,) * 3, mode="trilinear"),
            mt.ToTensor(track_meta=False),
        ]
    )
    for file in VolumeFiles(str(scans), 24).files:
        torch.testing.assert_close(read_volume(file, 24), read(file))


SPARSE = np.zeros((12, 12, 12))
SPARSE[4:6, 4:6, 4:6] = np.arange(8).reshape(2, 2, 2) + 1648  # 8 of 1,728 voxels: both percentiles are 0
VALUES = {
    "dense": np.random.default_rng(0).normal(-400, 900, (12, 12, 12)),
    "sparse": SPARSE,
    "sparse and negative": -SPARSE,
    "constant": np.full((12, 12, 12), 7.0),
    "huge": np.random.default_rng(0).normal(0, 1e37, (12, 12, 12)),
    "a few infinite": np.where(SPARSE > 1653, np.inf, np.random.default_rng(0).normal(size=(12, 12, 12))),
    "one volume of four dimensions": np.random.default_rng(0).normal(size=(12, 12, 12, 1)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_lie_between_0_and_1(kind, tmp_path):
    for size in (12, 8, 17):
        volume = read_volume(write_scan(tmp_path / "a.nii", VALUES[kind]), size)
        assert (type(volume), volume.dtype, volume.shape) == (torch.Tensor, torch.float32, (1, size, size, size))
        assert 0 <= volume.min() <= volume.max() <= 1
        assert kind == "constant" or volume.max() > 0.4


def test_a_sparse_volume_is_scaled_from_its_smallest_to_its_largest_value(tmp_path):
    volume = read_volume(write_scan(tmp_path / "a.nii", SPARSE), 12)
    torch.testing.assert_close(volume[0], torch.tensor(SPARSE / 1655, dtype=torch.float32))


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.015, 0.04])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sparse_volume_keeps_its_differences(share, sign, tmp_path):
    """With 1 to 2% of other values, the 99th percentile is one of the smallest of these and would hide all others."""
    values, count = np.zeros(40**3), max(2, round(share * 40**3))
    values[np.random.default_rng(0).permutation(40**3)[:count]] = np.linspace(100, 1655, count)
    volume = read_volume(write_scan(tmp_path / "a.nii", sign * values.reshape(40, 40, 40)), 40)
    expected = torch.tensor(values.reshape(1, 40, 40, 40) / 1655, dtype=torch.float32)
    torch.testing.assert_close(volume, expected if sign > 0 else 1 - expected)


def test_integers_with_a_slope_are_scaled_like_the_values_that_they_stand_for(tmp_path):
    values = np.random.default_rng(0).integers(-1024, 2000, (12, 12, 12)).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(2.5, -10)
    nibabel.save(image, tmp_path / "slope.nii")
    expected = read_volume(write_scan(tmp_path / "a.nii", values), 12)
    torch.testing.assert_close(read_volume(str(tmp_path / "slope.nii"), 12), expected)


def test_a_constant_volume_becomes_0(tmp_path):
    assert read_volume(write_scan(tmp_path / "a.nii", VALUES["constant"]), 12).eq(0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(SPARSE > 0, np.nan, 1.0), "expected a finite range"),
        (np.where(SPARSE > 0, np.inf, 1.0), "from 1.0 to inf, expected a finite range"),
        (np.full((9, 9, 9), np.inf), "expected a finite range"),
        (np.where(SPARSE[:8] > 0, -3e38, 3e38), r"from -\S*e\+38 to \S*e\+38, expected a finite range"),
        (np.ones((9, 9, 9, 3)), r"shape \(9, 9, 9, 3\), expected \(X, Y, Z\)"),
        (np.ones((9, 9)), r"shape \(9, 9\), expected \(X, Y, Z\)"),
    ],
)
def test_a_file_that_is_not_one_finite_volume_raises(values, message, tmp_path):
    file = write_scan(tmp_path / "a.nii", values)
    with pytest.raises(ValueError, match=message):
        read_volume(file, 12)


def test_damaged_files_are_replaced_and_listed(tmp_path):
    (tmp_path / "scans").mkdir()
    damaged = add_damaged_scans(write_scans(tmp_path / "scans"))
    files = ReplaceUnreadable(VolumeFiles(str(tmp_path / "scans"), 12), BadFiles(tmp_path / "bad.txt"))
    volumes = torch.stack([*DataLoader(files, batch_size=None)])
    assert volumes.shape == (9, 1, 12, 12, 12)
    assert {Path(name).name for name in files.bad_files.names()} == damaged


def test_volumes_with_names_that_are_not_utf8_are_read_and_other_files_counted(tmp_path, caplog):
    (tmp_path / "scans").mkdir()
    for name in ("a\udce9.nii", "b\udce9.nii.gz"):
        write_scan(tmp_path / "scans" / name, VALUES["dense"])
    for name in ("bad\udce9.nii", "c.dcm", "d.DCM", "README"):
        (tmp_path / "scans" / name).touch()
    with caplog.at_level("INFO"):
        data = VolumeData(str(tmp_path / "scans"), 1, size=12)
    assert caplog.messages == [f"{tmp_path}/scans: 3 of 6 files are used. Not used: 2 .dcm, 1 without extension"]
    assert data.description.startswith("3 files, ")
    assert len(fit(data, tmp_path)) == 3
    assert data.bad_files.names() == [f"{tmp_path}/scans/bad\\udce9.nii"]


def test_a_folder_without_volumes_raises(tmp_path):
    with pytest.raises(ValueError, match=r"has no NIfTI file, expected a folder with files \.nii or \.nii\.gz"):
        VolumeData(str(tmp_path))


def test_the_description_of_volume_data_depends_on_the_files(scans, tmp_path):
    one = VolumeData(str(scans)).description
    assert one.startswith("4 files, ")
    assert one == VolumeData(str(scans)).description
    write_scans(tmp_path)
    assert VolumeData(str(tmp_path)).description != one


class Sum(LightningModule):
    """Records its batches."""

    def __init__(self):
        super().__init__()
        self.layer, self.batches = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.layer(batch.mean().reshape(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, folder, *callbacks):
    module, quiet = Sum(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        **quiet,
    ).fit(module, data)
    return module.batches


def test_workers_read_the_same_batches(scans, tmp_path):
    direct, read = (fit(VolumeData(str(scans), 2, workers, size=12), tmp_path) for workers in (0, 1))
    assert [tuple(batch.shape) for batch in direct] == [(2, 1, 12, 12, 12)] * 2
    assert all(torch.equal(a, b) for a, b in zip(direct, read, strict=True))
    assert direct[0].unique(dim=0).shape[0] == 2


def test_a_knn_probe_of_volumes_without_labels_raises(scans, tmp_path):
    data = VolumeData(str(scans), 2, size=12)
    assert not data.has_classes
    with pytest.raises(MisconfigurationException, match="VolumeData has no knn_dataloaders"):
        fit(data, tmp_path, KNNProbeCallback(module="layer"))
