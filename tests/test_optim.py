import copy

import pytest
import torch
from helpers.toy_training import Toy, loader, trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from dino_head import DINOProjectionHead, parameter_groups
from dino_head.callbacks import ScheduleCallback
from dino_head.vision.backbones import Features, class_token


def names_in_groups(module, weight_decay=0.04):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(module, weight_decay)
    }


def table(module, **options):
    """Rate and decay of each parameter."""
    options = {"lr": 1.0, **options}
    groups = parameter_groups(module, 0.04, **options)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return {name: found[id(p)] for name, p in module.named_parameters() if p.requires_grad}


class Named(nn.Module):
    """Parameters with given names, of two dimensions."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))


def rates(*names, layer_decay=0.5, **options):
    found = table(Named(*names), layer_decay=layer_decay, **options)
    return {name: found[name][0] for name in names}


@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_matrices_are_decayed_and_nothing_else_is(norm_last_layer):
    """With the trainable norms of the prototypes, as in DINO's and DINOv2's code."""
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.LayerNorm(4), DINOProjectionHead(4, 8, 4, 16, norm_last_layer=norm_last_layer)
    )
    last_layer = {True: ["weight_v"], False: ["weight_g", "weight_v"], None: ["weight"]}[norm_last_layer]
    groups = names_in_groups(module)
    layers = ["0.weight", "2.layers.0.weight", "2.layers.3.weight", "2.layers.6.weight"]
    assert groups[0.04] == [*layers, *(f"2.last_layer.{name}" for name in last_layer)]
    batch_norms = [f"2.layers.{i}.{name}" for i in (1, 4) for name in ("weight", "bias")]
    assert sorted(groups[0.0]) == sorted(["0.bias", "1.weight", "1.bias", *batch_norms, "2.layers.6.bias"])


def test_a_bias_of_two_dimensions_is_not_decayed():
    assert names_in_groups(Named("attention.bias", "attention.weight")) == {
        0.04: ["attention.weight"],
        0.0: ["attention.bias"],
    }


def test_frozen_parameters_are_left_out_and_shared_ones_taken_once():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    module["a"].bias.requires_grad_(False)
    assert names_in_groups(module) == {0.04: ["a.weight"], 0.0: ["b.bias"]}


def test_empty_groups_are_left_out():
    assert list(names_in_groups(nn.Linear(4, 4, bias=False))) == [0.04]
    assert list(names_in_groups(nn.LayerNorm(4))) == [0.0]


def vision_transformer(name, blocks=12):
    """A model of Transformers of width 24."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"this version of Transformers has no {name}Model")
    sizes = {"hidden_size": 24, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 32}
    registers = {"num_register_tokens": 2} if name in ("Dinov2WithRegisters", "DINOv3ViT") else {}
    config = getattr(transformers, f"{name}Config")(image_size=28, patch_size=14, **sizes, **registers)
    return getattr(transformers, f"{name}Model")(config)


