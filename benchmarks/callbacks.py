"""Cost of the callbacks in a step: their hooks, in microseconds, and the teacher's average beside the usual loop.

Hooks: the hooks of one step are called in a running Trainer, with so few parameters that arithmetic takes no time; only
the frozen head has a realistic size. The comparison of its values runs after the first two steps of a fit and at the
end of each frozen epoch, and is listed separately.

Average: the parameters of a ViT-S/16 with its head, against a Python loop over them as in the authors' code.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback


class Module(LightningModule):
    """A head of realistic size to freeze, and a student, teacher and loss of two numbers each."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.head = DINOProjectionHead(384, 2048, 256, output_dim, batch_norm=False, freeze_last_layer=1_000_000)
        self.student = nn.Linear(1, 1)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = DINOLoss(2, centering="sinkhorn")  # without a center to update

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Any loss that reaches the last layer."""
        return self.head.last_layer.weight[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD: it is never timed."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=0.0, weight_decay=0.1)


class Measure(Callback):
    """Calls the hooks of the callbacks in a running Trainer, interleaved, and keeps the time of each round."""

    def __init__(self, callbacks: dict[str, Callback], rounds: int, calls: int) -> None:
        self.callbacks, self.rounds, self.calls = callbacks, rounds, calls
        self.times: dict[str, list[float]] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure here, where everything is set up and nothing else runs."""
        optimizer = trainer.optimizers[0]
        layer = pl_module.head.last_layer  # type: ignore[union-attr]
        gradient, value = torch.zeros_like(layer.weight_v), torch.zeros((), requires_grad=True)  # type: ignore[union-attr, arg-type]
        outputs = torch.zeros(2, 1, 4)
        # A step between two checks, like most steps.
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
        trainer.fit_loop.epoch_loop.max_steps = -1
        sides: list[nn.Module] = [pl_module.student, pl_module.teacher]  # type: ignore[list-item]
        students, teachers = ([p.detach() for p in side.parameters()] for side in sides)
        note_step = {}
        for name, callback in self.callbacks.items():
            callback.setup(trainer, pl_module, "fit")
            callback.on_train_start(trainer, pl_module)
            note_step[name] = list(optimizer._optimizer_step_post_hooks.values())
            callback.on_train_end(trainer, pl_module)  # removes its hooks
            callback.on_train_start(trainer, pl_module)
            optimizer._optimizer_step_post_hooks.clear()

        def step(name: str) -> None:
            callback = self.callbacks[name]
            layer.weight_v.grad = gradient  # type: ignore[union-attr]
            callback.on_train_batch_start(trainer, pl_module, None, 0)
            for hook in list(pl_module.loss._forward_hooks.values()):  # type: ignore[union-attr]
                hook(pl_module.loss, (outputs, outputs), {}, value)
            callback.on_before_backward(trainer, pl_module, value)
            callback.on_after_backward(trainer, pl_module)
            callback.on_before_optimizer_step(trainer, pl_module, optimizer)
            for hook in note_step[name]:
                hook(optimizer, (), {})
            callback.on_train_batch_end(trainer, pl_module, None, None, 0)

        for _ in range(self.rounds):
            for name in self.callbacks:
                self._time(name, lambda name=name: step(name), self.calls)  # type: ignore[misc]
            self._time("arithmetic", lambda: get_ema_multi_avg_fn(0.996)(teachers, students, 0), self.calls)
            freeze = self.callbacks["freeze"]
            self._time("proof", lambda freeze=freeze: freeze.on_train_epoch_end(trainer, pl_module), 1)  # type: ignore[misc]

    def _time(self, name: str, call: Callable[[], None], calls: int) -> None:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.times.setdefault(name, []).append((time.perf_counter() - start) / calls * 1e6)


def vit_small(output_dim: int) -> nn.Module:
    """The parameters of a ViT-S/16 (width 384, 12 blocks) with its head."""
    block = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True)
    blocks = nn.TransformerEncoder(block, 12, enable_nested_tensor=False)
    return nn.ModuleList([nn.Conv2d(3, 384, 16, 16), blocks, DINOProjectionHead(384, 2048, 256, output_dim)])


@torch.no_grad()
def python_loop(teachers: list[torch.Tensor], students: list[torch.Tensor], momentum: float) -> None:
    """Average one parameter after the other."""
    for teacher, student in zip(teachers, students, strict=True):
        teacher.data.mul_(momentum).add_((1 - momentum) * student.detach().data)


def average(rounds: int, output_dim: int) -> dict[str, float]:
    """Median milliseconds of an average, with the loop and with the callback's function."""
    student = vit_small(output_dim)
    students, teachers = list(student.parameters()), list(copy.deepcopy(student).parameters())
    ours = get_ema_multi_avg_fn(0.996)
    ways: dict[str, Callable[[], None]] = {
        "loop": lambda: python_loop(teachers, students, 0.996),  # type: ignore[arg-type]
        "ours": lambda: ours(teachers, students, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (%(default)s)")
    parser.add_argument("--calls", type=int, default=2000, help="steps in a round (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=65_536, help="K (%(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    callbacks = {
        "nothing": Callback(),
        "freeze": FreezeLastLayerCallback(),
        "teacher": TeacherUpdateCallback(total_steps=10**9),
        "schedule": ScheduleCallback("weight_decay", (0.04, 0.4), total_steps=10**9),
    }
    measure = Measure(callbacks, args.rounds, args.calls)
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
    medians = {name: statistics.median(values) for name, values in measure.times.items()}
    print(f"K = {args.prototypes}, median of {args.rounds} rounds")
    arithmetic = {"freeze": 0.0, "teacher": medians["arithmetic"], "schedule": 0.0}
    for name, own in arithmetic.items():
        hooks = medians[name] - medians["nothing"] - own
        print(
            f"{type(callbacks[name]).__name__}, hooks of a step: {hooks:.1f} us (without its arithmetic, {own:.1f} us)"
        )
    with_proof = medians["freeze"] - medians["nothing"] + medians["proof"] / 100
    print(f"the freeze with its proof, in an epoch of 100 steps: {with_proof:.1f} us")
    print(f"the proof, once an epoch: {medians['proof'] / 1000:.1f} ms")
    times = average(args.rounds, args.prototypes)
    print(
        f"average of a ViT-S/16 and its head: {times['ours']:.1f} ms, a loop over parameters {times['loop']:.1f} ms, "
        f"ratio {times['ours'] / times['loop']:.2f}"
    )


if __name__ == "__main__":
    main()
