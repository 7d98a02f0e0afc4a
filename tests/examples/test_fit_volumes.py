import json
import shutil

import pytest
import torch
from helpers.photos import QUIET
from helpers.scans import add_damaged_scans, write_scans

from dino_head.examples.fit_volumes import dense_net, main, make_volumes
from dino_head.vision.files import BadFiles

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*fork.*")
TINY = ["--epochs", "2", "--batch-size", "32", "--prototypes", "16", *QUIET]


def test_the_generated_volumes_have_four_kinds_and_depend_on_the_seed_alone():
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


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans"))


def test_a_folder_with_damaged_scans_trains(scans, tmp_path, capsys):
    data, out = shutil.copytree(scans, tmp_path / "scans"), tmp_path / "out"
    add_damaged_scans(data)
    main(["--data", str(data), "--epochs", "1", "--batch-size", "4", "--prototypes", "16", "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert "knn_history" not in summary  # scans have no labels
    listed = BadFiles(out / "bad_files.txt").names()
    assert 4 <= len(listed) <= 5  # an epoch has eight of nine files
    assert summary["bad_files"] == len(listed)
    assert f"{len(listed)} unreadable files skipped" in capsys.readouterr().out


def test_resume_with_other_scans_raises(scans, tmp_path, capsys):
    changed, out = shutil.copytree(scans, tmp_path / "changed"), tmp_path / "out"
    main(["--data", str(changed), "--epochs", "1", "--batch-size", "2", "--prototypes", "16", "--out", str(out)])
    (changed / "patient0" / "scan0.nii").rename(changed / "patient0" / "other.nii")
    with pytest.raises(SystemExit):
        main(["--resume", "--out", str(out)])
    assert "the data have changed since the run" in capsys.readouterr().err


def test_fewer_scans_than_a_batch_are_an_error(scans, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--data", str(scans), "--out", str(tmp_path / "out")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "4 samples for each process are fewer than a batch of 32: use a smaller batch size" in line


def test_two_runs_on_generated_volumes_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dino_head.examples.fit_volumes.make_volumes", lambda number, seed=0: make_volumes(number // 8, seed)
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
    assert "in 4 of 4 optimizer steps, last with momentum" in receipts[1]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert [row["epoch"] for row in summary["knn_history"]] == [0, 1]
    assert all(0 < row["top1"] <= 1 for row in summary["knn_history"])


def test_the_network_takes_views_of_both_sizes():
    for size in (24, 12):
        assert dense_net()(torch.rand(2, 1, size, size, size)).shape == (2, 48)  # the recipe's input_dim
    assert dense_net(8)(torch.rand(2, 1, 12, 12, 12)).shape == (2, 24)
