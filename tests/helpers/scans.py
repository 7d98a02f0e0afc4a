"""NIfTI files for the tests of volumes."""

import nibabel
import numpy as np


def write_scan(file, values, affine=None):
    """A NIfTI file of values (X, Y, Z), or (X, Y, Z, number of volumes)."""
    image = nibabel.Nifti1Image(np.asarray(values, dtype=np.float32), np.eye(4) if affine is None else affine)
    nibabel.save(image, file)
    return str(file)


def write_scans(folder):
    """Four scans of different shapes, spacings and orientations in two folders, as hospitals have them."""
    random = np.random.default_rng(0)
    orientations = [(1, 1, 1), (-1, 1, 2), (-1, -1, 3), (1, -1, -4)]
    for number, shape in enumerate([(20, 30, 12), (16, 16, 16), (40, 24, 9), (10, 10, 30)]):
        (folder / f"patient{number % 2}").mkdir(exist_ok=True)
        name = folder / f"patient{number % 2}" / f"scan{number}.nii{'.gz' if number % 2 else ''}"
        write_scan(name, random.normal(-400, 900, shape), np.diag([*orientations[number], 1]))
    return folder


def add_damaged_scans(folder):
    """Five files that cannot be read; their names."""
    whole = (folder / "patient1" / "scan1.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii").touch()
    (folder / "text.nii").write_text("no scan")
    write_scan(folder / "nan.nii", np.full((9, 9, 9), np.nan))
    write_scan(folder / "several.nii", np.random.default_rng(0).normal(size=(9, 9, 9, 3)))
    return {"truncated.nii.gz", "empty.nii", "text.nii", "nan.nii", "several.nii"}
