"""Backbones with patch tokens and masks: the tokens are those of the model, and masks act where they should."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from dino_head import DINOProjectionHead, multicrop_forward
from dino_head.vision import TokenFeatures, check_backbone

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 14,
    "image_size": 42,
}


def vit(**options):
    return ViTModel(ViTConfig(**TINY), add_pooling_layer=False, **options)


# Each with the number of tokens before the patches.
TRANSFORMERS = {
    "DINOv2": (lambda: Dinov2Model(Dinov2Config(**TINY)), 1, {}),
    "registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)), 4, {}),
    "DINOv3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_register_tokens=2)), 3, {}),
    "ViT": (lambda: vit(use_mask_token=True), 1, {"interpolate_pos_encoding": True}),
}


class Authors(nn.Module):
    """A model with the interface of the authors' code."""

    patch_size = 14

    def __init__(self):
        super().__init__()
        self.embed, self.mask_token = nn.Conv2d(3, 32, 14, 14), nn.Parameter(torch.zeros(1, 32))
        self.mix = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)

    def forward_features(self, x, masks=None):
        tokens = self.embed(x).flatten(2).mT
        if masks is not None:
            tokens = torch.where(masks[..., None], self.mask_token, tokens)
        tokens = self.mix(torch.cat([tokens.new_ones(len(x), 1, 32), tokens], dim=1))
        return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:], "masks": masks}


