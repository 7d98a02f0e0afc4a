"""What the callbacks' hooks cost in a step, in microseconds: the hooks alone are called, on a head of a real size.

A freeze's hooks run for every step; its proof (the comparison of values) runs after the first two steps of a fit and at
the end of each frozen epoch, and is listed by itself.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOProjectionHead
from dino_head.callbacks import FreezeLastLayerCallback


class Module(LightningModule):
    """A head of K = 65,536 whose gradients are set by hand, so that nothing but hooks is timed."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.head = DINOProjectionHead(384, 2048, 256, output_dim, batch_norm=False, freeze_last_layer=1_000_000)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Any loss that reaches the last layer."""
        return self.head.last_layer.weight[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD: it is never timed."""
        return torch.optim.SGD([p for p in self.head.parameters() if p.requires_grad], lr=0.0)


class Measure(Callback):
    """Calls the hooks of the callbacks in a running Trainer, interleaved, and keeps the time of each round."""

    def __init__(self, callbacks: dict[str, Callback], rounds: int, calls: int) -> None:
        self.callbacks, self.rounds, self.calls = callbacks, rounds, calls
        self.figures: dict[str, list[float]] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is in place here, and nothing else runs."""
        optimizer = trainer.optimizers[0]
        layer = pl_module.head.last_layer  # type: ignore[union-attr]
        gradient = torch.zeros_like(layer.weight_v)  # type: ignore[union-attr, arg-type]
        for callback in self.callbacks.values():
            callback.on_train_start(trainer, pl_module)

        def step(callback: Callback) -> None:
            layer.weight_v.grad = gradient  # type: ignore[union-attr]
            callback.on_after_backward(trainer, pl_module)
            callback.on_before_optimizer_step(trainer, pl_module, optimizer)
            callback.on_train_batch_end(trainer, pl_module, None, None, 0)

        for _ in range(self.rounds):
            for name, callback in self.callbacks.items():
                self._time(name, lambda callback=callback: step(callback), self.calls)  # type: ignore[misc]
            freeze = self.callbacks["freeze"]
            self._time("proof", lambda freeze=freeze: freeze.on_train_epoch_end(trainer, pl_module), 1)  # type: ignore[misc]

    def _time(self, name: str, call: Callable[[], None], calls: int) -> None:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.figures.setdefault(name, []).append((time.perf_counter() - start) / calls * 1e6)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (%(default)s)")
    parser.add_argument("--calls", type=int, default=2000, help="steps in a round (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=65_536, help="K (%(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    freeze = FreezeLastLayerCallback()
    measure = Measure({"nothing": Callback(), "freeze": freeze}, args.rounds, args.calls)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(args.prototypes), DataLoader(TensorDataset(torch.zeros(2))))
    medians = {name: statistics.median(values) for name, values in measure.figures.items()}
    print(f"K = {args.prototypes}, median of {args.rounds} rounds")
    print(f"FreezeLastLayerCallback, hooks of a frozen step: {medians['freeze'] - medians['nothing']:.1f} us")
    with_proof = medians["freeze"] - medians["nothing"] + medians["proof"] / 100
    print(f"the same with its proof, in an epoch of 100 steps: {with_proof:.1f} us")
    print(f"proof, once an epoch: {medians['proof'] / 1000:.1f} ms")


if __name__ == "__main__":
    main()