def authors_table(student, vit, lr, layer_decay, patch_embed_lr_mult, weight_decay):
    """From the modules, not the names: decay^(n + 1 - depth), depth 0 of embeddings, i + 1 of block i, else n + 1."""
    (blocks,) = (m for m in vit.modules() if isinstance(m, nn.ModuleList) and len(m) == vit.config.num_hidden_layers)
    depths = {id(p): 0 for p in vit.embeddings.parameters()}
    depths |= {id(p): number for number, block in enumerate(blocks, start=1) for p in block.parameters()}
    patch_embedding = {id(p) for p in vit.embeddings.patch_embeddings.parameters()}
    scales = [m for m in student.modules() if isinstance(m, nn.LayerNorm) or "LayerScale" in type(m).__name__]
    undecayed = {id(p) for scale in scales for p in scale.parameters()}
    expected = {}
    for name, p in student.named_parameters():
        rate = lr * layer_decay ** (len(blocks) + 1 - depths.get(id(p), len(blocks) + 1))
        rate *= patch_embed_lr_mult if id(p) in patch_embedding else 1
        expected[name] = (rate, 0.0 if id(p) in undecayed or name.endswith(".bias") else weight_decay)
    return expected


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_rates_and_decays_of_12_blocks_and_two_heads_equal_the_authors(name):
    vit = vision_transformer(name)
    heads = [DINOProjectionHead(24, 8, 4, 16, batch_norm=False, norm_last_layer=norm) for norm in (False, None)]
    student = nn.ModuleDict({"backbone": Features(vit, class_token), "head": heads[0], "patch_head": heads[1]})
    options = {"lr": 4e-3, "layer_decay": 0.9, "patch_embed_lr_mult": 0.2}
    found = table(student, **options)
    expected = authors_table(student, vit, weight_decay=0.04, **options)
    assert list(found) == list(expected)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name
    backbone = table(student["backbone"], **options)
    assert backbone == {name: found[f"backbone.{name}"] for name in backbone}
    assert found["head.layers.0.weight"] == found["head.last_layer.weight_g"] == (4e-3, 0.04)
    at = {rate for rate, _ in found.values()}
    assert sorted(at) == pytest.approx(sorted([4e-3 * 0.9**i for i in range(14)] + [4e-3 * 0.2 * 0.9**13]))


def test_the_defaults_give_a_whole_vision_transformer_two_groups():
    student = nn.ModuleDict({"backbone": vision_transformer("Dinov2"), "head": DINOProjectionHead(24, 8, 4, 16)})
    decayed, others = parameter_groups(student, 0.04)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.04, 0.0)
    assert "lr" not in decayed
    assert "lr" not in others


# Names of the authors, timm and MONAI.
AUTHORS = ["cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj.weight"]
AUTHORS += ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "norm.weight"]
MONAI = ["patch_embedding.position_embeddings", "patch_embedding.patch_embeddings.weight", "cls_token"]
MONAI += ["blocks.0.mlp.linear1.weight", "blocks.1.attn.qkv.weight", "norm.weight"]


@pytest.mark.parametrize("prefix", ["", "backbone.", "student.backbone._orig_mod."])
def test_other_names_of_vision_transformers(prefix):
    found = rates(*(prefix + name for name in AUTHORS), patch_embed_lr_mult=0.1)
    assert list(found.values()) == pytest.approx([0.125] * 4 + [0.0125, 0.25, 0.5, 1.0])
    found = rates(*(prefix + name for name in MONAI), patch_embed_lr_mult=0.1)
    assert list(found.values()) == pytest.approx([0.125, 0.0125, 0.125, 0.25, 0.5, 1.0])


def test_frozen_blocks_and_embeddings_count():
    module = Named(*AUTHORS)
    module.blocks.requires_grad_(False)
    module.patch_embed.requires_grad_(False)
    found = table(module, layer_decay=0.5, patch_embed_lr_mult=0.1)
    assert {name: rate for name, (rate, _) in found.items()} == dict.fromkeys(AUTHORS[:4], 0.125) | {"norm.weight": 1.0}


def test_each_of_two_vision_transformers_has_its_own_number_of_blocks():
    small = [f"small.{name}" for name in AUTHORS]
    large = ["large.mask_token", "large.vit.embeddings.cls_token", "large.vit.norm.weight"]
    large += [f"large.vit.encoder.layer.{i}.attention.query.weight" for i in range(11)]
    found = rates(*small, *large)
    assert [found[name] for name in small] == [0.125] * 5 + [0.25, 0.5, 1.0]
    assert [found[name] for name in large] == [0.5**12] * 2 + [1.0] + [0.5 ** (11 - i) for i in range(11)]


def test_layers_of_a_head_are_not_blocks():
    found = rates(*AUTHORS, *(f"layers.{i}.weight" for i in range(5)), "attention_head.layers.0.weight")
    assert list(found.values())[:8] == [0.125] * 5 + [0.25, 0.5, 1.0]
    assert set(list(found.values())[8:]) == {1.0}


