"""Time and memory of a forward and a backward of the last layer and the objective, beside the bare matrix products.

    python benchmarks/objective.py                               # the table in docs/benchmarks.md
    python benchmarks/objective.py --device cuda --bf16 --batch 64

Every variant gets unit vectors of 2 global and 8 local views and the prototypes of both sides, and computes the
student's gradients. Before timing, losses and gradients are compared with those of the loop over pairs.
Time: medians of interleaved rounds in one process. Memory: peak above inputs, weights and their gradients, each variant
in its own process.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head import FactoredLogits, dino_loss

Side = FactoredLogits
Variant = Callable[[Side, Side, Tensor], Tensor]
TEACHER_VIEWS, VIEWS, WIDTH = 2, 10, 256
TEACHER_TEMP, STUDENT_TEMP = 0.04, 0.1


def floor(teacher: Side, student: Side, _: Tensor) -> Tensor:
    """The matrix products that any exact method needs, and nothing else; their gradients are meaningless."""
    z, prototypes = (tensor.to(product_dtype(tensor.device)) for tensor in student)
    with torch.no_grad():
        F.linear(teacher.z.flatten(0, 1).to(z.dtype), teacher.prototypes.to(z.dtype))
        logits = F.linear(z.flatten(0, 1), prototypes)  # also stands for the gradient of the logits
        student.prototypes.grad = (logits.T @ z.flatten(0, 1)).float()
        student.z.grad = (logits @ prototypes).float().view_as(z)
    return student.z.new_zeros(())


def usual_loss(teacher: Tensor, student: Tensor, center: Tensor) -> Tensor:
    """Stacked views, softmax and log-softmax, and an einsum for all pairs."""
    teacher = torch.stack(teacher.flatten(0, 1).chunk(TEACHER_VIEWS))
    student = torch.stack(student.flatten(0, 1).chunk(VIEWS))
    targets = F.softmax((teacher - center) / TEACHER_TEMP, dim=-1)
    log_q = F.log_softmax(student / STUDENT_TEMP, dim=-1)
    entropies = -torch.einsum("tbk,sbk->ts", targets, log_q).fill_diagonal_(0)
    return entropies.sum() / (entropies.numel() - entropies.diagonal().numel()) / teacher.shape[1]


def pairwise_loss(teacher: Tensor, student: Tensor, center: Tensor) -> Tensor:
    """A loop over pairs of views, as in the authors' code, which computes log-softmax for each pair."""
    targets = F.softmax((teacher.flatten(0, 1) - center[0]) / TEACHER_TEMP, dim=-1)
    views = (student.flatten(0, 1) / STUDENT_TEMP).chunk(VIEWS)
    losses = []
    for t, target in enumerate(targets.chunk(TEACHER_VIEWS)):
        for s, view in enumerate(views):
            if s != t:
                losses.append(torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean())
    return torch.stack(losses).mean()


def our_loss(teacher: Any, student: Any, center: Tensor, **options: int) -> Tensor:
    """The loss of this library; `options` may set block_bytes."""
    return dino_loss(teacher, student, center=center, teacher_temp=TEACHER_TEMP, student_temp=STUDENT_TEMP, **options)


