"""Features of labelled data, computed during training without changing it.

Sizes: N samples, D features.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics.utilities.distributed import gather_all_tensors

from dino_head._indices import spaced_indices
from dino_head._pooling import is_pair

Loaders = tuple[Iterable[Any], Iterable[Any]]


class Labelled(NamedTuple):
    """Features (N, D), labels (N,), and groups (N,) if the batches have them."""

    features: Tensor
    labels: Tensor
    groups: Tensor | None


@contextmanager
def evaluation(pl_module: LightningModule) -> Iterator[None]:
    """Context of evaluation mode without gradients; restores modes and random states.

    Inside, random numbers are the same each time and in each process.
    """
    modes = [(module, module.training) for module in pl_module.modules()]
    error = None
    with isolate_rng():  # restores nothing when an error passes through it
        try:
            torch.manual_seed(0)
            pl_module.eval()
            with torch.no_grad():
                yield
        except Exception as raised:
            error = raised
        finally:
            for module, mode in modes:
                module.training = mode
    if error is not None:
        raise error


def labelled_loaders(
    trainer: Trainer, train: Iterable[Any] | None, test: Iterable[Any] | None, callback: str
) -> Loaders:
    """Return the two loaders; the datamodule (or the LightningModule) replaces one that is None.

    It calls `knn_dataloaders()` if this method exists, else train_dataloader() and val_dataloader() (or
    test_dataloader()). From a list, a dict or a CombinedLoader of loaders, it uses the first.
    """
    if train is not None and test is not None:
        return _first_loader(train), _first_loader(test)
    data = trainer.datamodule or trainer.lightning_module  # type: ignore[attr-defined]
    if hasattr(data, "knn_dataloaders"):
        of_train, of_test = data.knn_dataloaders()  # type: ignore[operator]
        return _first_loader(of_train if train is None else train), _first_loader(of_test if test is None else test)
    names = ("train_dataloader", "val_dataloader" if is_overridden("val_dataloader", data) else "test_dataloader")
    wanted = [name for name, given in zip(names, (train, test), strict=True) if given is None]
    missing = [name for name in wanted if not is_overridden(name, data)]
    if missing:
        raise MisconfigurationException(
            f"{callback} needs images, and {type(data).__name__} has no knn_dataloaders and no "
            f"{' and '.join(missing)}: pass two loaders of batches (inputs, labels), train=... and test=..."
        )
    of_train, of_test = (
        getattr(data, name)() if given is None else given for name, given in zip(names, (train, test), strict=True)
    )
    return _first_loader(of_train), _first_loader(of_test)


def _first_loader(loaders: Any) -> Iterable[Any]:
    """The first of several loaders in a form that a Trainer accepts; any other iterable unchanged."""
    leaves = loaders.flattened if isinstance(loaders, CombinedLoader) else tree_leaves(loaders)
    is_several = isinstance(loaders, CombinedLoader) or isinstance(next(iter(leaves), None), DataLoader)
    return next(iter(leaves), ()) if is_several else loaders


def some_batches(loader: Iterable[Any], max_samples: int, rank: int = 0, world: int = 1) -> Iterator[Any]:
    """Yield this process's share of at most about `max_samples` samples: whole batches, evenly spread over the loader.

    An iterable without indices yields its first batches. The state of the loader's own generator is restored.
    """
    sampler, batch_sampler = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    if isinstance(sampler, DistributedSampler):  # yields a share already
        max_samples, rank, world = max(1, max_samples // world), 0, 1
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    owned = [getattr(owner, "generator", None) for owner in owners]
    generators = [generator for generator in owned if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(0)
    try:
        batches = _batches_of_indices(loader)
        if batches is not None:
            share = max_samples / max(1, sum(map(len, batches)))
            count = max(1, int(len(batches) * min(1.0, share)))
            chosen = [batches[index] for index in spaced_indices(len(batches), count)] if batches else []
            yield from _load(loader, chosen[rank::world])  # type: ignore[arg-type]
        else:
            taken = 0
            for index, batch in enumerate(loader):
                if taken >= max_samples:
                    break
                taken += len(batch[0] if isinstance(batch, (tuple, list)) else batch)
                if index % world == rank:
                    yield batch
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _batches_of_indices(loader: Iterable[Any]) -> list[list[int]] | None:
    """The batches of indices of an ordinary DataLoader over data with a length; None for any other iterable."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    try:
        return list(islice(loader.batch_sampler, len(loader)))
    except TypeError:  # a sampler without an end
        return None


