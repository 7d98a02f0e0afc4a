import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.photos import QUIET
from helpers.scripts import SendSignal, run_script
from helpers.states import comparable
from lightning.pytorch import seed_everything
from matplotlib import image

from dino_head.cli.fit import FitCLI
from dino_head.examples import fit_digits
from dino_head.examples.dino_module import DINO
from dino_head.examples.fit_digits import build, digit_views, digits, main

SCRIPT = Path(fit_digits.__file__)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
THREE_EPOCHS = ["--epochs", "3", "--batch-size", "64", "--prototypes", "16", "--trainer.limit_train_batches=4", *QUIET]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    main([*THREE_EPOCHS, "--out", str(out)])
    return out


def test_the_split_is_fixed_and_apart():
    (train, train_labels), (test, test_labels) = digits(size=8)
    assert (train.shape, test.shape) == ((1400, 1, 8, 8), (397, 1, 8, 8))
    assert (train.min(), train.max()) == (0, 1)
    assert torch.equal(digits(size=8)[1][0], test)
    assert torch.bincount(torch.cat([train_labels, test_labels])).min() >= 174  # all 1,797 of ten digits
    assert not (train.flatten(1)[:, None] == test.flatten(1)[None]).all(dim=2).any()


def test_the_recipe_trains_the_model_of_build(tmp_path):
    cli = FitCLI(["--config", "digits", "--out", str(tmp_path / "run")])
    seed_everything(0, verbose=False)
    model = build()
    torch.testing.assert_close(cli.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    for name in ("learning_rate", "min_learning_rate", "warmup_epochs", "weight_decay", "clip_per_parameter", "seed"):
        assert getattr(cli.model, name) == getattr(model, name), name
    assert [cli.model.loss.temperature(epoch) for epoch in (0, 50)] == [0.04, 0.04]


def test_the_run_writes_its_files_and_the_comparisons(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {"knn_top1", "knn_top1_raw_pixels", "knn_top1_untrained", "diagnoses", "seconds", "seed", "versions"} <= {
        *summary
    }
    assert summary["knn_top1_raw_pixels"] == pytest.approx(0.985, abs=5e-4)
    assert 0.5 < summary["knn_top1_untrained"] < 1
    assert 0.5 < summary["knn_top1"] <= 1
    assert [row["epoch"] for row in summary["knn_history"]] == [0, 2]
    assert summary["knn_history"][-1]["top1"] == summary["knn_top1"]
    assert summary["receipts"][0].startswith("student.head.last_layer frozen for 4 optimizer steps, bitwise unchanged")
    assert {file.name for file in run.iterdir()} == {
        "checkpoints", "metrics", "curves.json", "report.html", "overview.png", "neighbours.png", "config.yaml",
        "summary.json",
    }  # fmt: skip
    assert image.imread(run / "overview.png").shape[0] > 500
    looks, probes = histories(run)
    assert [look["step"] for look in looks] == [1, 11]
    assert all(0 <= look["teacher_entropy"] <= math.log(16) for look in looks)
    assert [(probe["epoch"], round(probe["top1"], 4)) for probe in probes][1:] == [(2, summary["knn_top1"])]


def histories(run):
    """The histories of monitor and probe, from the checkpoint of the last epoch."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return [saved[name]["history"] for name in ("CollapseMonitorCallback", "KNNProbeCallback")]


def final_state(out):
    """The result of training: teacher, student, center, optimizer, learning rate and number of steps."""
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 2
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return comparable({name: checkpoint[name] for name in names})


def kill(out):
    """In a process of its own, in the seventh step."""
    command = [*THREE_EPOCHS, "--out", str(out)]
    assert run_script(SCRIPT, command, out.parent / "log", SendSignal(signal.SIGKILL, step=6)) == -signal.SIGKILL


def interrupt(out):
    """Ctrl-C in this process."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINO, "on_train_batch_start", on_train_batch_start, raising=False)
        with pytest.raises(SystemExit):
            main([*THREE_EPOCHS, "--out", str(out)])
    signal.signal(signal.SIGINT, handler)  # Lightning leaves one that ignores Ctrl-C
    assert torch.load(out / "checkpoints" / "interrupted.ckpt", weights_only=True)["global_step"] == 7


@pytest.mark.parametrize("stop", [kill, interrupt])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_run_bitwise(stop, run, tmp_path):
    """With the example's own shuffling and random augmentation."""
    out = tmp_path / "digits"
    stop(out)
    assert not (out / "summary.json").exists()
    main(["--resume", "--out", str(out), *QUIET])
    torch.testing.assert_close(final_state(out), final_state(run), rtol=0, atol=0)
    assert "frozen for 4 optimizer steps" in json.loads((out / "summary.json").read_text())["receipts"][0]
    assert [[row["epoch"] for row in history] for history in histories(out)] == [[0, 2], [0, 2]]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the copy has
def test_a_repeated_command_with_resume_continues_with_its_settings(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    before = (out / "checkpoints" / "last.ckpt").read_bytes()
    main([*THREE_EPOCHS, "--resume", "--out", str(out)])
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == before  # the run was complete


def test_views_have_their_sizes_and_differ_from_sample_to_sample():
    torch.manual_seed(0)
    images = digits()[0][0][:1].expand(6, 1, 16, 16)
    views = digit_views()(images)
    assert [tuple(view.shape) for view in views] == [(6, 1, 16, 16)] * 2 + [(6, 1, 8, 8)] * 4
    assert len({view.numpy().tobytes() for view in torch.cat([v.flatten(1) for v in views[:2]])}) == 12
    assert np.corrcoef(views[0][0].flatten(), views[1][0].flatten())[0, 1] < 0.99
