import json

import pytest
import torch
from helpers.distributed_fits import CAN_SHARD, run_recipe
from helpers.photos import QUIET, TINY_VIT, make_photos
from helpers.processes import run_in_processes

from dino_head.cli.fit import fit
from dino_head.cli.flags import recipes

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*fork.*", "ignore:.*logging interval"
)
VIT = [*TINY_VIT, "--batch-size", "4", "--trainer.accelerator", "cpu"]
TWO = ["--devices", "2"]
# The recipes at reduced width, on CPUs.
REDUCED = {
    "digits": QUIET,
    "images": VIT,
    "vits16_1gpu": VIT,
    "vits16_8gpus": [*VIT, *TWO],
    "vitl16_sharded": [*VIT, *TWO, "--trainer.strategy.data_parallel_size=2"],
    "volumes": [*QUIET, "--batch-size", "4"],
}
GENERATED = "--data.class_path=dino_head.examples.fit_volumes.MadeVolumes"


def test_every_recipe_is_tried():
    assert {*recipes()} == {*REDUCED}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield make_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", REDUCED)
def test_a_recipe_takes_a_step_at_reduced_width(recipe, photos, tmp_path):
    if recipe == "vitl16_sharded" and not CAN_SHARD:
        pytest.skip("fully_shard of this torch needs a GPU")
    data = ["--data", str(photos)] if "--global-size" in REDUCED[recipe] else []
    data += [GENERATED] if recipe == "volumes" else []
    limits = ["--trainer.limit_train_batches=1", "--epochs", "1"]
    command = ["--config", recipe, "--out", str(tmp_path / "run"), *data, *limits, *REDUCED[recipe]]
    if "--devices" in command:
        (tmp_path / "command.json").write_text(json.dumps(command))
        ranks = run_in_processes(run_recipe, tmp_path)
    else:
        cli = fit(command)
        ranks = [{"receipts": cli.results["receipts"], "state": cli.model.state_dict(), "steps": 1}]
        assert cli.trainer.global_step == 1
    for rank in ranks:
        assert rank["steps"] == 1
        frozen, followed = rank["receipts"][:2]
        assert frozen.startswith("student.head.last_layer frozen for 1 optimizer steps, bitwise unchanged")
        assert f"on {len(ranks)} of {len(ranks)} ranks" in frozen
        # At the rate of 0 with which the warm-up begins, the teacher should not change.
        assert followed.startswith("teacher seen to change at 0 of 0 looks, loss.center at 1 of 1")
        assert all(torch.equal(value, rank["state"][name]) for name, value in ranks[0]["state"].items())
    assert len([*(tmp_path / "run" / "checkpoints").glob("*.ckpt")]) == 1
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "interrupted.ckpt").exists()


def changed(recipe, old, new, folder):
    """A copy of a recipe with another word."""
    text = recipes()[recipe].read_text()
    assert old in text
    file = folder / "changed.yaml"
    file.write_text(text.replace(old, new))
    return ["--config", str(file), "--out", str(folder / "run"), *QUIET]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("base_momentum", "base_momentun", "base_momentun"),
        ("base_momentum: 0.996", "base_momentum: fast", "fast"),
        ("[0.04, 0.4]", "0.4", "'tuple'"),
        ("TeacherUpdateCallback", "TeacherUpdate", "TeacherUpdate"),
        ("base_momentum: 0.996", "base_momentum: 1.5", "base_momentum must be a number in [0, 1], got 1.5"),
        ("target: weight_decay", "target: ''", "target must be a name such as"),
        ("freeze_last_layer: 1", "freeze_last_layer: -3", "freeze_last_layer must be an integer >= -1"),
    ],
)
def test_a_wrong_value_in_a_file_is_an_error_of_one_line_with_the_reason(old, new, reason, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit([*changed("images", old, new, tmp_path), *TINY_VIT, "--data", str(photos)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dino-head fit: error: ")
    assert reason in error
