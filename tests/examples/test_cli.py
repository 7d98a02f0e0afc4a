from pathlib import Path

import pytest
import torch
from cli import main

from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)

CONFIG = Path(__file__).parents[2] / "examples" / "digits.yaml"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
OURS = (
    FreezeLastLayerCallback,
    TeacherUpdateCallback,
    ScheduleCallback,
    CollapseMonitorCallback,
    KNNProbeCallback,
)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    return lambda *options, change=("", ""): run(tmp_path, monkeypatch, options, change)


def run(tmp_path, monkeypatch, options, change):
    file = tmp_path / "config" / "digits.yaml"
    file.parent.mkdir()
    text = CONFIG.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change).replace("runs/digits-yaml", str(tmp_path / "run")))
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    monkeypatch.setattr(
        "sys.argv", ["cli.py", "fit", "--config", str(file), "--trainer.max_epochs=1", *quiet, *options]
    )
    return main()


def test_the_file_runs_with_all_callbacks(fit, tmp_path):
    trainer = fit("--data.batch_size=256").trainer
    receipts = [callback.receipt for callback in trainer.callbacks if isinstance(callback, OURS)]
    assert (tmp_path / "run" / "report.html").exists()
    beginnings = [
        "student.head.last_layer frozen",
        "teacher followed student",
        "weight_decay from 0.04 to 0.365623",
        "looked at 1 of 5 batches, last with loss ",
        "knn/top1 0.",
    ]
    assert [begin for receipt, begin in zip(receipts, beginnings, strict=True) if not receipt.startswith(begin)] == []
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["callbacks"]
    assert {state["receipt"] for state in saved.values() if state.get("receipt")} == set(receipts)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("base_momentum", "base_momentun"), "base_momentun"),
        (("base_momentum: 0.98", "base_momentum: fast"), "Expected a <class 'float'>. Got value: fast"),
        (("[0.04, 0.4]", "0.4"), "tuple[float, float]"),
        (("TeacherUpdateCallback", "TeacherUpdate"), "TeacherUpdate"),
    ],
)
def test_a_wrong_name_or_type_gets_the_reason(change, reason, fit, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:  # older versions of jsonargparse raise some of them
        fit(change=change)
    assert reason in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("base_momentum: 0.98", "base_momentum: 1.5"), r"base_momentum must be a number in \[0, 1\], got 1.5"),
        (("target: weight_decay", "target: ''"), "target must be a name such as"),
        (("freeze_last_layer: 1", "freeze_last_layer: -3"), "freeze_last_layer must be an integer >= -1"),
    ],
)
def test_a_wrong_value_gets_the_reason(change, reason, fit):
    with pytest.raises(ValueError, match=reason):
        fit(change=change)