def test_an_embedding_in_a_block_belongs_to_the_block():
    assert rates(*AUTHORS, "blocks.0.attn.pos_embed")["blocks.0.attn.pos_embed"] == 0.25


STAGES = ["embeddings.weight", "layers.0.blocks.0.attention.weight", "layers.1.blocks.0.attention.weight"]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["stages.0.weight", "stages.1.weight"], "no blocks with attention"),
        (["layers.0.weight", "layers.2.weight"], "no blocks with attention"),
        (STAGES, "no blocks with attention"),
        (["stem.weight", "blocks.0.attn.weight"], r"no embeddings beside blocks\."),
        ([*AUTHORS, "neck.layers.0.attn.weight"], r"no embeddings beside neck.layers\."),
    ],
)
def test_a_module_without_a_known_vision_transformer_is_refused(names, missing):
    with pytest.raises(ValueError, match=rf"recognise Named as a vision transformer .* \({missing}\): pass depth="):
        rates(*names)


def test_depth_is_a_function_of_the_name():
    names = ["stem.weight", "stages.0.weight", "stages.1.weight", "head.weight"]
    found = rates(*names, depth=lambda name: 3 if "head" in name else int("stages" in name) + int("1" in name))
    assert found == dict(zip(names, [0.125, 0.25, 0.5, 1.0], strict=True))
    assert set(rates(*AUTHORS, depth=lambda name: 4).values()) == {1.0}


@pytest.mark.parametrize("depth", [-1, 0.5, None, "3"])
def test_depths_that_are_not_integers_from_0_raise(depth):
    with pytest.raises(ValueError, match=r"depth\('stem.weight'\) must be an integer >= 0, got "):
        rates("stem.weight", depth=lambda name: depth)


def test_a_lambda_lr_keeps_the_ratios():
    module = Named(*AUTHORS)
    groups = parameter_groups(module, 0.04, lr=0.8, layer_decay=0.5, patch_embed_lr_mult=0.1)
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.3][step])
    before = [group["lr"] for group in optimizer.param_groups]
    assert before == pytest.approx([0.01, 0.1, 0.2, 0.4, 0.8])
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3 * rate for rate in before])


def test_a_rate_of_its_own_for_the_last_layer():
    """As in the docstring: groups are joined, and given more options; LambdaLR scales each from its own rate."""
    backbone, head = nn.Linear(4, 4), DINOProjectionHead(4, 8, 4, 16, norm_last_layer=False)
    last_layer = ({**group, "lr": 0.1} for group in parameter_groups(head.last_layer, 0.04))
    groups = [*parameter_groups(backbone, 0.04), *parameter_groups(head.layers, 0.04), *last_layer]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 4 + [0.05]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.04, 0.0] * 2 + [0.04]
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for module in (backbone, head) for p in module.parameters()}


def snippet():
    """The lines of the docstring that join the groups of a backbone and a head."""
    lines = [line.strip() for line in parameter_groups.__doc__.splitlines()]
    begin = next(i for i, line in enumerate(lines) if line.startswith("backbone = "))
    return "\n".join(lines[begin : lines.index("", begin)])


def test_the_snippet_of_the_docstring_gives_every_parameter_a_rate():
    student = nn.ModuleDict({"backbone": Named(*AUTHORS), "head": DINOProjectionHead(4, 8, 4, 16)})
    scope = {"student": student, "head": student["head"], "parameter_groups": parameter_groups, "torch": torch}
    exec(snippet(), scope)
    groups = scope["optimizer"].param_groups
    names = {id(p): name for name, p in student.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    expected = table(student, lr=1e-3, layer_decay=0.9, patch_embed_lr_mult=0.2)
    expected = {name: rate for name, (rate, _) in expected.items()} | {"head.last_layer.weight_v": 1e-4}
    assert found == pytest.approx(expected)
    assert len({group["name"] for group in groups}) == len(groups)


def test_each_group_has_the_name_of_its_first_parameter():
    module = Named(*AUTHORS)
    names = {id(p): name for name, p in module.named_parameters()}
    for options in ({}, {"lr": 1.0, "layer_decay": 0.5}):
        groups = parameter_groups(module, 0.04, **options)
        assert [group["name"] for group in groups] == [names[id(group["params"][0])] for group in groups]


class WithGroups(Toy):
    """A toy with groups of choice."""

    def __init__(self, make_groups):
        super().__init__(norm_last_layer=False)
        self.make_groups = make_groups

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.make_groups(self.student), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)]


