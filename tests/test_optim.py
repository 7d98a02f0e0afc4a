import pytest
import torch
from torch import nn

from dino_head import DINOProjectionHead, parameter_groups


def names_in_groups(module, weight_decay=0.04):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(module, weight_decay)
    }


@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_matrices_are_decayed_and_nothing_else_is(norm_last_layer):
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.LayerNorm(4), DINOProjectionHead(4, 8, 4, 16, norm_last_layer=norm_last_layer)
    )
    last_layer = "2.last_layer.weight_v" if norm_last_layer is not None else "2.last_layer.weight"
    scale = ["2.last_layer.weight_g"] if norm_last_layer is False else []
    groups = names_in_groups(module)
    assert groups[0.04] == ["0.weight", "2.layers.0.weight", "2.layers.3.weight", "2.layers.6.weight", last_layer]
    batch_norms = [f"2.layers.{i}.{name}" for i in (1, 4) for name in ("weight", "bias")]
    assert sorted(groups[0.0]) == sorted(["0.bias", "1.weight", "1.bias", *batch_norms, "2.layers.6.bias", *scale])


def test_frozen_parameters_are_left_out_and_shared_ones_taken_once():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    assert names_in_groups(module) == {0.04: ["a.weight"], 0.0: ["b.bias"]}


def test_empty_groups_are_left_out():
    assert list(names_in_groups(nn.Linear(4, 4, bias=False))) == [0.04]
    assert list(names_in_groups(nn.LayerNorm(4))) == [0.0]


def test_a_rate_of_its_own_for_the_last_layer():
    """As in the docstring: groups are joined, and given more options; LambdaLR scales each from its own rate."""
    backbone, head = nn.Linear(4, 4), DINOProjectionHead(4, 8, 4, 16, norm_last_layer=False)
    last_layer = ({**group, "lr": 0.1} for group in parameter_groups(head.last_layer, 0.04))
    groups = [*parameter_groups(backbone, 0.04), *parameter_groups(head.layers, 0.04), *last_layer]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 4 + [0.05] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.04, 0.0] * 3
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for module in (backbone, head) for p in module.parameters()}


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable parameter: pass the student"):
        parameter_groups(nn.Linear(4, 4).requires_grad_(False), 0.04)


@pytest.mark.parametrize("weight_decay", [-0.1, None, float("nan")])
def test_arguments_out_of_range(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be a number"):
        parameter_groups(nn.Linear(4, 4), weight_decay)
