import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import SendSignal, run_script
from matplotlib import image

from dino_head.examples.fit_digits import digit_views, digits, main, parse

SCRIPT = Path(__file__).parents[2] / "examples" / "fit_digits.py"
TINY = ["--epochs", "2", "--batch-size", "256", "--prototypes", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    main([*TINY, "--out", str(out)])
    return out


def test_the_split_is_fixed_and_apart():
    (train, train_labels), (test, test_labels) = digits(size=8)
    assert (train.shape, test.shape) == ((1400, 1, 8, 8), (397, 1, 8, 8))
    assert (train.min(), train.max()) == (0, 1)
    assert torch.equal(digits(size=8)[1][0], test)
    assert torch.bincount(torch.cat([train_labels, test_labels])).min() >= 174  # all 1,797 of ten digits
    assert not (train.flatten(1)[:, None] == test.flatten(1)[None]).all(dim=2).any()


def test_the_run_writes_what_the_readme_says(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {
        "knn_top1", "knn_top1_raw_pixels", "knn_top1_untrained", "diagnoses", "seconds", "seed", "freeze", "versions",
    }  # fmt: skip
    assert summary["knn_top1_raw_pixels"] == pytest.approx(0.985, abs=5e-4)
    assert 0.5 < summary["knn_top1"] <= 1
    assert summary["freeze"].startswith("student.head.last_layer frozen for 5 optimizer steps, bitwise unchanged")
    assert {file.name for file in run.iterdir()} == {
        "checkpoints", "metrics", "curves.json", "report.html", "overview.png", "neighbours.png", "settings.json",
        "summary.json",
    }  # fmt: skip
    assert image.imread(run / "overview.png").shape[0] > 500
    looks, probes = histories(run)
    assert [look["step"] for look in looks] == [1]
    assert all(0 <= look["teacher_entropy"] <= math.log(16) for look in looks)
    assert [(probe["epoch"], round(probe["top1"], 4)) for probe in probes][1:] == [(1, summary["knn_top1"])]


def histories(run):
    """What monitor and probe have seen, from the checkpoint of the last epoch."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return [saved[name]["history"] for name in ("CollapseMonitorCallback", "KNNProbeCallback")]


def test_a_run_is_never_overwritten(run, capsys):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit):
        main([*TINY, "--out", str(run)])
    assert "holds a run already: go on with --resume, or choose another folder" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_folder_left_before_the_first_checkpoint_can_be_started_again(tmp_path):
    parse([*TINY, "--out", str(tmp_path)])  # writes the settings, as a run does first
    assert parse(["--out", str(tmp_path)]).epochs == 60


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(SystemExit):
        parse([*TINY, "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_resumed_run_keeps_its_settings(run, capsys):
    assert parse(["--resume", "--out", str(run)]).prototypes == 16
    with pytest.raises(SystemExit):
        parse(["--resume", "--out", str(run), "--epochs", "9"])
    assert "was started with epochs=2, got 9" in capsys.readouterr().err


def test_nothing_to_resume_from(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["--resume", "--out", str(tmp_path)])
    assert "no checkpoint to resume from: start the run without --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--epochs", "0"], ["--batch-size", "1"], ["--batch-size", "1401"], ["--seed", "-1"]]
)
def test_options_out_of_range(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse([*option, "--out", str(tmp_path / "run")])
    assert "must be at" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


FOUR = ["--epochs", "4", "--batch-size", "256"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "digits"
    assert run_script(SCRIPT, ["--out", str(out), *FOUR], out.parent / "log") == 0
    return final_state(out)


def final_state(out):
    """What training led to: teacher, student, center, optimizer, learning rate and count of steps."""
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 3
    names = "state_dict", "optimizer_states", "lr_schedulers", "global_step"
    return {name: checkpoint[name] for name in names}


@pytest.mark.parametrize("stop_with", ["SIGKILL", "SIGINT"])
def test_a_run_that_was_killed_or_stopped_and_resumed_equals_the_uninterrupted_one_bitwise(
    stop_with, uninterrupted, tmp_path
):
    """With the example's own shuffling and random augmentation; stopped in the second of four epochs of five steps."""
    out, log = tmp_path / "digits", tmp_path / "log"
    number = getattr(signal, stop_with)
    code = run_script(SCRIPT, ["--out", str(out), *FOUR], log, SendSignal(number, step=7))
    assert not (out / "summary.json").exists()
    if stop_with == "SIGKILL":
        assert code == -number
    else:
        assert code > 0
        assert f"interrupted.ckpt is written; go on with --resume --out {out}" in log.read_text()
        step = torch.load(out / "checkpoints" / "interrupted.ckpt", weights_only=True)["global_step"]
        assert step == 8  # the step is finished
    assert run_script(SCRIPT, ["--resume", "--out", str(out)], log) == 0, log.read_text()
    torch.testing.assert_close(final_state(out), uninterrupted, rtol=0, atol=0)
    assert "frozen for 5 optimizer steps" in json.loads((out / "summary.json").read_text())["freeze"]
    looks, probes = histories(out)
    assert [(look["epoch"], look["step"]) for look in looks] == [(0, 1), (2, 11)]
    assert [probe["epoch"] for probe in probes] == [0, 3]


@pytest.mark.parametrize("damage", ["truncated", "another file"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(damage, run, tmp_path, capsys):
    out = tmp_path / "digits"
    shutil.copytree(run, out)
    file = out / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>not found</html>")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit):
        main(["--resume", "--out", str(out)])
    assert f"{file} is no whole checkpoint (" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_views_have_their_sizes_and_differ_from_sample_to_sample():
    torch.manual_seed(0)
    images = digits()[0][0][:1].expand(6, 1, 16, 16)
    views = digit_views()(images)
    assert [tuple(view.shape) for view in views] == [(6, 1, 16, 16)] * 2 + [(6, 1, 8, 8)] * 4
    assert len({view.numpy().tobytes() for view in torch.cat([v.flatten(1) for v in views[:2]])}) == 12
    assert np.corrcoef(views[0][0].flatten(), views[1][0].flatten())[0, 1] < 0.99
