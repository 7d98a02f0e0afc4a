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
