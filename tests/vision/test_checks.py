"""check_backbone with backbones that return class and patch tokens; for others, see test_backbones.py."""

import pytest
import torch
from torch import nn

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.vision import check_backbone

VIEWS = [torch.randn(2, 3, size, size) for size in (8, 8, 4)]
FIRST = torch.tensor([[True], [False]])


class Tokens(nn.Module):
    """Embeddings of patches of 4 x 4 pixels, a mask token in place of masked ones, and their mean as class token."""

    patch_size = (4, 4)

    def __init__(self):
        super().__init__()
        self.embed, self.mask_token = nn.Conv2d(3, 6, 4, 4, bias=False), nn.Parameter(torch.zeros(6))

    def forward(self, images, masks=None):
        tokens = self.embed(images).flatten(2).mT
        if masks is not None:
            tokens = torch.where(masks[..., None], self.mask_token, tokens)
        return tokens.mean(dim=1), tokens


def changed(function, **attributes):
    """A class of backbones: a function maps the tokens, images and masks to the output."""

    class Changed(Tokens):
        def forward(self, images, masks=None):
            return function(super().forward, images, masks)

    for name, value in attributes.items():
        setattr(Changed, name, value)
    return Changed()


def without_masks():
    backbone = Tokens()
    backbone.forward = lambda images: Tokens.forward(backbone, images)
    return backbone


def heads(width=6):
    return DINOProjectionHead(6, 8, 4, 16), DINOProjectionHead(width, 8, 4, 16)


@pytest.mark.parametrize("black", [False, True])
def test_a_backbone_that_keeps_the_contract_passes_and_nothing_changes(black):
    """Black images, whose embeddings equal the mask token at the start, pass as well."""
    torch.manual_seed(0)
    backbone, (head, patch_head), loss = Tokens(), heads(), DINOLoss(16)
    parts = nn.ModuleList([backbone, head, patch_head, loss])
    before, random = {name: value.clone() for name, value in parts.state_dict().items()}, torch.get_rng_state()
    views = [torch.zeros_like(view) for view in VIEWS] if black else VIEWS
    check_backbone(backbone, head, views, loss, patch_head=patch_head)
    check_backbone(backbone, head, views, patch_head=head)
    check_backbone(backbone, head, [view[:1] for view in views])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    assert all(module.training for module in parts.modules())


def test_a_change_as_small_as_that_of_a_layer_scale_is_seen():
    def scaled(tokens, images, masks):
        plain, masked = tokens(images, None), tokens(images, masks)
        return plain[0], plain[1] + 1e-5 * (masked[1] - plain[1])

    check_backbone(changed(scaled), heads()[0], VIEWS)


def test_the_check_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        check_backbone(Tokens(), heads()[0], VIEWS, patch_head=heads()[1])


@pytest.mark.parametrize(("backbone", "message"), [
    (changed(lambda tokens, images, masks: tokens(images)), "ignores masks: a masked patch does not change"),
    (without_masks(), r"cannot take masks \(2, 4\) for views of 8 x 8 \(TypeError: .* forward\(images, masks=None\)"),
    (changed(lambda tokens, images, masks: tokens(images, None if masks is None else masks[:1].expand_as(masks))),
     "the mask of one image for another"),
    (changed(lambda tokens, images, masks: tokens(images, None if masks is None else masks.flip(0))),
     "the mask of one image for another"),
    (changed(lambda tokens, images, masks: tokens(images, None if masks is None else masks & masks[:1] & masks[-1:])),
     "ignores masks"),
    (changed(lambda tokens, images, masks: tokens(images, None if masks is None else masks & FIRST)), "ignores masks"),
    (changed(lambda tokens, images, masks: tokens(images, masks) if masks is None else tokens(images)[0]),
     r"same shapes with masks as without, a tuple of \[\(2, 6\), \(2, 4, 6\)\], got a tensor of shape \(2, 6\)"),
    (changed(lambda tokens, images, masks: (tokens(images)[0], tokens(images)[1][:, 0 if masks is None else 1 :])),
     r"got a tuple of \[\(2, 6\), \(2, 3, 6\)\]: replace masked patches instead of leaving them out"),
    (changed(lambda tokens, images, masks: tokens(images if masks is None else images / 0)), "not finite: check its"),
    (changed(lambda tokens, images, masks: (tokens(images)[0], torch.cat(tokens(images)[1:] * 2, dim=1))),
     r"must return patch tokens \(2, 4, D\) for 2 views of 8 x 8 in patches of \(4, 4\), got \(2, 8, 6\)"),
    (changed(lambda tokens, images, masks: tokens(images, masks), patch_size=4),
     r"attribute patch_size, a tuple .* each of the 2 axes .* \(16, 16\), got 4"),
    (changed(lambda tokens, images, masks: tokens(images, masks), patch_size=(4, 4, 4)), r"got \(4, 4, 4\)"),
    (changed(lambda tokens, images, masks: tokens(images, masks), patch_size=(4.0, 4.0)), r"got \(4.0, 4.0\)"),
    (changed(lambda tokens, images, masks: tokens(images, masks), patch_size=None), "got None"),
    (changed(lambda tokens, images, masks: (tokens(images)[0][:, :5], tokens(images)[1])),
     "returns 5 features, but the head expects 6"),
    (changed(lambda tokens, images, masks: (tokens(images)[0], tokens(images)[1][..., :5])),
     r"5 features of a patch, but the patch_head expects 6: use DINOProjectionHead\(input_dim=5"),
    (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6)),
     r"patch_head needs a backbone .* got a tensor of shape \(2, 6\): use dino_head.vision.TokenFeatures"),
])  # fmt: skip
def test_a_backbone_that_breaks_the_contract_raises(backbone, message):
    head, patch_head = heads()
    with pytest.raises(ValueError, match=message):
        check_backbone(backbone, head, VIEWS, patch_head=patch_head)
    assert all(module.training for module in (backbone, head, patch_head))


def test_a_patch_head_of_another_type_raises():
    head, patch_head = heads()
    with pytest.raises(ValueError, match=r"patch_head cannot take .* a patch \(2, 6\) in torch.float32 .* one type"):
        check_backbone(Tokens(), head, VIEWS, patch_head=patch_head.bfloat16())
