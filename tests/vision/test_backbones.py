import pytest
import torch
from monai.networks.nets import DenseNet121
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from dino_head import DINOLoss, DINOProjectionHead, multicrop_forward
from dino_head.vision.backbones import Features, class_token, pooled, vit
from dino_head.vision.checks import check_backbone

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIEWS = [torch.randn(2, 3, size, size) for size in (64, 64, 32, 32)]


def convnext():
    return ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32]))


def densenet():
    """The network of MONAI in the docstring of backbones.py, in two dimensions."""
    features = DenseNet121(2, 3, 1, init_features=8, growth_rate=4, block_config=(2, 2)).features
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


BACKBONES = {
    "ViT": lambda: Features(
        ViTModel(ViTConfig(image_size=64, patch_size=16, **TINY), add_pooling_layer=False),
        class_token,
        interpolate_pos_encoding=True,
    ),
    "DINOv2": lambda: Features(Dinov2Model(Dinov2Config(image_size=64, patch_size=16, **TINY)), class_token),
    "ConvNeXt": lambda: Features(convnext(), pooled),
    "ours": lambda: vit("tiny", 16, 64, width=64, depth=2),
    "MONAI": densenet,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_views_of_every_size_become_features(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    width = backbone(VIEWS[0]).shape[1]
    check_backbone(backbone, DINOProjectionHead(width, 8, 4, 16), VIEWS)
    features = multicrop_forward(backbone.eval(), VIEWS)
    assert features.shape == (4, 2, width)
    assert not torch.allclose(features[0, 0], features[0, 1])
    assert features.isfinite().all()


def test_a_backbone_of_timm():
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    check_backbone(backbone, DINOProjectionHead(192, 8, 4, 16), VIEWS)


def test_position_embeddings_are_interpolated():
    """At the model's own size they change nothing; at another size they still affect the features."""
    torch.manual_seed(0)
    backbone = BACKBONES["ViT"]().eval()
    torch.testing.assert_close(backbone(VIEWS[0]), class_token(backbone.model(VIEWS[0])))
    before = backbone(VIEWS[2])
    positions = backbone.model.embeddings.position_embeddings
    positions.data += torch.randn_like(positions)
    assert not torch.allclose(before, backbone(VIEWS[2]), atol=1e-3)


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 5.5), ("small", 21.7), ("base", 85.8), ("large", 303.3)])
def test_the_sizes_equal_the_published_sizes(size, parameters):
    with torch.device("meta"):
        backbone = vit(size)
    assert sum(parameter.numel() for parameter in backbone.parameters()) / 1e6 == pytest.approx(parameters, abs=0.1)


def test_a_vit_takes_any_number_of_channels():
    backbone = vit("tiny", 16, 32, channels=13, width=64, depth=1)
    assert backbone(torch.randn(2, 13, 32, 32)).shape == (2, 64)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


@pytest.mark.parametrize(("backbone", "message"), [
    (Features(ViTModel(ViTConfig(image_size=64, patch_size=16, **TINY)), class_token),
     r"cannot take views of 32 x 32 \(ValueError: .*interpolate_pos_encoding=True; timm"),
    (BACKBONES["DINOv2"]().model, r"got a BaseModelOutputWithPooling of Transformers: .*Features\(model, class_token"),
    (convnext(), r"got a BaseModelOutputWithPoolingAndNoAttention of Transformers: .*Features\(model, pooled"),
    (Returns(lambda x: x.flatten(2)),
     r"features \(2, D\) for 2 views of 64 x 64, got tokens \(B, N, D\) of shape \(2, 3, 4096\): .* tokens\[:, 0\]"),
    (Returns(lambda x: x), r"got feature maps \(B, D, H, W\) of shape \(2, 3, 64, 64\): .* maps.flatten\(2\).mean"),
    (Returns(lambda x: (x, x)), r"got a tuple of \[\(2, 3, 64, 64\), "),
    (Returns(lambda x: {"x": x}), "got a dict with the keys 'x'"),
    (Returns(lambda x: x.mean(dim=(0, 2, 3))[None]), r"for 2 views of 64 x 64, got a tensor of shape \(1, 3\)"),
    (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 32)).bfloat16(),
     r"cannot take views of 64 x 64 \(RuntimeError: .* convert them from torch.float32 to the type of its weights"),
    (Returns(lambda x: x.mean(dim=(2, 3))), r"3 features, but the head expects 32: .*\(input_dim=3,"),
])  # fmt: skip
def test_a_backbone_that_does_not_fit_raises(backbone, message):
    backbone.train()
    with pytest.raises(ValueError, match=message):
        check_backbone(backbone, DINOProjectionHead(32, 8, 4, 16), VIEWS)
    assert all(module.training for module in backbone.modules())


def test_the_check_does_not_change_the_backbone():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone[1].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    check_backbone(backbone, DINOProjectionHead(8, 8, 4, 16), VIEWS)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert [module.training for module in backbone] == [True, False, True, True]


class Averages(nn.Sequential):
    """Features (B, 3) that need no weights, and dropout, which draws random numbers in training mode alone."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout())


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_the_check_runs_head_and_loss_and_changes_nothing(centering):
    torch.manual_seed(0)
    backbone, head, loss = Averages(), DINOProjectionHead(3, 8, 4, 16), DINOLoss(16, centering=centering)
    loss.register_forward_pre_hook(lambda *args: pytest.fail("measured"))
    parts = nn.ModuleList([backbone, head, loss])
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    random = torch.get_rng_state()
    check_backbone(backbone, head, VIEWS, loss)
    check_backbone(Returns(lambda x: torch.rand(2, 3)), head, VIEWS, loss)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    assert all(module.training for module in parts.modules())
    loss.defer_center_update = False
    loss.apply_center_update()  # nothing was collected
    assert loss.center is None or not loss.center.any()


@pytest.mark.parametrize(("loss", "message"), [
    (DINOLoss(32), r"made for 32 prototypes \(output_dim\), got a teacher with 16: give loss and head the same"),
    (None, r"the head cannot take the backbone's features \(2, 3\) in torch.float32 \(RuntimeError: .* one type"),
])  # fmt: skip
def test_a_head_or_a_loss_that_does_not_fit_raises(loss, message):
    head = DINOProjectionHead(3, 8, 4, 16)
    parts = nn.ModuleList([Averages(), head if loss is not None else head.bfloat16(), *([loss] if loss else [])])
    with pytest.raises(ValueError, match=message):
        check_backbone(parts[0], head, VIEWS, loss)
    assert all(module.training for module in parts.modules())


def test_the_check_uses_the_autocast_around_it():
    seen = []
    backbone, head = Averages(), DINOProjectionHead(3, 8, 4, 16)
    head.register_forward_hook(lambda module, args, out: seen.extend(tensor.dtype for tensor in out))
    with torch.autocast("cpu", torch.bfloat16):
        check_backbone(backbone, head, VIEWS, DINOLoss(16))
    assert torch.bfloat16 in seen