def on_logits(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Variant:
    """Apply a loss to logits as in a training step, where the logits stay in memory until it returns the loss."""

    def training_step(teacher: Side, student: Side, center: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher.logits()
        student_logits = student.logits()
        return loss(teacher_logits, student_logits, center)

    return training_step


VARIANTS: dict[str, Variant] = {
    "floor": floor,
    "usual": on_logits(usual_loss),
    "pairwise": on_logits(pairwise_loss),
    "logits": on_logits(our_loss),
    "factored": our_loss,
    "factored frozen": our_loss,  # the prototypes need no gradient
    "factored bf16": our_loss,  # under autocast
}


def product_dtype(device: torch.device) -> torch.dtype:
    """Autocast's type if it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def make(outputs: int, batch: int, device: str) -> tuple[Side, Side, Tensor]:
    """Random inputs of both sides and a center."""
    torch.manual_seed(0)
    sides = []
    for views in (TEACHER_VIEWS, VIEWS):
        z = F.normalize(torch.randn(views, batch, WIDTH, device=device), dim=-1)
        sides.append(Side(z, F.normalize(torch.randn(outputs, WIDTH, device=device), dim=-1)))
    for tensor in sides[1]:
        tensor.requires_grad_()
    return sides[0], sides[1], 0.01 * torch.randn(1, 1, outputs, device=device)


def run(name: str, case: tuple[Side, Side, Tensor], bf16: bool) -> Tensor:
    """Run one forward and backward, starting without gradients."""
    teacher, student, center = case
    for tensor in student:
        tensor.grad = None
    student.prototypes.requires_grad_(name != "factored frozen")
    with torch.autocast(student.z.device.type, torch.bfloat16, enabled=bf16 or name == "factored bf16"):
        loss = VARIANTS[name](teacher, student, center)
    if loss.requires_grad:
        loss.backward()
    student.prototypes.requires_grad_()
    return loss.detach()


def check(names: list[str], case: tuple[Side, Side, Tensor], bf16: bool) -> None:
    """Exit if losses or gradients differ from those of the loop over pairs."""
    student = case[1]
    expected = run("pairwise", case, bf16)
    gradients = [tensor.grad for tensor in student]
    for name in names:
        if name == "floor":
            continue
        tolerance = 5e-2 if bf16 or name == "factored bf16" else 1e-4
        loss = run(name, case, bf16)
        differences = {"loss": ((loss - expected).abs() / expected).item()}
        for part, tensor, gradient in zip(student._fields, student, gradients, strict=True):
            if gradient is not None and (part, name) != ("prototypes", "factored frozen"):
                assert tensor.grad is not None
                differences[part] = ((tensor.grad - gradient).norm() / gradient.norm()).item()
        if name == "usual":  # a sum of B x K terms in float32: its loss drifts with the batch, not its gradients
            print(f"loss of {name}: off by {differences.pop('loss'):.1e} (relative)")
        if max(differences.values()) > tolerance:
            raise SystemExit(f"{name} differs from the loop over pairs: relative differences {differences}")


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of a call, measured by events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000
    now = time.perf_counter()
    work()
    return time.perf_counter() - now


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Peak bytes of a call above those in use before; on a CPU, call it in a process that does nothing else."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def memory_here(name: str, outputs: int, batch: int, device: str, bf16: bool) -> int:
    """Peak bytes of a run above inputs, weights and their gradients, measured in this process."""
    run(name, make(16, 2, device), bf16)  # libraries allocate memory on first use
    case = make(outputs, batch, device)
    peak = peak_bytes(lambda: run(name, case, bf16), device)
    return peak - sum(tensor.grad.nbytes for tensor in case[1] if tensor.grad is not None)


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def measure(outputs: int, batch: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure one case; one row for each variant."""
    names = [name for name in VARIANTS if not (args.bf16 and name == "factored bf16")]
    case = make(outputs, batch, args.device)
    check(names, case, args.bf16)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            rounds[name].append(seconds(functools.partial(run, name, case, args.bf16), args.device))
    del case
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--device", args.device]
        command += ["--prototypes", str(outputs), "--batch", str(batch)] + ["--bf16"] * args.bf16
        memory = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = {"prototypes": outputs, "batch": batch, "variant": name, "rounds": len(rounds[name])}
        rows.append(row | {"seconds": statistics.median(rounds[name]), "bytes": memory})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each variant, with ratios to the floor's time and the factored objective's memory."""
    lines = ["| K | batch | variant | time, ms | / floor | memory, MiB | / factored |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        of_case = {
            other["variant"]: other
            for other in rows
            if (other["prototypes"], other["batch"]) == (row["prototypes"], row["batch"])
        }
        lines.append(
            f"| {row['prototypes']:,} | {row['batch']} | {row['variant']} | {1000 * row['seconds']:.0f} | "
            f"{row['seconds'] / of_case['floor']['seconds']:.2f} | {row['bytes'] / 2**20:.0f} | "
            f"{row['bytes'] / of_case['factored']['bytes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it to a file with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[4096, 65_536, 262_144], help="K (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128], help="samples per batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="all variants under bf16 autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_here(args.memory_of, args.prototypes[0], args.batch[0], args.device, args.bf16))
        return
    rows = []
    for outputs in args.prototypes:
        for batch in args.batch:
            rows += measure(outputs, batch, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    where = {"device": device, "machine": platform.machine(), "torch": torch.__version__, "bf16": args.bf16}
    print(f"{device}, torch {torch.__version__}, median of {args.rounds} rounds")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**where, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
