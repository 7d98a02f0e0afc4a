"""Tests, objective and training step on a GPU: one table, in at most 6 minutes on an H100.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu        # at reduced size, to check the script; the values mean nothing

It needs torch, lightning, torchmetrics, transformers and pytest alone, and no installation of this repository.

1. The tests marked `gpu`.
2. A forward and backward of the last layer and the objective in bf16, for blocks of several sizes, beside the usual
   loss, the authors' loop over pairs and the bare matrix products (see objective.py).
3. A whole step of ViT-S/16 in bf16 with 2 global and 8 local views, which are random and on the device, beside the
   same module with the usual loss on logits (see train_step.py).

Times are medians of interleaved rounds. If a test fails, a variant computes another loss or a part raises an error, the
other parts still run, and the exit status is 1.
"""

import argparse
import copy
import functools
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout, which need not be installed
sys.path.insert(0, str(Path(__file__).parent))

import objective
import torch
import train_step
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
TEST_SECONDS = 180  # before the tests count as failed
CAPTION = """\
/ floor: time relative to the matrix products alone. GB/s: the bytes of the logits' passes that any method with
separate products needs, 2 T + 5 S times B x K values of bf16, over the time. (The teacher's logits are written and
read; the student's are written, read, overwritten by their gradient, and read by two products.) Memory: peak above
inputs, weights and their gradients (objective), above weights and the optimizer's state (step)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is measured."""

    prototypes: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    copied_bytes: int
    vit: str
    depth: int | None  # None: the published one
    hidden_dim: int  # of the head
    scale: float  # of the views' sides
    step_prototypes: int
    step_batch: int


FULL = Sizes(
    prototypes=(65_536, 262_144),
    batches=(64, 128),
    rounds=15,
    copied_bytes=2**30,
    vit="small",
    depth=None,
    hidden_dim=2048,
    scale=1.0,
    step_prototypes=65_536,
    step_batch=64,
)
REDUCED = Sizes(
    prototypes=(64, 128),
    batches=(2, 4),
    rounds=1,
    copied_bytes=2**20,
    vit="tiny",
    depth=1,
    hidden_dim=64,
    scale=0.2,
    step_prototypes=64,
    step_batch=2,
)
BLOCKS = {f"factored, {mib} MiB": mib * 2**20 for mib in (128, 256, 512)}
NAMES = ["floor", *BLOCKS, "usual", "pairwise"]
Row = dict[str, Any]


def run_tests(device: str, selected: str) -> dict[str, Any]:
    """Run the tests in a process of their own; counts of the outcomes, and whether all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    # Without pytest-xdist. A warning of another version of a package is shown, and is no failure.
    command += ["-o", "addopts=--import-mode=importlib", "-W", "default"]
    command += ["-m", "gpu" if device == "cuda" else "not gpu", "-k", selected, "tests/test_gpu.py"]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TEST_SECONDS)
        output, is_ok = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output, is_ok = partial.decode() if isinstance(partial, bytes) else partial, False
        print(f"the tests did not end within {TEST_SECONDS} seconds")
    print(output, flush=True)
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output)}
    return {"ok": is_ok and counts.get("passed", 0) > 0, **counts, "seconds": time.perf_counter() - start}


def interleaved(work: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Medians in seconds of all rounds; calls that run out of memory are missing."""
    times: dict[str, list[float]] = {name: [] for name, call in work.items() if fits(call)}
    for index in range(rounds + 1):
        for name in times:
            seconds = objective.seconds(work[name], device)
            if index:  # another round to warm up
                times[name].append(seconds)
    return {name: statistics.median(of_name) for name, of_name in times.items()}


def fits(call: Callable[[], object]) -> bool:
    """Whether a call has enough memory."""
    try:
        call()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    torch.cuda.empty_cache()  # not in the handler, where the error still refers to the tensors
    return False


def measure_objective(sizes: Sizes, device: str, problems: list[str]) -> Iterator[Row]:
    """One row for each K, batch and variant; variants that differ from the loop over pairs are problems."""
    objective.VARIANTS.update(
        {name: functools.partial(objective.our_loss, block_bytes=size) for name, size in BLOCKS.items()}
    )
    for outputs in sizes.prototypes:
        for batch in sizes.batches:
            case = objective.make(outputs, batch, device)
            work: dict[str, Callable[[], object]] = {
                name: functools.partial(objective.run, name, case, True) for name in NAMES
            }
            found = interleaved(work, sizes.rounds, device)
            if "pairwise" in found:
                try:
                    objective.check([name for name in found if name != "pairwise"], case, True)
                except SystemExit as error:
                    problems.append(f"K = {outputs}, batch {batch}: {error}")
            del case, work
            least = 2 * (2 * objective.TEACHER_VIEWS + 5 * objective.VIEWS) * batch * outputs
            for name in NAMES:
                row: Row = {"what": f"objective: {name}", "prototypes": outputs, "batch": batch, "rounds": sizes.rounds}
                row["seconds"], row["floor"] = found.get(name), found["floor"]
                row["gigabytes_per_second"] = least / found[name] / 1e9 if name in found else None
                row["bytes"] = objective.memory_here(name, outputs, batch, device, True) if name in found else None
                yield row


