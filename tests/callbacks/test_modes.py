"""Modes that would silently change the method are reported when training starts."""

import copy
import warnings

import pytest
import torch
from helpers.layouts import InDicts, batches, copied
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from dino_head import DINOLoss
from dino_head.callbacks import CollapseMonitorCallback, FreezeLastLayerCallback, TeacherUpdateCallback


class BatchNorm(nn.BatchNorm1d):
    """Over all leading dimensions."""

    def forward(self, x):
        return super().forward(x.flatten(end_dim=-2)).view_as(x)


class DropPath(nn.Module):
    """Of any library: known by its name and its rate."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


def module(*parts):
    """The parts follow the student's backbone, and copies of them the teacher's."""
    made = InDicts()
    made.student["backbone"].extend(parts)
    made.teacher = copied(made.student)
    return made


def fit(made, *callbacks):
    """The warnings about modes."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        trainer(*(callbacks or (TeacherUpdateCallback(),)), max_epochs=2).fit(made, batches(2))
    texts = [str(warning.message) for warning in given]
    return [text for text in texts if "mode" in text and text.startswith("the ")]


def set_mode(training, *names):
    def change(made):
        for name in names:
            made.get_submodule(name).train(training)

    return change


@pytest.mark.parametrize(
    "callback", [TeacherUpdateCallback, CollapseMonitorCallback, lambda: FreezeLastLayerCallback(1)]
)
def test_a_loss_with_a_center_in_evaluation_mode_raises(callback):
    made = module()
    made.eval()
    with pytest.raises(
        MisconfigurationException, match=r"loss is in evaluation mode, .*center is never updated.*call model.train"
    ):
        fit(made, callback())


@pytest.mark.parametrize("loss", [DINOLoss(16, centering="sinkhorn"), DINOLoss(16, center_momentum=1.0)])
def test_a_loss_whose_center_does_not_move_may_be_in_evaluation_mode(loss):
    made = module()
    made.loss = loss.eval()
    assert not fit(made)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_a_nan_is_found_in_a_loss_in_evaluation_mode():
    made = module()
    made.loss = DINOLoss(16, centering="sinkhorn").eval()
    before = copy.deepcopy(made.state_dict())
    data = torch.utils.data.DataLoader(torch.full((8, 8), torch.nan), batch_size=4)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer(TeacherUpdateCallback()).fit(made, data)
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "part",
    [
        nn.Dropout(0.1),
        BatchNorm(8),
        DropPath(0.1),
        nn.TransformerEncoderLayer(8, 2, dropout=0.1, batch_first=True),
        nn.MultiheadAttention(8, 2, dropout=0.1),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_student_in_evaluation_mode_raises(part):
    made = module()
    made.student["extra"] = part
    made.student.eval()
    message = r"the student is trained with student.extra.* in evaluation mode: .*student.train\(\)"
    with pytest.raises(MisconfigurationException, match=message):
        fit(made, FreezeLastLayerCallback(1))


@pytest.mark.parametrize(
    "part",
    [nn.Dropout(0.0), nn.LayerNorm(8), DropPath(0.0), BatchNorm(8, track_running_stats=False)],
)
def test_modules_that_act_alike_in_both_modes_may_be_in_evaluation_mode(part):
    made = module(part)
    made.student.eval()
    assert not fit(made)


def test_a_student_partly_in_evaluation_mode_is_named():
    made = module(nn.Dropout(0.1), BatchNorm(8))
    made.student["backbone"][3].eval()
    made.teacher["backbone"][3].p = 0.0
    (text,) = fit(made)
    assert text.startswith("the student is trained with student.backbone.3 in evaluation mode")
    assert "student.train()" in text


def test_from_pretrained_leaves_the_backbone_in_evaluation_mode(tmp_path):
    """The root and the student are in training mode, the model inside of them is not."""
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14, drop_path_rate=0.1)
    Dinov2Model(config).save_pretrained(tmp_path)
    made = module()
    made.student["model"] = Dinov2Model.from_pretrained(tmp_path)
    assert made.student.training
    with pytest.raises(MisconfigurationException, match=r"student.model.* in evaluation mode: .*from_pretrained\(\)"):
        fit(made)


