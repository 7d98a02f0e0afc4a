import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.distributed_fits import CAN_SHARD, run_recipe
from helpers.processes import run_in_processes
from PIL import Image

from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)
from dino_head.cli.fit import main

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
CONFIG = RECIPES / "digits.yaml"
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
    trainer = fit("--data.init_args.batch_size=256").trainer
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


# The recipes for GPUs, at reduced width, on CPUs, a batch each.

REDUCED = {
    "model.init_args.backbone.init_args.width": 64,
    "model.init_args.backbone.init_args.depth": 2,
    "model.init_args.backbone.init_args.image_size": 32,
    "model.init_args.head.init_args.input_dim": 64,
    "model.init_args.head.init_args.hidden_dim": 32,
    "model.init_args.head.init_args.bottleneck_dim": 8,
    "model.init_args.head.init_args.output_dim": 64,
    "model.init_args.loss.init_args.output_dim": 64,
    "model.init_args.augment.init_args.global_size": 32,
    "model.init_args.augment.init_args.local_size": 16,
    "data.init_args.batch_size": 4,
    "data.init_args.workers": 0,
    "data.init_args.image_size": 36,
    "data.init_args.eval_size": 32,
    "trainer.accelerator": "cpu",
}
TWO = {"trainer.devices": 2}
SHARDS = {"trainer.strategy.init_args.data_parallel_size": 2}
FILES = {
    "digits": {},
    "volumes": {"trainer.accelerator": "cpu", "data.init_args.batch_size": 4},
    "vits16_1gpu": REDUCED,
    "vits16_8gpus": REDUCED | TWO,
    "vitl16_sharded": REDUCED | TWO | SHARDS,
}


def test_every_recipe_is_tried():
    assert {file.stem for file in RECIPES.iterdir()} == set(FILES)


@pytest.mark.parametrize("recipe", FILES)
def test_a_recipe_runs_at_reduced_width(recipe, tmp_path):
    if recipe == "vitl16_sharded" and not CAN_SHARD:
        pytest.skip("fully_shard of this torch needs a GPU")
    random = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "photos" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    overrides = dict(FILES[recipe])
    if "vit" in recipe:
        overrides["data.init_args.data"] = str(tmp_path / "photos")
    quiet = {"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"}
    overrides |= {"trainer.fast_dev_run": "true", "trainer.default_root_dir": str(tmp_path / "run"), **quiet}
    command = ["cli.py", "fit", "--config", str(RECIPES / f"{recipe}.yaml")]
    (tmp_path / "options.json").write_text(
        json.dumps([*command, *[f"--{name}={value}" for name, value in overrides.items()]])
    )
    ranks = run_in_processes(run_recipe, tmp_path, processes=overrides.get("trainer.devices", 1))
    for rank in ranks:
        assert rank["steps"] == 1
        frozen, followed = rank["receipts"][:2]
        assert frozen.startswith("student.head.last_layer frozen for 1 optimizer steps, bitwise unchanged")
        assert f"on {len(ranks)} of {len(ranks)} ranks" in frozen
        assert followed.startswith("teacher followed student for 1 of 1 optimizer steps")
        assert all(torch.equal(value, rank["state"][name]) for name, value in ranks[0]["state"].items())