class UsualLoss(train_step.Ours):
    """The same module with logits in memory and the usual loss."""

    def __init__(self, student: nn.ModuleDict, output_dim: int) -> None:
        super().__init__(student, output_dim)
        self.center = torch.zeros(1, 1, output_dim, device=next(student.parameters()).device)

    def loss(self, views: list[Tensor]) -> Tensor:
        """Logits of both sides, softmax, log-softmax and an einsum for all pairs."""
        student = self.module.outputs(self.module.student, views).logits()
        with torch.no_grad():
            teacher = self.module.outputs(self.module.teacher, views[: objective.TEACHER_VIEWS]).logits()
        loss = objective.usual_loss(teacher, student, self.center)
        with torch.no_grad():
            self.center.lerp_(teacher.mean(dim=(0, 1), dtype=torch.float32), 0.1)
        return loss


def measure_step(sizes: Sizes, device: str, problems: list[str]) -> Iterator[Row]:
    """One row for each loss; losses that differ in the first step are a problem."""
    outputs, batch = sizes.step_prototypes, sizes.step_batch
    student, views = train_step.make(
        sizes.vit, batch, outputs, sizes.scale, torch.device(device), depth=sizes.depth, hidden_dim=sizes.hidden_dim
    )
    ways = {"DINOLoss": train_step.Ours(copy.deepcopy(student), outputs), "usual": UsualLoss(student, outputs)}
    work: dict[str, Callable[[], Tensor]] = {}
    for name, way in ways.items():
        optimizer = torch.optim.AdamW(way.student.parameters(), lr=1e-5)
        work[name] = functools.partial(train_step.step, way, optimizer, views, bf16=True)
    ours, usual = (call().item() for call in work.values())
    if abs(ours - usual) > 0.05 * usual:
        problems.append(f"the losses of the first step differ: DINOLoss {ours}, usual {usual}")
    found = interleaved(dict(work), sizes.rounds, device)
    for name, call in work.items():
        row: Row = {"what": f"step of ViT-{sizes.vit}: {name}", "prototypes": outputs, "batch": batch}
        row |= {"rounds": sizes.rounds, "seconds": found.get(name)}
        row["images_per_second"] = batch / found[name] if name in found else None
        row["bytes"] = objective.peak_bytes(call, device) if name in found else None
        yield row


def copy_speed(sizes: Sizes, device: str) -> float:
    """Bytes read and written in a second by a copy on the device."""
    source = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = interleaved({"copy": lambda: target.copy_(source)}, sizes.rounds, device)
    return 2 * sizes.copied_bytes / found["copy"]


def table(rows: list[Row]) -> str:
    """One line for each row."""
    lines = ["| what | K | batch | time, ms | / floor | GB/s | images/s | memory, MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        seconds, memory = row["seconds"], row["bytes"]
        cells = [row["what"], f"{row['prototypes']:,}", str(row["batch"])]
        cells.append("out of memory" if seconds is None else f"{1000 * seconds:.2f}")
        cells.append(f"{seconds / row['floor']:.2f}" if seconds and "floor" in row else "")
        cells += [f"{row[key]:,.1f}" if row.get(key) else "" for key in ("gigabytes_per_second", "images_per_second")]
        cells.append("out of memory" if memory is None else f"{memory / 2**20:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run everything, print the table, and exit with status 1 if there were problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: at reduced size")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only these tests, as pytest's -k")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu runs at reduced size")
    is_reduced = args.device == "cpu"
    sizes = REDUCED if is_reduced else FULL
    start = time.perf_counter()
    tests = run_tests(args.device, args.tests)
    copied = copy_speed(sizes, args.device)
    problems = [] if tests["ok"] else ["not all tests passed"]
    rows: list[Row] = []
    for measure in (measure_objective, measure_step):
        try:
            for row in measure(sizes, args.device, problems):
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
        except Exception:  # a GPU is rarely at hand: keep the other results
            problems.append(traceback.format_exc())
    device = "CPU" if is_reduced else torch.cuda.get_device_name()
    result = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "is_reduced": is_reduced}
    result |= {"tests": tests, "problems": problems, "copy_bytes_per_second": copied, "rows": rows}
    result["seconds"] = time.perf_counter() - start
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "error", "errors") if name in tests)
    print(f"\n{device}, torch {torch.__version__}, bf16, medians of {sizes.rounds} rounds; tests: {counts or 'none'}")
    if is_reduced:
        print("REDUCED SIZE, to check the script: the values mean nothing.")
    print(f"A copy on the device: {copied / 1e9:,.0f} GB/s, read and written. Everything: {result['seconds']:.0f} s.\n")
    print(f"{table(rows)}\n\n{CAPTION}")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
