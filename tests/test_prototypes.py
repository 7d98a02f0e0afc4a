import copy

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


RELEASES = {
    "requires_grad_(True)": lambda layer: layer.requires_grad_(True),
    "the copy of a frozen teacher": lambda layer: copy.deepcopy(layer.requires_grad_(False)).requires_grad_(True),
    "half()": lambda layer: layer.half().float(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16).to(torch.float32),
    "a loaded state": lambda layer: _loaded(layer, WeightNormPrototypes(4, 16).state_dict()),
    "an assigned state": lambda layer: _loaded(layer, WeightNormPrototypes(4, 16).state_dict(), assign=True),
    "a state in float16": lambda layer: _loaded(layer, WeightNormPrototypes(4, 16).half().state_dict()),
    "memory on the meta device": lambda layer: layer.to("meta").to_empty(device="cpu"),
}


def _loaded(layer, state, **options):
    layer.load_state_dict(state, **options)
    return layer


@pytest.mark.parametrize("release", RELEASES)
def test_fixed_norms_stay_1(release):
    torch.manual_seed(0)
    layer = RELEASES[release](WeightNormPrototypes(4, 16))
    if release == "memory on the meta device":
        layer.reset_parameters()
    assert torch.equal(layer.weight_g, torch.ones(16, 1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        layer(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(16))
    assert torch.equal(layer.weight_g, torch.ones(16, 1))
    assert [name for name, _ in layer.named_parameters()] == ["weight_v"]
    assert list(layer.state_dict()) == ["weight_v", "weight_g"]


def test_trainable_norms_are_trained_again_after_a_freeze():
    layer = copy.deepcopy(WeightNormPrototypes(4, 16, trainable_norm=True).requires_grad_(False)).requires_grad_(True)
    layer(torch.randn(8, 4)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.weight_g, torch.ones(16, 1))
    assert list(layer.state_dict()) == ["weight_g", "weight_v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strict", [True, False])
def test_fixed_norms_refuse_a_state_with_other_norms(dtype, strict):
    trained, layer = WeightNormPrototypes(4, 16, trainable_norm=True).to(dtype), WeightNormPrototypes(4, 16)
    with torch.no_grad():
        trained.weight_g[3] = 1.5
    message = r"last_layer.weight_g has norms from 1 to 1.5, but norm_last_layer=True .*norm_last_layer=False"
    module, state = torch.nn.ModuleDict({"last_layer": layer}), trained.state_dict(prefix="last_layer.")
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=strict)
    assert torch.equal(layer.weight_g, torch.ones(16, 1))
    assert state["last_layer.weight_g"][3] == 1.5  # the caller's dictionary stays as it was
    WeightNormPrototypes(4, 16, trainable_norm=True).load_state_dict(trained.state_dict())


def test_a_state_on_the_meta_device_loads_into_fixed_norms():
    with torch.device("meta"):
        layer, other = WeightNormPrototypes(4, 16), WeightNormPrototypes(4, 16)
    layer.load_state_dict(other.state_dict(), assign=True)
    layer.load_state_dict(WeightNormPrototypes(4, 16).state_dict(), assign=True)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(16))


def test_two_forwards_may_precede_a_backward_while_buffers_are_written():
    """DDP writes the first process's buffers to all processes before each forward."""
    layer, z = WeightNormPrototypes(4, 16), torch.randn(8, 4)
    first = layer(z)
    layer.weight_g.copy_(torch.ones(16, 1))
    (first.sum() + layer(z).sum()).backward()
    assert layer.weight_v.grad.isfinite().all()


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
