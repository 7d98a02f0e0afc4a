"""Time and memory of a forward and a backward of the last layer and an objective, for objective.py and patches.py.

Before timing, losses and gradients of all variants are compared with those of the plain formula. Time: medians of
interleaved rounds in one process. Memory: peak above inputs, weights and their gradients, each variant in its own
process.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head import FactoredLogits

Side = FactoredLogits
Case = tuple[Any, ...]  # both sides, and what else the loss needs
Variant = Callable[..., Tensor]  # a case -> loss
WIDTH = 256
TEACHER_TEMP, STUDENT_TEMP = 0.04, 0.1
CHECKED = 512  # samples, to compare variants


@dataclass(frozen=True)
class Objective:
    """Variants of one loss, on inputs of the same shapes."""

    name: str
    make: Callable[[int, int, str], Case]  # K, number of samples, device -> inputs
    plain: str  # the variant that the others have to equal
    variants: dict[str, Variant]  # among them "floor" and "factored"
    passes: int  # over samples x K values, that any method with separate products needs


def bare_products(teacher: Side, student: Side, *, of_teacher: int = 1) -> Tensor:
    """The matrix products that any exact method needs, and nothing else; their gradients are meaningless."""
    device = student.z.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    z, prototypes = (tensor.to(dtype) for tensor in student)
    with torch.no_grad():
        for _ in range(of_teacher):
            F.linear(teacher.z.flatten(end_dim=-2).to(dtype), teacher.prototypes.to(dtype))
        logits = F.linear(z.flatten(end_dim=-2), prototypes)  # also stands for the gradient of the logits
        student.prototypes.grad = (logits.T @ z.flatten(end_dim=-2)).float()
        student.z.grad = (logits @ prototypes).float().view_as(z)
    return student.z.new_zeros(())


def on_logits(loss: Variant) -> Variant:
    """Apply a loss to logits as in a training step, where the logits stay in memory until it returns the loss."""

    def training_step(teacher: Side, student: Side, *others: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher.logits()
        student_logits = student.logits()
        return loss(teacher_logits, student_logits, *others)

    return training_step


def frozen(loss: Variant) -> Variant:
    """The prototypes need no gradient."""

    def training_step(teacher: Side, student: Side, *others: Tensor) -> Tensor:
        return loss(teacher, Side(student.z, student.prototypes.detach()), *others)

    return training_step


def in_bf16(loss: Variant) -> Variant:
    """The same under autocast."""

    def training_step(teacher: Side, student: Side, *others: Tensor) -> Tensor:
        with torch.autocast(student.z.device.type, torch.bfloat16):
            return loss(teacher, student, *others)

    return training_step


def sides(outputs: int, device: str, teacher: tuple[int, ...], student: tuple[int, ...]) -> list[Side]:
    """Random unit vectors of these shapes and prototypes of teacher and student, which needs gradients."""
    found = []
    for shape in (teacher, student):
        z = F.normalize(torch.randn(*shape, WIDTH, device=device), dim=-1)
        found.append(Side(z, F.normalize(torch.randn(outputs, WIDTH, device=device), dim=-1)))
    for tensor in found[1]:
        tensor.requires_grad_()
    return found


def run(variant: Variant, case: Case, bf16: bool) -> Tensor:
    """Run one forward and backward, starting without gradients."""
    student = case[1]
    for tensor in student:
        tensor.grad = None
    with torch.autocast(student.z.device.type, torch.bfloat16, enabled=bf16):
        loss = variant(*case)
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def check(objective: Objective, names: list[str], case: Case, bf16: bool) -> None:
    """Exit if losses or gradients differ from those of the plain formula."""
    student = case[1]
    expected = run(objective.variants[objective.plain], case, bf16)
    gradients = [tensor.grad for tensor in student]
    for name in names:
        if name in ("floor", objective.plain):
            continue
        tolerance = 5e-2 if bf16 or "bf16" in name else 1e-4
        loss = run(objective.variants[name], case, bf16)
        differences = {"loss": ((loss - expected).abs() / expected).item()}
        for part, tensor, gradient in zip(student._fields, student, gradients, strict=True):
            if (part, name) != ("prototypes", "factored frozen"):
                assert tensor.grad is not None
                differences[part] = ((tensor.grad - gradient).norm() / gradient.norm()).item()
        if name == "usual":  # an einsum of B x K terms in float32: its loss drifts with the batch, not its gradients
            print(f"loss of {name}: off by {differences.pop('loss'):.1e} (relative)")
        if max(differences.values()) > tolerance:
            raise SystemExit(f"{name} differs from {objective.plain}: relative differences {differences}")


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


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def memory_here(objective: Objective, name: str, outputs: int, samples: int, device: str, bf16: bool) -> int:
    """Peak bytes of a run above inputs, weights and their gradients, measured in this process."""
    variant = objective.variants[name]
    run(variant, objective.make(16, 2, device), bf16)  # libraries allocate memory on first use
    case = objective.make(outputs, samples, device)
    student: Side = case[1]
    peak = peak_bytes(lambda: run(variant, case, bf16), device)
    return peak - sum(tensor.grad.nbytes for tensor in student if tensor.grad is not None)


def measure(objective: Objective, outputs: int, samples: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one case; one row for each variant."""
    names = [name for name in objective.variants if name not in args.skip and not (args.bf16 and "bf16" in name)]
    check(objective, names, objective.make(outputs, min(samples, CHECKED), args.device), args.bf16)
    case = objective.make(outputs, samples, args.device)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            work = functools.partial(run, objective.variants[name], case, args.bf16)
            rounds[name].append(seconds(work, args.device))
    del case, work
    rows = []
    for name in names:
        command = [sys.executable, args.script, "--memory-of", objective.name, name, "--device", args.device]
        command += ["--prototypes", str(outputs), "--samples", str(samples)] + ["--bf16"] * args.bf16
        row = {"objective": objective.name, "prototypes": outputs, "samples": samples, "variant": name}
        row |= {"rounds": args.rounds, "seconds": statistics.median(rounds[name]), "least_seconds": min(rounds[name])}
        ratios = [ours / floor for ours, floor in zip(rounds[name], rounds["floor"], strict=True)]
        row |= {"ratio": statistics.median(ratios), "least_ratio": min(rounds[name]) / min(rounds["floor"])}
        row["bytes"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each variant."""
    lines = ["| objective | K | samples | variant | time, ms | / floor | of the fastest rounds | memory, MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["objective"], f"{row['prototypes']:,}", f"{row['samples']:,}", row["variant"]]
        cells += [f"{1000 * row['seconds']:,.0f}", f"{row['ratio']:.2f}", f"{row['least_ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['bytes'] / 2**20:,.0f} |")
    return "\n".join(lines)


def main(
    script: str,
    doc: str | None,
    objectives: list[Objective],
    *,
    prototypes: list[int],
    samples: list[int],
    meaning: str,
) -> None:
    """Print the table of a script's objectives, and write it to a file with --json; `meaning` explains --samples."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", type=int, nargs="+", default=prototypes, help="K (%(default)s)")
    parser.add_argument("--samples", type=int, nargs="+", default=samples, help=f"{meaning} (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (%(default)s)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="VARIANT", help="variants that are not measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="all variants under bf16 autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.set_defaults(script=script)
    args = parser.parse_args()
    if args.memory_of:
        (objective,) = [objective for objective in objectives if objective.name == args.memory_of[0]]
        size = args.prototypes[0], args.samples[0]
        print(memory_here(objective, args.memory_of[1], *size, args.device, args.bf16))
        return
    rows = []
    for objective in objectives:
        for outputs in args.prototypes:
            for number in args.samples:
                rows += measure(objective, outputs, number, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    where = {"device": device, "machine": platform.machine(), "torch": torch.__version__, "bf16": args.bf16}
    print(f"{device}, torch {torch.__version__}, median of {args.rounds} rounds")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**where, "rows": rows}, indent=2))
