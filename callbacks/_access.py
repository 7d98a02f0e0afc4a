"""What several callbacks ask of a LightningModule and a Trainer."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def find_submodule(pl_module: LightningModule, name: str, argument: str) -> nn.Module:
    """`pl_module.get_submodule(name)`, with an error that says which argument gave the name and what there is."""
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in pl_module.named_children())
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no submodule {name!r} ({error}); it has {children}: give names "
            f"as named_modules() lists them, with {argument}"
        ) from None


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that may be sharded, in the parameter's own memory, without gradient."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def refuse_deepspeed(trainer: Trainer, callback: str, reason: str) -> None:
    """Stop under DeepSpeed, by whatever class it comes."""
    strategy = trainer.strategy
    if any("DeepSpeed" in kind.__name__ for kind in type(strategy).__mro__):
        raise MisconfigurationException(
            f"{callback} does not work under {type(strategy).__name__}, which {reason}: use DDP or fully_shard "
            "(ModelParallelStrategy)"
        )
