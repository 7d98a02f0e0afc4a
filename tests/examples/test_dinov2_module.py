import copy
import functools
import math

import pytest
import torch
from helpers.tiny_dino import crops, view_loader
from helpers.tiny_dinov2 import TinyDINOv2, TokenBackbone, tiny_dinov2
from helpers.toy_training import trainer
from torch import nn

from dino_head import DINOLoss, DINOProjectionHead, FactoredLogits, IBOTPatchLoss, dino_loss, koleo_loss
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback
from dino_head.examples.dinov2_module import DINOv2
from dino_head.functional.ibot import reference_ibot_patch_loss

dinov2 = functools.partial(tiny_dinov2, make_optimizer=None)


@pytest.mark.parametrize("shared_head", [True, False])
def test_a_training_step_returns_the_loss_of_the_definition(shared_head):
    """Every token goes through the heads here, and the plain loss of masked patches picks its own."""
    module = dinov2(shared_head=shared_head)
    for parameter in module.student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # away from the teacher
    images = torch.randn(4, 1, 8, 8)
    views, masks = module.views(images, 0)
    flat = masks.flatten(1)
    assert 0 < masks.sum() < masks.numel()

    def logits(side, masks):
        patch_head = side["head"] if shared_head else side["patch_head"]
        (first, patches), (other, _) = side["backbone"](torch.cat(views[:2]), masks), side["backbone"](views[2])
        tokens = torch.stack([*first.chunk(2), other])
        return tokens, side["head"](tokens), patch_head(patches)

    _, teacher, teacher_patches = logits(module.teacher.eval(), None)
    tokens, student, student_patches = logits(module.student, flat)
    dino = dino_loss(teacher[:2], student, teacher_temp=0.04)
    ibot = reference_ibot_patch_loss(teacher_patches, student_patches, flat, teacher_temp=0.04)
    expected = dino + ibot + 0.1 * (koleo_loss(tokens[0]) + koleo_loss(tokens[1]))
    module.log_dict = lambda *args, **options: None
    module._trainer = trainer()
    assert module.training_step(images, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_never_computes_the_logits(monkeypatch):
    monkeypatch.setattr(FactoredLogits, "logits", lambda *args: pytest.fail("multiplied"))
    trainer(max_epochs=1).fit(dinov2(), view_loader())


def test_only_the_students_global_views_are_masked():
    module, seen = dinov2(), []
    for side in (module.student, module.teacher):
        side["backbone"].register_forward_pre_hook(
            lambda backbone, inputs: seen.append((backbone.training, inputs[0].shape[2], *inputs[1:]))
        )
    expected = module.views(torch.zeros(4, 1, 8, 8), 0)[1].flatten(1)
    trainer(max_steps=1).fit(module, view_loader())
    (*student_global, masks), student_local, teacher_global = sorted(seen, key=len, reverse=True)
    assert student_global == [True, 8]
    assert torch.equal(masks, expected)
    assert sorted([student_local, teacher_global]) == [(False, 8), (True, 4)]  # without masks


def test_masks_are_made_on_the_cpu_and_follow_seed_epoch_and_batch():
    module = dinov2()
    images = torch.randn(4, 1, 8, 8)
    (_, first), (_, again), (_, other) = (module.views(images, index) for index in (0, 0, 1))
    assert first.device.type == "cpu"
    assert first.shape == (8, 4, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    module.seed = 1
    assert not torch.equal(module.views(images, 0)[1], first)


def test_the_teacher_stays_in_evaluation_mode_and_drop_path_acts_on_the_student_alone():
    module = dinov2(backbone=TokenBackbone(drop=0.5))
    modes = []
    module.student["backbone"].eval()  # as from_pretrained leaves it
    module = dinov2(Validated, backbone=module.student["backbone"])
    for side in (module.student, module.teacher):
        side["backbone"].drop.register_forward_hook(lambda drop, inputs, out: modes.append(drop.training))
    trainer(FreezeLastLayerCallback(), TeacherUpdateCallback(), max_epochs=2).fit(
        module, view_loader(2), view_loader(1)
    )
    assert sorted(modes) == [False] * 4 + [True] * 4 * 2
    module.train()
    assert module.student["backbone"].drop.training
    assert not any(part.training for part in module.teacher.modules())


class Validated(TinyDINOv2):
    def validation_step(self, batch, batch_idx):
        assert not self.training


@pytest.mark.parametrize("part", ["head", "patch_head", "backbone"])
def test_batch_norm_is_refused(part):
    parts = {
        "patch_head": None,
        "backbone": dinov2().student["backbone"],
        "head": DINOProjectionHead(8, 8, 4, 16, False),
    }
    if part == "backbone":
        parts["backbone"].norm = nn.BatchNorm1d(8)
    else:
        parts[part] = DINOProjectionHead(8, 8, 4, 16)
    with pytest.raises(
        ValueError, match=r"got a backbone or head with batch norm, .* set batch_norm=False in DINOProj"
    ):
        DINOv2(**parts, loss=DINOLoss(16), patch_loss=IBOTPatchLoss(16), augment=crops)


def test_each_part_is_clipped_by_itself():
    module = dinov2(clip=1e-3)
    norms = {}
    clip = module.configure_gradient_clipping

    def spy(*args, **options):
        clip(*args, **options)
        norms.update({name: nn.utils.get_total_norm([p.grad for p in part.parameters()]).item()
                      for name, part in module.student.items()})  # fmt: skip

    module.configure_gradient_clipping = spy
    trainer(max_steps=1).fit(module, view_loader())
    assert norms == pytest.approx(dict.fromkeys(("backbone", "head", "patch_head"), 1e-3), rel=1e-2)


def test_the_learning_rates_fall_from_the_heads_to_the_embeddings():
    module = dinov2(learning_rate=1e-2, layer_decay=0.5, patch_embed_lr_mult=0.2, warmup_epochs=0)
    rates = {}
    trainer(max_steps=1).fit(module, view_loader())
    names = {id(parameter): name for name, parameter in module.student.named_parameters()}
    for group in module.trainer.optimizers[0].param_groups:
        rates |= {names[id(parameter)]: group["initial_lr"] for parameter in group["params"]}
    assert rates["backbone.patch_embed.weight"] == pytest.approx(1e-2 * 0.5**3 * 0.2)
    assert rates["backbone.mask_token"] == pytest.approx(1e-2 * 0.5**3)
    assert rates["backbone.blocks.0.attn.weight"] == pytest.approx(1e-2 * 0.5**2)
    assert rates["backbone.blocks.1.attn.weight"] == pytest.approx(1e-2 * 0.5)
    assert rates["head.layers.0.weight"] == rates["patch_head.last_layer.weight_v"] == 1e-2


def test_a_batch_of_one_image_is_refused():
    """KoLeo has no neighbour in it."""
    with pytest.raises(ValueError, match="koleo_loss needs a sample and 2 candidates, got 1 and 1: use a larger batch"):
        trainer(max_steps=1).fit(dinov2(), view_loader(batch_size=1))


def test_the_terms_are_logged_as_means_over_each_epoch_and_add_up():
    module = dinov2()
    trainer(max_epochs=1).fit(module, view_loader())
    logged = module.trainer.callback_metrics
    total = logged["dino"] + logged["ibot"] + 0.1 * logged["koleo"]
    assert logged["loss"].item() == pytest.approx(total.item())


def test_the_published_rules_run_together():
    module = dinov2(shared_head=False)
    before = copy.deepcopy(module.student)
    rules = [
        FreezeLastLayerCallback(steps=4),
        TeacherUpdateCallback(base_momentum=0.992),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
    ]
    trainer(*rules, max_epochs=1).fit(module, view_loader())
    for name in ("head", "patch_head"):
        assert torch.equal(module.student[name].last_layer.weight_v, before[name].last_layer.weight_v)
        assert not torch.equal(module.student[name].layers[0].weight, before[name].layers[0].weight)
    assert not torch.equal(module.student["backbone"].mask_token, before["backbone"].mask_token)
    assert math.isfinite(module.trainer.callback_metrics["loss"])


def test_a_subclass_may_provide_the_masks():
    class Unmasked(TinyDINOv2):
        def views(self, batch, batch_idx):
            views, masks = super().views(batch, batch_idx)
            return views, torch.zeros_like(masks)

    module = dinov2(Unmasked)
    trainer(max_epochs=1).fit(module, view_loader())
    assert module.trainer.callback_metrics["ibot"] == 0
