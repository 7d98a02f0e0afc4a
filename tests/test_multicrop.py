import pytest
import torch
from torch import nn

from dino_head import multicrop_forward


def test_each_resolution_goes_through_once_and_the_order_stays():
    shapes = []

    def backbone(x):
        shapes.append(tuple(x.shape))
        return x.mean(dim=(2, 3))

    sizes = [16, 8, 16, 8, 8]
    views = [torch.full((4, 3, size, size), float(index)) for index, size in enumerate(sizes)]
    features = multicrop_forward(backbone, views)
    assert shapes == [(8, 3, 16, 16), (12, 3, 8, 8)]
    assert features.shape == (5, 4, 3)
    assert features[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_equals_one_forward_a_view_and_its_gradient():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    views = [torch.randn(4, 3, size, size).double() for size in (16, 16, 8, 8, 8)]
    together, apart = multicrop_forward(backbone, views), torch.stack([backbone(view) for view in views])
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad(y.square().sum(), list(backbone.parameters())) for y in (together, apart)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], "at least one tensor"),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(2, 3, 8, 8)], r"same B samples, got shapes \[\(4, 3, 8, 8\), \(2,"),
    ],
)
def test_views_that_do_not_fit(views, message):
    with pytest.raises(ValueError, match=message):
        multicrop_forward(nn.Identity(), views)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 4, 3, 8, 8)])
def test_a_single_tensor_is_not_taken_for_a_list_of_views(shape):
    message = (
        r"must be a list of V tensors \(B, C, H, W\), got a single tensor of shape .*: pass \[view_1, .* views.unbind"
    )
    with pytest.raises(ValueError, match=message):
        multicrop_forward(nn.Identity(), torch.zeros(shape))
    assert multicrop_forward(nn.Flatten(), torch.zeros(2, 4, 3, 8, 8).unbind()).shape == (2, 4, 192)


@pytest.mark.parametrize(
    "views", [{"image": torch.zeros(4, 3, 8, 8)}, [torch.zeros(4, 3, 8, 8), "label"], [torch.ones(())]]
)
def test_only_tensors_are_views(views):
    with pytest.raises(ValueError, match=r"views must be tensors \(B, C, H, W\), got \['"):
        multicrop_forward(nn.Identity(), views)


