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
