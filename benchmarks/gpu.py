"""Tests, objective and training step on a GPU: one table, in at most 6 minutes on an H100.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu        # at reduced size, to check the script; the values mean nothing

It needs torch, lightning, torchmetrics, transformers and pytest alone, and no installation of this repository.

1. The tests marked `gpu`.
2. A forward and backward of the last layer and the objectives in bf16, for blocks of several sizes, beside the usual
   losses, the authors' loop over pairs and the bare matrix products (see objective.py and patches.py).
3. A whole step of DINO and of DINOv2 in bf16, ViT-S/16 with 2 global and 8 local views, which are random and on the
   device, beside the same modules with the usual losses on logits (see train_step.py).

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout, which need not be installed
sys.path.insert(0, str(Path(__file__).parent))

import measuring
import objective
import patches
import torch
import train_step
from torch import Tensor, nn

from dino_head.functional.ibot import patch_weights

ROOT = Path(__file__).parents[1]
TEST_SECONDS = 180  # before the tests count as failed
CAPTION = """\
/ floor: time relative to the matrix products alone. GB/s: the bytes of the logits' passes that any method with
separate products needs, in bf16, over the time. (The teacher's logits are written and read, with Sinkhorn four times;
the student's are written, read, overwritten by their gradient, and read by two products.) Memory: peak above inputs,
weights and their gradients (objective), above weights and the optimizer's state (step)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is measured."""

    prototypes: tuple[int, ...]
    batches: tuple[int, ...]
    patch_prototypes: tuple[int, ...]
    patches: int
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
    patch_prototypes=(65_536, 131_072),
    patches=3726,
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
    patch_prototypes=(64,),
    patches=6,
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
            seconds = measuring.seconds(work[name], device)
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


def measure_objectives(sizes: Sizes, device: str, problems: list[str]) -> Iterator[Row]:
    """One row for each objective, K, number of samples and variant; variants that compute another loss are problems."""
    cases = [(objective.DINO, outputs, batch) for outputs in sizes.prototypes for batch in sizes.batches]
    for of_patches in (patches.IBOT, patches.SINKHORN):
        cases += [(of_patches, outputs, sizes.patches) for outputs in sizes.patch_prototypes]
    for measured, outputs, samples in cases:
        ours = measured.variants["factored"]
        blocks = {name: functools.partial(ours, block_bytes=size) for name, size in BLOCKS.items()}
        measured = replace(measured, variants={**measured.variants, **blocks})
        names = [name for name in NAMES if name in measured.variants]
        case = measured.make(outputs, samples, device)
        work: dict[str, Callable[[], object]] = {
            name: functools.partial(measuring.run, measured.variants[name], case, True) for name in names
        }
        found = interleaved(work, sizes.rounds, device)
        if measured.plain in found:
            try:
                measuring.check(measured, list(found), case, True)
            except SystemExit as error:
                problems.append(f"{measured.name}, K = {outputs}, {samples} samples: {error}")
        del case, work
        for name in names:
            row: Row = {"what": f"{measured.name}: {name}", "prototypes": outputs, "samples": samples}
            row |= {"rounds": sizes.rounds, "seconds": found.get(name), "floor": found["floor"], "bytes": None}
            if name in found:
                row["gigabytes_per_second"] = 2 * measured.passes * samples * outputs / found[name] / 1e9
                row["bytes"] = measuring.memory_here(measured, name, outputs, samples, device, True)
            yield row


class Usual(nn.Module):
    """A usual loss on logits in memory that replaces a module's own, with a center updated from the teacher."""

    center: Tensor

    def __init__(self, loss: Callable[..., Tensor], output_dim: int) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("center", torch.zeros(output_dim))

    def forward(self, teacher: measuring.Side, student: measuring.Side, *others: Any) -> Tensor:
        """Outputs of both sides, and for patches their masks -> the loss."""
        logits = teacher.logits()
        weights = [patch_weights(masks, len(logits)).to(logits.device) for masks in others if isinstance(masks, Tensor)]
        loss = self.loss(logits, student.logits(), self.center, *weights)
        with torch.no_grad():
            self.center.lerp_(logits.flatten(end_dim=-2).mean(dim=0, dtype=torch.float32), 0.1)
        return loss


def measure_step(sizes: Sizes, device: str, problems: list[str]) -> Iterator[Row]:
    """One row for each method and loss; losses that differ in the first step are a problem."""
    outputs, batch = sizes.step_prototypes, sizes.step_batch
    student, views = train_step.make(
        sizes.vit, batch, outputs, sizes.scale, torch.device(device), depth=sizes.depth, hidden_dim=sizes.hidden_dim
    )
    work: dict[str, Callable[[], Tensor]] = {}
    for method, kind in {"DINO": train_step.Ours, "DINOv2": train_step.OursOfDINOv2}.items():
        first = []
        for name in ("ours", "usual"):
            way = kind(copy.deepcopy(student), outputs)
            if name == "usual":
                way.module.loss = Usual(objective.usual_loss, outputs).to(device)
                way.module.patch_loss = Usual(patches.usual_loss, outputs).to(device)
            optimizer = torch.optim.AdamW(way.student.parameters(), lr=1e-5)
            work[f"{method}, {name}"] = functools.partial(train_step.step, way, optimizer, views, bf16=True)
            first.append(work[f"{method}, {name}"]().item())
        if abs(first[0] - first[1]) > 0.05 * first[1]:
            problems.append(f"the losses of the first step of {method} differ: ours {first[0]}, usual {first[1]}")
    found = interleaved(dict(work), sizes.rounds, device)
    for name, call in work.items():
        row: Row = {"what": f"step of ViT-{sizes.vit}: {name}", "prototypes": outputs, "samples": batch}
        row |= {"rounds": sizes.rounds, "seconds": found.get(name)}
        row["images_per_second"] = batch / found[name] if name in found else None
        row["bytes"] = measuring.peak_bytes(call, device) if name in found else None
        yield row


def copy_speed(sizes: Sizes, device: str) -> float:
    """Bytes read and written in a second by a copy on the device."""
    source = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = interleaved({"copy": lambda: target.copy_(source)}, sizes.rounds, device)
    return 2 * sizes.copied_bytes / found["copy"]


def table(rows: list[Row]) -> str:
    """One line for each row."""
    lines = ["| what | K | samples | time, ms | / floor | GB/s | images/s | memory, MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        seconds, memory = row["seconds"], row["bytes"]
        cells = [row["what"], f"{row['prototypes']:,}", f"{row['samples']:,}"]
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
    for measure in (measure_objectives, measure_step):
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
