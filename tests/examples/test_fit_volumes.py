import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from dino_head.examples.fit_volumes import Volumes, build, dense_net, main
from dino_head.vision.files import BadFiles, Readable
from dino_head.vision.volumes import Scans, VolumeViews, make_volumes

nibabel = pytest.importorskip("nibabel")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*fork.*")
TINY = ["--epochs", "2", "--batch-size", "32", "--prototypes", "16"]


def test_the_volumes_are_of_four_kinds_and_always_the_same():
    volumes, kinds = make_volumes(40)
    assert (volumes.shape, kinds.bincount().tolist()) == ((40, 1, 24, 24, 24), [10] * 4)
    assert (volumes.min(), volumes.max()) >= (0, 0.8)
    assert volumes.max() <= 1
    assert torch.equal(make_volumes(40)[0], volumes)
    assert not torch.equal(make_volumes(40, seed=1)[0], volumes)
    balls, shells = (volumes[kinds == kind, 0] > 0.45 for kind in (0, 3))
    middles = [ball.nonzero().float().mean(dim=0).round().long().tolist() for ball in (*balls, *shells)]
    filled = [bool(volume[tuple(middle)]) for volume, middle in zip((*balls, *shells), middles, strict=True)]
    assert filled == [True] * 10 + [False] * 10  # a shell is hollow


def test_views_are_of_two_sizes_and_follow_from_torchs_random_state():
    volumes = make_volumes(3)[0]
    views = VolumeViews()
    torch.manual_seed(0)
    one = views(volumes)
    assert [tuple(view.shape) for view in one] == [(3, 1, 24, 24, 24)] * 2 + [(3, 1, 12, 12, 12)] * 4
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, views(volumes), strict=True))
    assert not torch.equal(one[0], views(volumes)[0])
    same = views(volumes[:1].expand(4, -1, -1, -1, -1))[0]
    assert len(same.flatten(1).unique(dim=0)) == 4  # each sample has its own draw
    assert type(one[0]) is torch.Tensor


