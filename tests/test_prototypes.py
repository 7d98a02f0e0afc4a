import pytest
import torch

from dino_head.prototypes import FactoredLogits, LinearPrototypes, WeightNormPrototypes, weight_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_private_kernel_and_the_formula_agree_bitwise(dtype, monkeypatch):
    torch.manual_seed(0)
    v, g = torch.randn(64, 16, dtype=dtype), torch.rand(64, 1, dtype=dtype)
    assert hasattr(torch, "_weight_norm")
    results = []
    for _ in range(2):
        leaves = (v.clone().requires_grad_(), g.clone().requires_grad_())
        weight = weight_norm(*leaves)
        results.append((weight, *torch.autograd.grad(weight.square().sum() + weight[0].sum(), leaves)))
        monkeypatch.delattr(torch, "_weight_norm", raising=False)
    (kernel, *gradients), (formula, *other_gradients) = results
    torch.testing.assert_close(kernel, formula, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-5, atol=1e-5)


def test_rows_have_the_norm_of_weight_g():
    layer = WeightNormPrototypes(4, 16, trainable_norm=True)
    with torch.no_grad():
        layer.weight_g.mul_(3)
        layer.weight_v.mul_(torch.rand(16, 1))
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((16,), 3.0))


def test_forward_is_the_product():
    layer, z = WeightNormPrototypes(4, 16), torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(z), z @ layer.weight.T)
    assert torch.equal(layer(z), FactoredLogits(z, layer.weight).logits())


def test_the_prototypes_of_a_plain_layer_are_a_copy():
    layer = LinearPrototypes(4, 16)
    _, prototypes = layer.factored(torch.randn(3, 4))
    assert prototypes.data_ptr() != layer.weight.data_ptr()  # whose memory fully_shard takes back after forward


def test_it_prints_its_sizes():
    assert repr(WeightNormPrototypes(4, 16)) == (
        "WeightNormPrototypes(bottleneck_dim=4, output_dim=16, trainable_norm=False)"
    )
    assert repr(LinearPrototypes(4, 16)) == "LinearPrototypes(bottleneck_dim=4, output_dim=16)"