def joined(student):
    head = student["head"]
    backbone = parameter_groups(
        student["backbone"], 0.04, lr=0.02, layer_decay=0.5, depth=lambda name: int(name == "weight")
    )
    return [*backbone, *parameter_groups(head.layers, 0.04), *parameter_groups(head.last_layer, 0.04, lr=0.001)]


def two_heads(student):
    second = nn.ModuleDict({"patch_head": copy.deepcopy(student["head"])})
    return [*parameter_groups(student["head"], 0.04), *parameter_groups(second, 0.04, lr=0.02)]


FIRST = ("layers.0.weight", "layers.0.bias")


@pytest.mark.parametrize(
    ("make_groups", "expected"),
    [
        (lambda student: parameter_groups(student, 0.04), {"backbone.weight": 0.005, "backbone.bias": 0.005}),
        (joined, {"weight": 0.01, "bias": 0.005, "0.weight": 0.005, "0.bias": 0.005, "weight_g": 0.0005}),
        (two_heads, dict.fromkeys(FIRST, 0.005) | {f"patch_head.{name}": 0.01 for name in FIRST}),
    ],
)
def test_lightnings_monitor_logs_each_group_by_its_name(make_groups, expected, tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor()
    run = trainer(monitor, logger=logger, log_every_n_steps=1, max_steps=2)
    run.fit(WithGroups(make_groups), loader())
    last = {name.removeprefix("lr-AdamW/"): values[-1] for name, values in monitor.lrs.items()}
    assert last == pytest.approx(expected)


def test_scheduled_weight_decay_applies_only_to_the_decayed_groups():
    seen = []

    class Seen(ScheduleCallback):
        def after_optimizer_step(self, trainer, pl_module):
            super().after_optimizer_step(trainer, pl_module)
            seen.append({group["name"]: group["weight_decay"] for group in trainer.optimizers[0].param_groups})

    run = trainer(Seen("weight_decay", lambda step, total: 0.1 * (step + 1)), max_steps=2)
    run.fit(WithGroups(joined), loader())
    decayed = ("weight", "0.weight", "weight_g")
    for step, decays in enumerate(seen, start=1):
        assert decays == pytest.approx(dict.fromkeys(decayed, 0.1 * step) | {"bias": 0.0, "0.bias": 0.0})


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable parameter: pass the student"):
        parameter_groups(nn.Linear(4, 4).requires_grad_(False), 0.04)


@pytest.mark.parametrize("weight_decay", [-0.1, None, float("nan")])
def test_arguments_out_of_range(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be a number"):
        parameter_groups(nn.Linear(4, 4), weight_decay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr must be a number in \(0, inf\], got 0.0"),
        ({"lr": 1.0, "layer_decay": 0}, r"layer_decay must be a number in \(0, 1\], got 0"),
        ({"lr": 1.0, "layer_decay": 1.1}, r"layer_decay must be a number in \(0, 1\], got 1.1"),
        ({"lr": 1.0, "patch_embed_lr_mult": 0}, "patch_embed_lr_mult must be a number in"),
        ({"layer_decay": 0.9}, "layer_decay=0.9 and patch_embed_lr_mult=1.0 are factors of lr, which is not given"),
        ({"patch_embed_lr_mult": 0.2}, "patch_embed_lr_mult=0.2 are factors of lr, which is not given: pass lr="),
        ({"lr": 1.0, "patch_embed_lr_mult": 0.2}, "no name of a parameter in Linear contains patch_embed"),
    ],
)
def test_rates_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Linear(4, 4), 0.04, **options)
