"""Parameter groups for optimizers: weight decay, and learning rates that fall from the last layer to the first."""

import itertools
import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from dino_head._arguments import check_integer, check_number

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?)\.(\d+)(?=\.)")
ATTENTION = re.compile(r"attn|attention")
EMBEDDING = re.compile(
    r"(?:^|\.)(?:embeddings\.|(?:patch|pos|position)_embed|(?:cls|class|mask|reg|register|storage)_tokens?)"
)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    layer_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    depth: Callable[[str], int] | None = None,
) -> list[dict[str, Any]]:
    """Group trainable parameters for an optimizer, as DINO and DINOv2 do (arXiv:2104.14294, arXiv:2304.07193).

    Matrices are decayed, including position embeddings, tokens and trainable norms of the prototypes (`weight_g`).
    Biases and one-dimensional parameters are not, such as the weights of norms and of layer scale.

    The learning rate of a vision transformer of n blocks is lr * layer_decay^(n + 1 - depth). The depth is 0 for patch
    and position embeddings and all tokens, i + 1 for block i, and n + 1 for everything else, such as the last norm and
    heads. The rate of the patch embedding is also multiplied by `patch_embed_lr_mult`. A `LambdaLR` scales all groups
    by one factor, so their ratios stay the same.

    The names of Transformers, timm and MONAI are recognised: blocks with attention, such as `encoder.layer.3.`,
    `layers.3.` or `blocks.3.`, beside `embeddings.`, `patch_embed`, `pos_embed` or `cls_token`. Frozen
    parameters count as well. If there are several transformers, each has its own n.

    Args:
        module: Module whose trainable parameters are grouped, each once, such as the student with backbone and heads.
        weight_decay: Weight decay of the matrices, >= 0.
        lr: Learning rate of the last layers, > 0. By default, the optimizer's; required with the factors below.
        layer_decay: Factor of the learning rate for each layer further from the last, in (0, 1].
        patch_embed_lr_mult: Factor of the learning rate of the patch embedding, whose name contains `patch_embed`, > 0.
        depth: Function that maps each parameter's name to its depth, an integer >= 0, for modules whose names are not
            recognised. Parameters of the largest depth have the rate `lr`.

    Returns:
        Groups with "params", "weight_decay", "name" and, if `lr` is given, "lr": one for each rate with and without
        decay, none of them empty. A group has the name of its first parameter, for Lightning's LearningRateMonitor,
        which requires unique names in an optimizer. Groups of several modules can be joined, here with a separate
        learning rate for the last layer of a head:

            backbone = parameter_groups(student["backbone"], 0.04, lr=1e-3, layer_decay=0.9, patch_embed_lr_mult=0.2)
            mlp = parameter_groups(head.layers, 0.04, lr=1e-3)
            last_layer = parameter_groups(head.last_layer, 0.04, lr=1e-4)
            optimizer = torch.optim.AdamW([*backbone, *mlp, *last_layer])

        The parameters of two heads have the same names: pass nn.ModuleDict({"patch_head": patch_head}) instead of
        the second head, which adds a prefix.

    Raises:
        ValueError: An argument out of its range, factors without `lr`, no trainable parameter, or a factor for a
            transformer or patch embedding that is not recognised.

    >>> [(group["name"], group["weight_decay"]) for group in parameter_groups(nn.Linear(4, 2), 0.04)]
    [('weight', 0.04), ('bias', 0.0)]
    """
    check_number("weight_decay", weight_decay, 0, float("inf"))
    check_number("layer_decay", layer_decay, 0, 1, exclude_minimum=True)
    check_number("patch_embed_lr_mult", patch_embed_lr_mult, 0, float("inf"), exclude_minimum=True)
    if lr is not None:
        check_number("lr", lr, 0, float("inf"), exclude_minimum=True)
    elif layer_decay != 1 or patch_embed_lr_mult != 1:
        raise ValueError(
            f"layer_decay={layer_decay} and patch_embed_lr_mult={patch_embed_lr_mult} are factors of lr, which is not "
            "given: pass lr=, the learning rate of the last layers"
        )
    parameters = dict(module.named_parameters())
    kind = type(module).__name__
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(
            f"{kind} has no trainable parameter: pass the student, or call module.requires_grad_(True) "
            "(FreezeLastLayerCallback does the freezing)"
        )
    factors = dict.fromkeys(parameters, 1.0)
    if layer_decay != 1:
        layers_above = _layers_above(parameters, kind) if depth is None else _layers_above_by_depth(parameters, depth)
        factors = {name: layer_decay**above for name, above in layers_above.items()}
    if patch_embed_lr_mult != 1:
        for name in _patch_embedding(parameters, kind):
            factors[name] *= patch_embed_lr_mult

    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and name.split(".")[-1] != "bias"
            options = {"weight_decay": float(weight_decay) if is_decayed else 0.0, "name": name}
            rate = {} if lr is None else {"lr": lr * factors[name]}
            group = groups.setdefault((factors[name], not is_decayed), {"params": [], **options, **rate})
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layers_above(names: Collection[str], kind: str) -> dict[str, int]:
    """For each parameter, n + 1 - depth: n + 1 for embeddings, n - i for block i of n, and 0 for all others."""
    blocks: dict[str, tuple[str, int]] = {}  # name -> (stack of blocks, index in it)
    sizes: dict[str, int] = {}  # of stacks with attention, which the layers of a head do not have
    for name in names:
        found = list(BLOCK.finditer(name))
        if len(found) == 1:  # two: blocks within stages, as in a Swin transformer
            (block,) = found
            blocks[name] = name[: block.start(1)], int(block[1])
            if ATTENTION.search(name, block.end()):
                sizes[name[: block.start(1)]] = 0
    for stack, index in blocks.values():
        if stack in sizes:
            sizes[stack] = max(sizes[stack], index + 1)
    embeddings = {name: _nearest(name, sizes) for name in names if name not in blocks and EMBEDDING.search(name)}
    if not sizes or set(embeddings.values()) != set(sizes):
        without = sorted(set(sizes).difference(embeddings.values()))
        missing = f"no embeddings beside {', '.join(without)}" if without else "no blocks with attention"
        raise ValueError(
            f"layer_decay does not recognise {kind} as a vision transformer by the names of its parameters ({missing}):"
            " pass depth=, a function that maps a parameter's name to its depth, or omit layer_decay for a module "
            "without a transformer, such as a head"
        )
    above = dict.fromkeys(names, 0)
    above |= {name: sizes[stack] - index for name, (stack, index) in blocks.items() if stack in sizes}
    return above | {name: sizes[stack] + 1 for name, stack in embeddings.items()}


def _nearest(name: str, stacks: Collection[str]) -> str:
    """The stack of blocks that shares the most modules with a parameter; "" if there is none."""

    def shared(stack: str) -> int:
        pairs = zip(name.split("."), stack.split("."), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return max(stacks, key=shared, default="")


def _layers_above_by_depth(names: Collection[str], depth: Callable[[str], int]) -> dict[str, int]:
    depths = {name: depth(name) for name in names}
    for name, value in depths.items():
        check_integer(f"depth({name!r})", value, 0)
    return {name: max(depths.values()) - value for name, value in depths.items()}


def _patch_embedding(names: Collection[str], kind: str) -> list[str]:
    """The patch embedding's parameters; MONAI has the position embeddings in the same module."""
    found = [name for name in names if "patch_embed" in name and "position" not in name]
    if not found:
        raise ValueError(
            f"patch_embed_lr_mult has no effect: no name of a parameter in {kind} contains patch_embed. Omit it, "
            "or call parameter_groups for the patch embedding by itself, with an lr of its own"
        )
    return found