class Volumes(nn.Module):
    """A transformer for volumes that takes no masks: patches of 4 x 4 x 2 voxels, positions, no class token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv3d(1, 32, (4, 4, 2), (4, 4, 2)), nn.Flatten(2))
        self.positions = nn.Parameter(torch.randn(8, 32))
        self.mix = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)

    def forward(self, volumes):
        tokens = self.embed(volumes).mT
        return self.mix(tokens + self.positions[: tokens.shape[1]])


def mean_and_patches(tokens):
    return tokens.mean(dim=1), tokens


def volumes():
    return TokenFeatures(Volumes(), "embed.0", mean_and_patches)


BACKBONES = {
    **{
        name: lambda make=make, options=options: TokenFeatures(make(), **options)
        for name, (make, _, options) in TRANSFORMERS.items()
    },
    "authors": lambda: TokenFeatures(Authors()),
    "volumes": volumes,
}


def made(name):
    """A backbone in evaluation mode, with a mask token that is not zero."""
    torch.manual_seed(0)
    backbone = BACKBONES[name]().eval()
    for parameter_name, parameter in backbone.named_parameters():
        if parameter_name.endswith("mask_token"):
            nn.init.normal_(parameter)
    return backbone


def views_for(name):
    """Two images for each of two sizes."""
    torch.manual_seed(1)
    if name == "volumes":
        return [torch.randn(2, 1, 8, 8, 4), torch.randn(2, 1, 8, 4, 4)]
    return [torch.randn(2, 3, size, size) for size in (42, 28)]


def masks_for(backbone, view, patch=1):
    count = backbone(view)[1].shape[1]
    masks = torch.zeros(2, count, dtype=torch.bool)
    masks[0, patch] = True
    return masks


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_tokens_are_those_of_the_model_of_transformers(name):
    backbone, (_, first_patch, options) = made(name), TRANSFORMERS[name]
    assert backbone.patch_size == (14, 14)
    for view in views_for(name):
        for masks in (None, masks_for(backbone, view)):
            tokens = backbone.model(view, bool_masked_pos=masks, **options).last_hidden_state
            cls, patches = backbone(view, masks)
            assert patches.shape == (2, (view.shape[-1] // 14) ** 2, 32)
            torch.testing.assert_close((cls, patches), (tokens[:, 0], tokens[:, first_patch:]), rtol=0, atol=0)


def test_the_tokens_are_those_of_forward_features():
    backbone = made("authors")
    assert backbone.patch_size == (14, 14)
    for view in views_for("authors"):
        for masks in (None, masks_for(backbone, view)):
            tokens = backbone.model.forward_features(view, masks)
            expected = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]
            torch.testing.assert_close(backbone(view, masks), expected)


def test_a_named_convolution_gets_the_mask_token_before_the_positions():
    backbone = made("volumes")
    assert backbone.patch_size == (4, 4, 2)
    assert backbone.mask_token.shape == (1, 32)
    (view, _), model = views_for("volumes"), backbone.model
    masks = torch.rand(2, 8) < 0.4
    tokens = model.embed(view).mT
    for image in range(2):
        for patch in range(8):
            if masks[image, patch]:
                tokens[image, patch] = backbone.mask_token[0]
    expected = model.mix(tokens + model.positions)
    torch.testing.assert_close(backbone(view, masks), (expected.mean(dim=1), expected))
    torch.testing.assert_close(backbone(view)[1], model(view))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_masked_patch_is_not_seen(name):
    """Pixels under a mask do not matter; pixels beside it do."""
    backbone, (view, _) = made(name), views_for(name)
    masks = masks_for(backbone, view, patch=1)
    *leading, last = backbone.patch_size
    beside, under = view.clone(), view.clone()
    under[(0, slice(None), *map(slice, leading), slice(last, 2 * last))] += 1.0  # the second patch along the last axis
    beside[0, :, -1] += 1.0
    for before, after in zip(backbone(view, masks), backbone(under, masks), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert not torch.allclose(backbone(view)[1], backbone(under)[1], atol=1e-3)
    assert not torch.allclose(backbone(view, masks)[1], backbone(beside, masks)[1], atol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_without_a_masked_patch_is_as_without_masks(name):
    backbone, (view, _) = made(name), views_for(name)
    for plain, masked in zip(backbone(view), backbone(view, masks_for(backbone, view)), strict=True):
        torch.testing.assert_close(masked[1], plain[1])
        assert not torch.allclose(masked[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_mask_token_is_trained(name):
    backbone, views = made(name).train(), views_for(name)
    backbone(views[0], masks_for(backbone, views[0]))[1].square().sum().backward()
    (gradient,) = [p.grad for key, p in backbone.named_parameters() if key.endswith("mask_token")]
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_views_with_masks_go_through_with_multicrop_forward(name):
    backbone, (large, small) = made(name), views_for(name)
    masks = torch.rand(4, backbone(large)[1].shape[1]) < 0.4
    cls, patches = multicrop_forward(backbone, [large, large.flip(-1), small], masks)
    expected = [backbone(large, masks[:2]), backbone(large.flip(-1), masks[2:]), backbone(small)]
    torch.testing.assert_close(cls, torch.stack([pair[0] for pair in expected]))
    torch.testing.assert_close(patches, [pair[1] for pair in expected])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_check_passes_and_the_mode_stays(name):
    backbone, views = made(name), views_for(name)
    head = DINOProjectionHead(32, 8, 4, 16)
    check_backbone(backbone, head, views, patch_head=head)
    assert not any(module.training for module in backbone.modules())
    check_backbone(backbone.train(), head, views, patch_head=DINOProjectionHead(32, 8, 4, 8))
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_uses_its_own_mask_token_and_masks(make_copy):
    student, (view, _) = made("volumes"), views_for("volumes")
    masks = masks_for(student, view)
    teacher = make_copy(student)
    expected = student(view, masks)[1]
    torch.testing.assert_close(teacher(view, masks)[1], expected)
    nn.init.normal_(teacher.mask_token)
    assert not torch.allclose(teacher(view, masks)[1][0], expected[0], atol=1e-3)
    torch.testing.assert_close(student(view, masks)[1], expected)
    torch.testing.assert_close(teacher(view)[1], student(view)[1])
    teacher(view, masks)[1].sum().backward()
    assert student.mask_token.grad is None
    assert teacher.mask_token.grad is not None


@pytest.mark.slow
def test_a_compiled_backbone_uses_the_masks_of_each_call():
    backbone, (view, _) = made("volumes"), views_for("volumes")
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    for masks in (masks_for(backbone, view), None, masks_for(backbone, view, patch=2)):
        torch.testing.assert_close(compiled(view, masks), backbone(view, masks))


def test_masks_do_not_outlive_their_forward():
    backbone, (view, _) = made("volumes"), views_for("volumes")
    expected, masks = backbone.model(view), masks_for(backbone, view)
    backbone(view, masks)
    torch.testing.assert_close(backbone.model(view), expected)
    backbone.pick = lambda output: 1 / 0
    with pytest.raises(ZeroDivisionError):
        backbone(view, masks)
    torch.testing.assert_close(backbone.model(view), expected)


@pytest.mark.slow
def test_a_vit_of_monai_for_volumes():
    pytest.importorskip("einops", reason="the blocks of MONAI's ViT need it")
    from monai.networks.nets import ViT

    torch.manual_seed(0)
    model = ViT(1, 32, (16, 16, 8), hidden_size=24, mlp_dim=48, num_layers=2, num_heads=2)
    backbone = TokenFeatures(
        model, "patch_embedding.patch_embeddings", lambda output: (output[0].mean(dim=1), output[0])
    )
    head = DINOProjectionHead(24, 8, 4, 16)
    views = [torch.randn(2, 1, 32, 32, 32)] * 2
    check_backbone(backbone, head, views, patch_head=head)
    assert backbone.patch_size == (16, 16, 8)
    masks = torch.rand(4, 2 * 2 * 4) < 0.4
    cls, patches = multicrop_forward(backbone, views, masks)
    assert (cls.shape, patches[1].shape) == ((2, 2, 24), (2, 16, 24))
    # All masked patches of an image look alike before the positions are added, and not after it.
    nn.init.zeros_(model.patch_embedding.position_embeddings)
    image, (first, second, *_) = 0, masks[0].nonzero().flatten()
    tokens = backbone(views[0], masks[:2])[1][image]
    torch.testing.assert_close(tokens[first], tokens[second])
    nn.init.normal_(model.patch_embedding.position_embeddings)
    tokens = backbone(views[0], masks[:2])[1][image]
    assert not torch.allclose(tokens[first], tokens[second], atol=1e-2)


def deit():
    return TokenFeatures(DeiTModel(DeiTConfig(**TINY), add_pooling_layer=False, use_mask_token=True))


class WithoutSize(Authors):
    patch_size = None


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TokenFeatures(Volumes()), r"Volumes takes no masks: .* \(its convolutions: \['embed.0'\]\), and pick"),
    (lambda: TokenFeatures(Volumes(), "embed", mean_and_patches),
     r"Volumes has no convolution 'embed': .* one of \['embed.0'\]"),
    (lambda: TokenFeatures(Volumes(), "embed.0"), "go together, got patch_embedding='embed.0' and pick=None"),
    (lambda: TokenFeatures(Authors(), pick=mean_and_patches), "go together, got patch_embedding=None and pick=<func"),
    (lambda: TokenFeatures(vit()), "ViTModel has no mask token: create it with use_mask_token=True"),
    (lambda: TokenFeatures(Dinov2Model(Dinov2Config(**TINY, use_mask_token=False))), "Dinov2Model has no mask token"),
    (lambda: TokenFeatures(WithoutSize()), "WithoutSize has no patch_size: set it"),
    (lambda: deit()(torch.randn(2, 3, 42, 42)),
     r"patch tokens \(B, 9, D\) from DeiTModel for images of \(42, 42\) in patches of \(14, 14\), got a tuple of "
     r"\[\(2, 32\), \(2, 10, 32\)\]: pass patch_embedding"),
    (lambda: TokenFeatures(Volumes(), "embed.0", lambda tokens: tokens)(torch.randn(2, 1, 8, 8, 4)),
     r"patch tokens \(B, 8, D\) from Volumes .* got a tensor of shape \(2, 8, 32\)"),
    (lambda: made("DINOv2")(torch.randn(2, 3, 42, 42), torch.zeros(2, 4, dtype=torch.bool)),
     r"bool \(2, 9\) for 2 images of \(42, 42\) in patches of \(14, 14\), got \(2, 4\) in torch.bool"),
    (lambda: made("volumes")(torch.randn(2, 1, 8, 8, 4), torch.zeros(2, 8)), r"got \(2, 8\) in torch.float32"),
])  # fmt: skip
def test_models_and_arguments_that_do_not_fit_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
