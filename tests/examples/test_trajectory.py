"""A whole run of the authors' loop: what their code computed, the example module and the callbacks compute."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from torch import nn

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback
from dino_head.examples.dino_module import DINO

FIGURES = np.load(Path(__file__).parents[1] / "reference" / "trajectory_dino.npz")
CONFIG = json.loads(str(FIGURES["config"]))


def weights(prefix):
    """The authors' `mlp.{i}` are our `layers.{i}`."""
    return {
        key.removeprefix(prefix).replace("mlp.", "layers."): torch.from_numpy(FIGURES[key])
        for key in FIGURES.files
        if key.startswith(prefix)
    }


class Data:
    """Epoch by epoch, (V, B, features)."""

    def __init__(self):
        self.epochs = iter(FIGURES["data"])

    def __len__(self):
        return CONFIG["batches"]

    def __iter__(self):
        yield from torch.from_numpy(next(self.epochs))


class Watch(Callback):
    """What the authors' loop wrote down."""

    def __init__(self):
        self.losses, self.last_layers, self.rates, self.decays, self.momenta = [], [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.decays.append([group["weight_decay"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        self.last_layers.append(pl_module.student["head"].last_layer.weight_v.detach().clone())


@pytest.fixture(scope="module")
def run():
    backbone = nn.Sequential(nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 12))
    head = DINOProjectionHead(12, 16, 8, 24, batch_norm=False, freeze_last_layer=CONFIG["freeze_epochs"])
    loss = DINOLoss(
        24,
        CONFIG["warmup_teacher_temp"],
        CONFIG["teacher_temp"],
        CONFIG["warmup_teacher_temp_epochs"],
        CONFIG["student_temp"],
        CONFIG["center_momentum"],
    )
    module = DINO(
        backbone,
        head,
        loss,
        augment=list,
        learning_rate=2e-3,
        min_learning_rate=1e-5,
        warmup_epochs=1,
        clip_per_parameter=CONFIG["clip_per_param"],
    )
    for side in (module.student, module.teacher):
        side.load_state_dict(weights("init/"))
    watch = Watch()
    callbacks = [
        FreezeLastLayerCallback(),
        TeacherUpdateCallback(base_momentum=0.9),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
        watch,
    ]
    trainer(*callbacks, max_epochs=CONFIG["epochs"]).fit(module, Data())
    return module, watch


def assert_equal(ours, theirs, atol=1e-6):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-5, atol=atol)


def test_every_loss(run):
    # Losses near 0 are differences of logits over temperature, of 10 and more.
    assert_equal(run[1].losses, FIGURES["losses"], atol=3e-6)


def test_the_schedules(run):
    assert_equal(run[1].rates, FIGURES["lr"])
    decayed, others = zip(*run[1].decays, strict=True)
    assert_equal(decayed, FIGURES["wd"])
    assert others == (0.0,) * len(others)


def test_the_last_layer_along_the_way(run):
    assert_equal(torch.stack(run[1].last_layers[::3]), FIGURES["last_layer_v_per_step"])


def test_the_final_center(run):
    assert_equal(run[0].loss.center.flatten(), FIGURES["center"])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_final_weights(run, side):
    ours, theirs = getattr(run[0], side).state_dict(), weights(f"final_{side}/")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_equal(ours[key], value)
    assert any(not torch.equal(value, weights("init/")[key]) for key, value in theirs.items())
