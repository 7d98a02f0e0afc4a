"""Errors and warnings about training and evaluation modes that would silently change the method."""

from collections.abc import Iterable, Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dino_head.callbacks._checks.layout import Pairs, without_compile
from dino_head.callbacks._checks.losses import losses_of
from dino_head.head import DINOProjectionHead
from dino_head.losses import CenteredLoss, IBOTPatchLoss

Modules = dict[str, nn.Module]


def check_modes(pl_module: LightningModule, pairs: Pairs) -> list[str]:
    """Warnings about the modes of the losses and of the pairs' modules.

    Only modules that act differently in training matter: batch norm, dropout, drop path, random positions.

    Raises:
        MisconfigurationException: A loss with a center, or all such modules of a student, are in evaluation mode; the
            head of an IBOTPatchLoss has batch norm; or a loss is in a plain list or dict.
    """
    _check_registration(pl_module)
    _check_patch_heads(pl_module)
    still = [
        name
        for name, loss in losses_of(pl_module).items()
        if loss.center is not None and loss.center_momentum < 1 and not loss.training
    ]
    if still:
        call = f"{still[0]}.train()" if pl_module.training else "model.train()"
        raise MisconfigurationException(
            f"{_listed(still)} {'is' if len(still) == 1 else 'are'} in evaluation mode, in which the center is never "
            f"updated. Lightning keeps the modes of modules: call {call} before fit"
        )
    warnings = []
    for student, teacher in pairs:
        norms, random = _act_differently(pl_module.get_submodule(student))
        warnings += _check_student(pl_module, student, norms | random)
        warnings += _check_teacher(pl_module, student, teacher)
    return warnings


def _check_registration(pl_module: LightningModule) -> None:
    for name, value in vars(pl_module).items():
        if name.startswith("_") or not isinstance(value, (list, tuple, dict)):
            continue
        if any(isinstance(item, CenteredLoss) for item in (value.values() if isinstance(value, dict) else value)):
            raise MisconfigurationException(
                f"the losses in the {type(value).__name__} {type(pl_module).__name__}.{name} are no submodules: their "
                "centers would be on another device, in no checkpoint and updated in every micro-batch. Use "
                "nn.ModuleList or nn.ModuleDict"
            )


def _check_patch_heads(pl_module: LightningModule) -> None:
    heads = {name: module for name, module in pl_module.named_modules() if isinstance(module, DINOProjectionHead)}
    for name, loss in losses_of(pl_module).items():
        possible = {head: module for head, module in heads.items() if _outputs(module) == loss.output_dim}
        # By name; if no name tells, all of them, some of which may be for class tokens.
        of_patches = [head for head in possible if "patch" in head or "ibot" in head] or list(possible)
        with_norm = [head for head in of_patches if any(map(_has_statistics, possible[head].modules()))]
        if isinstance(loss, IBOTPatchLoss) and with_norm and len(with_norm) == len(of_patches):
            raise MisconfigurationException(
                f"the patch head ({_listed(with_norm)}) of {name} has batch norm, which fails in a batch without "
                "masked patches, while the other processes wait for this one: use "
                "DINOProjectionHead(batch_norm=False)"
            )


def _outputs(head: DINOProjectionHead) -> int:
    return next((len(parameter) for parameter in head.last_layer.parameters()), 0)


def _check_student(pl_module: LightningModule, student: str, modules: Modules) -> list[str]:
    side = pl_module.get_submodule(student)
    modules = {name: module for name, module in modules.items() if module.training or _is_trained(side, name)}
    still = {name: module for name, module in modules.items() if not module.training}
    if not still:
        return []
    found = f"{_listed(f'{student}.{name}'.rstrip('.') for name in still)} in evaluation mode"
    are_frozen_norms = all(
        isinstance(module, _NormBase) and side.get_submodule(name.rpartition(".")[0]).training and name
        for name, module in still.items()
    )
    if len(still) == len(modules) and not are_frozen_norms:
        raise MisconfigurationException(
            f"the student is trained with {found}: drop path and dropout do nothing, and batch norm does not follow "
            "the data. After from_pretrained() and model.eval(), modules are in evaluation mode, and Lightning keeps "
            f"the mode: call {student}.train()"
        )
    return [
        f"the student is trained with {found}. If batch norm is frozen on purpose, ignore this; otherwise call "
        f"{student}.train(), as from_pretrained() returns modules in evaluation mode and Lightning keeps the mode"
    ]


def _check_teacher(pl_module: LightningModule, student: str, teacher: str) -> list[str]:
    norms, random = _act_differently(pl_module.get_submodule(teacher))
    students = {without_compile(name): module for name, module in pl_module.get_submodule(student).named_modules()}
    warnings = []
    still = [
        name
        for name, norm in norms.items()
        if not norm.training and getattr(students.get(without_compile(name)), "training", True)
    ]
    if still:
        warnings.append(
            f"the teacher's batch norm ({_listed(f'{teacher}.{name}'.rstrip('.') for name in still)}) is in evaluation "
            "mode: only parameters are averaged, so its running statistics keep their initial values, and the "
            f"teacher's features become worse. Call {teacher}.train(), as DINO's authors do, or use layers without "
            "batch norm (DINOProjectionHead(batch_norm=False))"
        )
    noisy = [name for name, module in random.items() if module.training]
    if noisy:
        remedy = f"Call {teacher}.eval(), as the authors of DINOv2 do"
        if norms:
            first = f'self.get_submodule("{f"{teacher}.{noisy[0]}".rstrip(".")}")'
            remedy = f"Call {first}.eval() and so on, only on these, as its batch norm has to stay in training mode"
        warnings.append(
            f"the teacher acts randomly ({_listed(f'{teacher}.{name}'.rstrip('.') for name in noisy)} in training "
            f"mode: drop path, dropout or random positions), which makes its targets noisy. {remedy}"
        )
    return warnings


def _act_differently(side: nn.Module) -> tuple[Modules, Modules]:
    """Modules that act differently in training mode: norms with running statistics, and random modules."""
    norms = {name: module for name, module in side.named_modules() if _has_statistics(module)}
    random = {name: module for name, module in side.named_modules() if any(rate > 0 for rate in _rates(module))}
    return norms, random


def _is_trained(side: nn.Module, name: str) -> bool:
    """Whether a module, or the nearest one around it that has parameters, has any that are trained."""
    while name and not any(True for _ in side.get_submodule(name).parameters()):
        name = name.rpartition(".")[0]
    return any(parameter.requires_grad for parameter in side.get_submodule(name).parameters())


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


def _rates(module: nn.Module) -> Iterator[float]:
    """Probabilities of a module that apply only in training mode, whatever library it comes from."""
    kind = type(module).__name__.lower()
    is_drop = "drop" in kind or "stochastic" in kind  # nn.Dropout(p), DropPath, StochasticDepth, PatchDropout(prob)
    for name, value in vars(module).items():
        is_rate = isinstance(value, float) and 0 < value <= 1
        if is_rate and ("drop" in name or (is_drop and name in ("p", "prob"))):
            yield value
    if "Rope" in type(module).__name__.replace("RoPE", "Rope"):  # positions that training shifts or rescales: DINOv3
        settings = {**getattr(getattr(module, "config", None), "__dict__", {}), **vars(module)}
        of_transformers = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        of_the_authors = ("shift_coords", "jitter_coords", "rescale_coords")
        yield from (float(settings[name]) for name in of_transformers + of_the_authors if settings.get(name))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