@pytest.mark.parametrize(("local", "scale"), [(False, (0.75, 1.0)), (True, (0.4, 0.75))])
def test_the_part_that_a_view_shows(local, scale):
    """Of ramps: what is between the smallest and the largest value that a view shows."""
    views = VolumeViews()
    views.appearance.transforms = ()
    ramps = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 24)] * 3, indexing="ij"))[None]
    torch.manual_seed(0)
    view = [views(ramps)[-1 if local else 0][0] for _ in range(60)]
    sides = torch.stack([v.amax(dim=(1, 2, 3)) - v.amin(dim=(1, 2, 3)) for v in view])
    assert scale[0] - 0.06 < sides.min() < scale[0] + 0.06
    assert scale[1] - 0.08 < sides.max() <= scale[1]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Scans of unlike sizes, spacings and ranges, as they are in hospitals."""
    folder = tmp_path_factory.mktemp("scans")
    random = np.random.default_rng(0)
    for number, shape in enumerate([(20, 30, 12), (16, 16, 16), (40, 24, 9), (10, 10, 30)]):
        values = random.normal(-400, 900, shape).astype(np.float32)
        (folder / f"patient{number % 2}").mkdir(exist_ok=True)
        name = folder / f"patient{number % 2}" / f"scan{number}.nii{'.gz' if number % 2 else ''}"
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, number + 1, 1])), name)
    return folder


def test_nifti_files_become_volumes_of_one_size(scans):
    volumes = torch.stack([*Scans(str(scans), 24)])
    assert volumes.shape == (4, 1, 24, 24, 24)
    assert type(volumes) is torch.Tensor
    assert (volumes.min(), volumes.max()) == (0, 1)
    with pytest.raises(SystemExit, match="has no NIfTI file"):
        Scans(str(scans / "nothing"), 24)


@pytest.fixture
def damaged(scans, tmp_path):
    """The same, and four that cannot be used."""
    folder = Path(shutil.copytree(scans, tmp_path / "damaged"))
    whole = (folder / "patient1" / "scan1.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii").touch()
    (folder / "text.nii").write_text("no scan")
    for name, values in {
        "nan": np.full((9, 9, 9), np.nan),
        "several": np.random.default_rng(0).normal(size=(9, 9, 9, 3)),
    }.items():
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{name}.nii")
    return folder


def test_damaged_scans_are_left_out_and_listed(damaged, tmp_path):
    bad_files = BadFiles(tmp_path / "bad.txt")
    volumes = torch.stack([*DataLoader(Readable(Scans(str(damaged), 12), bad_files), batch_size=None)])
    assert volumes.shape == (9, 1, 12, 12, 12)
    assert {Path(name).name for name in bad_files.names()} == {
        "truncated.nii.gz", "empty.nii", "text.nii", "nan.nii", "several.nii",
    }  # fmt: skip


def test_a_folder_of_scans_trains(damaged, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--data", str(damaged), "--epochs", "1", "--batch-size", "4", "--prototypes", "16", "--out", str(out)])
    assert json.loads((out / "summary.json").read_text()) == {"epochs": 1, "knn_top1": []}
    listed = BadFiles(out / "bad_files.txt").names()
    assert 4 <= len(listed) <= 5  # eight of nine are asked for
    assert f"{len(listed)} files could not be read and were left out" in capsys.readouterr().out


def test_scans_that_changed_are_said(scans, tmp_path):
    changed, out = shutil.copytree(scans, tmp_path / "changed"), tmp_path / "out"
    main(["--data", str(changed), "--epochs", "1", "--batch-size", "2", "--prototypes", "16", "--out", str(out)])
    (changed / "patient0" / "scan0.nii").rename(changed / "patient0" / "other.nii")
    with pytest.raises(SystemExit, match="the data have changed since the run"):
        main(["--resume", "--out", str(out)])


def test_fewer_scans_than_a_batch_are_an_error(scans, tmp_path):
    with pytest.raises(
        ValueError, match=r"4 samples for each process are less than a batch of 32.* a smaller batch size"
    ):
        main(["--data", str(scans), "--out", str(tmp_path / "out")])


def test_scans_have_no_labels_to_probe(scans):
    with pytest.raises(MisconfigurationException, match="scans have no labels here"):
        Volumes(str(scans)).knn_dataloaders()


def test_workers_read_the_same_scans(scans):
    volumes = Volumes(str(scans), size=12)
    direct, read = (next(iter(DataLoader(volumes.volumes, batch_size=4, num_workers=workers))) for workers in (0, 1))
    torch.testing.assert_close(direct, read)


def test_head_loss_and_callbacks_are_the_same_in_three_dimensions(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fit_volumes.make_volumes", lambda number, *args, **options: make_volumes(number // 8, *args, **options)
    )
    main([*TINY, "--out", str(tmp_path / "one")])
    main([*TINY, "--out", str(tmp_path / "other")])
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "epoch=1.ckpt", weights_only=True) for name in ("one", "other")
    )
    assert [
        name for name, value in one["state_dict"].items() if not torch.equal(value, other["state_dict"][name])
    ] == []
    receipts = [state["receipt"] for state in one["callbacks"].values() if state.get("receipt")]
    assert receipts[0].startswith("student.head.last_layer frozen for 2 optimizer steps, bitwise unchanged")
    assert receipts[1].startswith("teacher followed student for 4 of 4 optimizer steps")
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert len(summary["knn_top1"]) == 2
    assert all(0 < top1 <= 1 for top1 in summary["knn_top1"])


def test_the_network_takes_both_sizes():
    model = build(prototypes=16)
    for size in (24, 12):
        assert model.student["backbone"](torch.rand(2, 1, size, size, size)).shape == (
            2,
            model.student["head"].input_dim,
        )
    assert dense_net(8)(torch.rand(2, 1, 12, 12, 12)).shape == (2, 24)