VIEWS = [torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)]
TOKENS = r"tokens\[:, 0\] \(the class token\) or tokens.mean\(dim=1\)"
OUTPUTS = {
    "tokens of two resolutions": (
        lambda x: x.flatten(2).mT,
        rf"got \[\(4, 256, 3\), \(4, 64, 3\)\], which are tokens .*\(4, 256, 3\): .*Features.* {TOKENS}",
    ),
    "maps of two resolutions": (
        lambda x: x,
        r"which are feature maps \(B, D, H, W\) of shape \(4, 3, 16, 16\): .* maps.flatten\(2\).mean\(dim=2\)",
    ),
    "a tuple": (lambda x: (x, x), r"got a tuple of \[\(4, 3, 16, 16\), .*Features\(.* the features of one item"),
    "a dict": (lambda x: {"x": x, "pooled": x}, r"got a dict with the keys 'x', 'pooled': .* the features of one key"),
    "None": (lambda x: None, "got a NoneType"),
    "the mean of the batch": (lambda x: x.mean(dim=(0, 2, 3)), r"of its 4 inputs, got shape \(3,\): keep the samples"),
    "a scalar": (torch.sum, r"of its 4 inputs, got shape \(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_not_features_are_named_with_a_way_to_pool_them(name):
    backbone, message = OUTPUTS[name]
    with pytest.raises(ValueError, match=message):
        multicrop_forward(backbone, VIEWS)


def test_tokens_of_one_resolution_are_features_of_patches():
    assert multicrop_forward(lambda x: x.flatten(2).mT, [VIEWS[0]] * 2).shape == (2, 4, 256, 3)


class Tokens(nn.Module):
    """Embeddings of patches of 4 x 4 pixels, a mask token in place of masked ones, and their mean as class token."""

    def __init__(self):
        super().__init__()
        self.embed, self.mask_token = nn.Conv2d(3, 5, 4, 4), nn.Parameter(torch.randn(5))
        self.calls = []

    def forward(self, images, masks=None):
        self.calls.append((len(images), None if masks is None else masks.clone()))
        tokens = self.embed(images).flatten(2).mT
        if masks is not None:
            tokens = torch.where(masks[..., None], self.mask_token, tokens)
        return tokens.mean(dim=1), tokens


def crops(*sizes):
    torch.manual_seed(0)
    return [torch.randn(4, 3, size, size) for size in sizes]


def test_class_and_patch_tokens_are_in_the_order_of_the_views():
    backbone, views = Tokens(), crops(16, 8, 16, 8)
    cls, patches = multicrop_forward(backbone, views)
    assert [call for call, _ in backbone.calls] == [8, 8]
    assert cls.shape == (4, 4, 5)
    assert [tuple(tokens.shape) for tokens in patches] == [(4, 16, 5), (4, 4, 5), (4, 16, 5), (4, 4, 5)]
    for index, view in enumerate(views):
        torch.testing.assert_close((cls[index], patches[index]), backbone(view))


def test_patch_tokens_are_not_copied():
    batches = []
    module = Tokens()
    module.register_forward_hook(lambda module, args, output: batches.append(output[1]))
    _, patches = multicrop_forward(module, crops(16, 16, 8))
    storages = [batch.untyped_storage().data_ptr() for batch in batches]
    assert [tokens.untyped_storage().data_ptr() for tokens in patches] == [storages[0], storages[0], storages[1]]


@pytest.mark.parametrize("grid", [(16,), (4, 4)])
@pytest.mark.parametrize("masked", [1, 2])
def test_each_sample_of_the_first_views_has_its_own_mask(masked, grid):
    """Compared with one call for each image; further views, of the same size and of others, are not masked."""
    backbone, views = Tokens(), crops(16, 16, 8, 16)
    masks = torch.rand(masked * 4, *grid) < 0.4
    cls, patches = multicrop_forward(backbone, views, masks)
    assert [given is None for _, given in backbone.calls] == [False, True]
    for index, view in enumerate(views):
        for sample in range(4):
            row = masks[4 * index + sample].reshape(1, 16) if index < masked else None
            expected = backbone(view[sample : sample + 1], row)
            torch.testing.assert_close((cls[index, sample], patches[index][sample]), (expected[0][0], expected[1][0]))


def test_gradients_reach_the_mask_token():
    backbone = Tokens()
    masks = torch.zeros(8, 16, dtype=torch.bool)
    masks[5, [2, 7]] = True
    _, patches = multicrop_forward(backbone, crops(16, 16, 8), masks)
    sum(tokens.sum() for tokens in patches).backward()
    assert torch.equal(backbone.mask_token.grad, torch.full((5,), 2.0))


def test_masks_move_to_the_device_of_the_inputs():
    seen = []

    def backbone(images, masks=None):
        seen.append(masks.device.type)
        return images.new_zeros(len(images), 5), images.new_zeros(len(images), 16, 5)

    multicrop_forward(backbone, [torch.zeros(4, 3, 16, 16, device="meta")], torch.zeros(4, 16, dtype=torch.bool))
    assert seen == ["meta"]


MASKS = torch.zeros(8, 16, dtype=torch.bool)


@pytest.mark.parametrize(("module", "views", "masks", "message"), [
    (Tokens(), crops(16, 16, 8), MASKS.float(), r"bool .*\(views \* B, N\) .* got \(8, 16\) in torch.float32"),
    (Tokens(), crops(16, 16, 8), MASKS[:, 0], r"got \(8,\) in torch.bool"),
    (Tokens(), crops(16, 16, 8), [[True]], "got list"),
    (Tokens(), crops(16, 16, 8), MASKS[:6], r"4 for one view to 12 for all 3, got shape \(6, 16\)"),
    (Tokens(), crops(16), MASKS, r"4 for one view to 4 for all 1, got shape \(8, 16\)"),
    (Tokens(), crops(16), MASKS[:0], r"got shape \(0, 16\)"),
    (Tokens(), crops(16, 8, 16), MASKS,
     r"one resolution, got \[\(3, 16, 16\), \(3, 8, 8\)\] for the first 2 views, to which 8 rows"),
    (Tokens(), crops(16, 16), MASKS[:, :1], r"masks have 1 patches for views \(3, 16, 16\), .* returns 16 patch"),
    (lambda images, masks: images.mean(dim=(2, 3)), crops(16, 16), MASKS,
     r"a pair of .* got a tensor of shape \(8, 3\): use dino_head.vision.TokenFeatures"),
    (lambda images, masks: (images.flatten(2), None), crops(16, 16), MASKS,
     r"a tuple of \[\(8, 3, 256\), 'NoneType'\]"),
    (lambda images, masks=None: Tokens()(images)[0] if masks is None else Tokens()(images), crops(16, 16, 8), MASKS,
     "for 2 of 3 views: return a pair whether or not masks are given"),
    (lambda images: (images[:4, :, 0, 0], images[:4, :, 0]), crops(16, 16), None, "each of its 8 inputs, got shape"),
    (lambda images: (images[:, :, 0, 0], images[:4, :, 0]), crops(16, 16), None, r"8 inputs, got shape \(4, 3, 16\)"),
])  # fmt: skip
def test_masks_that_do_not_fit_raise(module, views, masks, message):
    with pytest.raises(ValueError, match=message):
        multicrop_forward(module, views, masks)