def test_batch_norm_that_is_frozen_on_purpose_causes_a_warning():
    made = module(BatchNorm(8))
    made.student["backbone"][3].eval()
    made.teacher["backbone"][3].eval()  # as the student's
    (text,) = fit(made)
    assert "If batch norm is frozen on purpose, ignore this" in text


def test_a_teacher_with_batch_norm_in_evaluation_mode_is_named_with_both_remedies():
    made = module(BatchNorm(8))
    made.teacher.eval()
    (text,) = fit(made)
    assert text.startswith("the teacher's batch norm (teacher.backbone.3) is in evaluation mode")
    assert "running statistics keep their initial values" in text
    assert "teacher.train()" in text
    assert "DINOProjectionHead(batch_norm=False)" in text


def test_a_teacher_without_batch_norm_may_be_in_evaluation_mode():
    made = module(nn.Dropout(0.1), DropPath(0.1))
    made.teacher.eval()
    assert not fit(made)


@pytest.mark.parametrize("norms", [False, True])
def test_a_teacher_that_acts_randomly_is_named_with_the_remedy(norms):
    made = module(DropPath(0.1), *([BatchNorm(8)] if norms else []))
    (text,) = fit(made)
    assert text.startswith("the teacher acts randomly (teacher.backbone.3 in training mode")
    assert ('Call self.get_submodule("teacher.backbone.3").eval()' if norms else "Call teacher.eval()") in text


def test_random_positions_act_randomly():
    config = DINOv3ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16
    )
    made = module()
    made.student["model"] = DINOv3ViTModel(config)
    made.teacher["model"] = copied(made.student["model"])
    (text,) = fit(made)
    assert "teacher.model.rope_embeddings" in text


def test_modes_are_those_of_the_first_batch_and_are_judged_again_in_each_epoch():
    """Hooks of the module and of other callbacks may set them after ours."""

    class Sets(Callback):
        def __init__(self, epoch, training):
            self.epoch, self.training = epoch, training

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == self.epoch:
                pl_module.train(self.training)

    made = module(BatchNorm(8))
    made.eval()
    assert not fit(made, TeacherUpdateCallback(), Sets(0, True))
    with pytest.raises(MisconfigurationException, match="loss is in evaluation mode"):
        fit(module(), TeacherUpdateCallback(), Sets(1, False))


def test_other_names_come_from_the_pairs():
    made = InDicts()
    made.student["backbone"].append(BatchNorm(8))
    made.teacher = copied(made.student)
    made.teacher.eval()
    pairs = (("student.backbone", "teacher.backbone"), ("student.head", "teacher.head"))
    (text,) = fit(made, TeacherUpdateCallback(pairs))
    assert "(teacher.backbone.3)" in text
    assert "Call teacher.backbone.train()" in text


@pytest.mark.parametrize("part", [nn.Dropout(0.1), BatchNorm(8)])
def test_a_frozen_backbone_may_be_in_evaluation_mode(part):
    made = module(part)
    made.student["backbone"].requires_grad_(False).eval()
    made.teacher.eval()
    assert not fit(made, TeacherUpdateCallback((("student.head", "teacher.head"),)))
    assert not fit(made, FreezeLastLayerCallback(1))


class Counts(nn.Module):
    """Numbers that are no rates, and a name that only contains the letters of RoPE."""

    num_dropped_tokens = 4

    def __init__(self):
        super().__init__()
        self.drop_last_n, self.dropout_seed, self.config = 4, 7, {"pos_embed_shift": 0.1}

    def forward(self, x):
        return x


class PropertyHead(Counts):
    pass


@pytest.mark.parametrize("kind", [Counts, PropertyHead])
def test_other_numbers_are_no_rates(kind):
    assert not fit(module(kind()))
