"""What a freeze is about: the modules it holds, and the trainers under which it could not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dino_head.callbacks._access import find_submodule, refuse_deepspeed
from dino_head.head import DINOProjectionHead

MODULE = 'module="student.head"'


@dataclass
class Record:
    """What was seen of one freeze; saved in the checkpoint."""

    since: int  # global step at which it began
    cancelled: bool = False  # whether there was ever a gradient to cancel
    compared_at: int = 0  # global step of the last comparison of values
    receipt: str | None = None


@dataclass
class Target:
    """One module to freeze."""

    name: str
    head: DINOProjectionHead | None  # where the limit is the head's own
    module: nn.Module
    parameters: list[nn.Parameter] = field(init=False)  # the trainable ones
    record: Record = field(default_factory=lambda: Record(since=0))
    before: dict[str, Tensor] = field(default_factory=dict)  # this process's values when this fit took up the freeze
    taken_up_at: int = 0  # global step of those values
    steps_of_this_fit: int = 0

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def has_gradient(self) -> bool:
        """Whether there is anything to cancel."""
        return any(parameter.grad is not None for parameter in self.parameters)


def find_targets(pl_module: LightningModule, module: str | None, has_limit: bool) -> list[Target]:
    """The last layers of all heads, or the one named module; `has_limit`: the limit is not the head's own."""
    heads = [(name, found) for name, found in pl_module.named_modules() if isinstance(found, DINOProjectionHead)]
    if module is not None:
        chosen = find_submodule(pl_module, module, MODULE)
        chosen = getattr(chosen, "_orig_mod", chosen)  # of torch.compile
        if not isinstance(chosen, DINOProjectionHead):
            if not has_limit:
                raise MisconfigurationException(
                    f"{module!r} is a {type(chosen).__name__}, which has no freeze_last_layer of its own: "
                    "give the callback a limit, freeze_last_layer=1 (epochs) or steps=500"
                )
            return _trainable([Target(module, None, chosen)])
        heads = [(module, chosen)]
    if not heads:
        raise MisconfigurationException(
            f"FreezeLastLayerCallback found no DINOProjectionHead in {type(pl_module).__name__}: make the head an "
            'attribute of the module, or name what to freeze, FreezeLastLayerCallback(1, module="head.last_layer")'
        )
    targets = _trainable(
        [Target(f"{name}.last_layer", None if has_limit else head, head.last_layer) for name, head in heads]
    )
    if not has_limit and all(target.head and target.head.freeze_last_layer == -1 for target in targets):
        raise MisconfigurationException(
            f"FreezeLastLayerCallback would freeze nothing: {_names(targets)} has freeze_last_layer=-1, the head's "
            "default: set it on the head, DINOProjectionHead(..., freeze_last_layer=1), or on the callback "
            "(0 says that nothing is to be frozen)"
        )
    return targets


def _trainable(targets: Sequence[Target]) -> list[Target]:
    """Those that can be trained, with the parameters that can; a teacher's head has none."""
    found = [target for target in targets if target.parameters]
    if not found:
        raise MisconfigurationException(
            f"{_names(targets)} has no trainable parameter after the strategy's set-up: with FSDP use fully_shard "
            "(ModelParallelStrategy) or use_orig_params=True, which leave the parameters in their modules; otherwise "
            "let them require gradients (the callback does the freezing)"
        )
    return found


def check_trainer(trainer: Trainer, targets: Sequence[Target]) -> None:
    """Refuse a trainer under which cancelling gradients would not freeze, or would break something else."""
    reason = f"keeps gradients outside of parameter.grad, so that those of {_names(targets)} cannot be cancelled"
    refuse_deepspeed(trainer, "FreezeLastLayerCallback", reason)
    if getattr(trainer.strategy.model, "static_graph", False) and not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            f"{_names(targets)} cannot be frozen with static_graph=True under manual optimization: gradients are "
            "reduced after on_after_backward there and must not be missing. Use static_graph=False or automatic "
            "optimization"
        )
    frozen = {id(parameter): target.name for target in targets for parameter in target.parameters}
    optimized = [
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in trainer.optimizers
    ]
    # Without any, the user steps optimizers of their own, which only the comparison of values can watch.
    if optimized and not frozen.keys() <= set().union(*optimized):
        name = next(name for key, name in frozen.items() if not any(key in keys for keys in optimized))
        raise MisconfigurationException(
            f"a parameter of {name} is in no optimizer, though it requires a gradient, and would never train: if it is "
            "a teacher's, let that require none, teacher.requires_grad_(False); if it is the student's, pass all of "
            "its parameters to the optimizer in configure_optimizers"
        )
    has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
    if has_scaler and any(keys <= frozen.keys() for keys in optimized):
        raise MisconfigurationException(
            f"an optimizer holds {_names(targets)} alone, and a GradScaler stops with 'No inf checks were recorded' "
            "at an optimizer without gradients: make it a parameter group of the other optimizer"
        )


def _names(targets: Sequence[Target]) -> str:
    return ", ".join(target.name for target in targets)