def _load(loader: DataLoader[Any], batches: list[list[int]]) -> Iterable[Any]:
    options = {
        name: getattr(loader, name)
        for name in ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "multiprocessing_context", "timeout")
    }
    return DataLoader(loader.dataset, batch_sampler=batches, **options) if batches else ()


def features_of(pl_module: LightningModule, trainer: Trainer, module: nn.Module, inputs: Any) -> Tensor:
    """Inputs of a batch -> features (B, D) in float32, computed with the Trainer's precision.

    From a pair of class tokens (B, D) and patch tokens, it takes the class tokens.

    Raises:
        ValueError: The output is not (B, D).
    """
    with trainer.precision_plugin.forward_context():
        output = module(trainer.precision_plugin.convert_input(move_data_to_device(inputs, pl_module.device)))
    features = output[0] if is_pair(output) else output
    if not isinstance(features, Tensor) or features.dim() != 2:
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must be (B, D), but the module returns {given}: name one that pools its output")
    return features.float()


def split(batch: Any) -> tuple[Any, Tensor, Tensor | None]:
    """A batch -> inputs, labels and groups.

    Raises:
        ValueError: The batch has no labels.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"labels are missing: batches must be (inputs, labels) or (inputs, labels, groups), got a "
            f"{type(batch).__name__}{size}"
        )
    inputs, *targets = batch
    for values in targets:
        if not isinstance(values, Tensor) or values.dim() != 1 or values.is_floating_point():
            given = f"{tuple(values.shape)} in {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"labels and groups must be tensors of integers (B,), got {given}")
    return inputs, targets[0], targets[1] if len(targets) == 2 else None


def as_text(error: Exception) -> str:
    """Text of an error that does not end the run; ValueErrors, which are our own, need no type in front."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def is_sharded(module: nn.Module) -> bool:
    """Whether all processes must run the module together."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def extract(
    trainer: Trainer, pl_module: LightningModule, module: nn.Module, loader: Iterable[Any], max_samples: int
) -> Labelled:
    """Compute features of labelled data; the processes divide the work, and all get the same result.

    Raises:
        ValueError: In all processes, if any of them failed: no batch, no labels, other outputs than (B, D), or an error
            in the data or the module.
    """
    rank, world = (0, 1) if is_sharded(module) else (trainer.global_rank, trainer.world_size)
    features: list[Tensor] = []
    targets: list[Tensor] = []
    error: Exception | None = None
    try:
        for batch in some_batches(loader, max_samples, rank, world):
            inputs, labels, groups = split(batch)
            features.append(features_of(pl_module, trainer, module, inputs))
            targets.append(torch.stack([labels] if groups is None else [labels, groups], dim=1).to(pl_module.device))
        nothing = torch.empty(0, 0, device=pl_module.device)
        mine = [torch.cat(features or [nothing]), torch.cat(targets or [nothing.long()])]
    except Exception as raised:  # any error of the user's code, as the other processes wait
        error = raised
    if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
        raise ValueError("another process failed to compute features" if error is None else as_text(error)) from error
    gathered = [gather_all_tensors(tensor) if world > 1 else [tensor] for tensor in mine]
    everything = [
        torch.cat([part for part in parts if len(part)] or [tensor])
        for parts, tensor in zip(gathered, mine, strict=True)
    ]
    if not len(everything[0]):
        raise ValueError("there is no data: the loader yielded no batch")
    labels, *groups_if_any = everything[1].unbind(dim=1)
    return Labelled(everything[0], labels, groups_if_any[0] if groups_if_any else None)
