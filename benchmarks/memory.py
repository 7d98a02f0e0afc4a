"""Memory of head and loss in training, by K, batch, views and precision: permanent, and the additional peak of a step.

    python benchmarks/memory.py                    # on a CPU (Linux)
    python benchmarks/memory.py --device cuda

Permanent: both heads, gradients, AdamW's two moments, center. Step: forward of both heads on features, loss and
backward, with `factored_logits`, and on logits with a loop over pairs of views. Each case runs in its own process.
"""

import argparse
import copy
import itertools
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from dino_head import DINOLoss, DINOProjectionHead

WIDTH = 384  # width of ViT-S features; the head has the published widths, 2048 and 256


def resident(key: str, device: str) -> int:
    """Bytes in use, or their peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if key == "VmHWM" else torch.cuda.memory_allocated()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def measure(outputs: int, batch: int, views: int, bf16: bool, way: str, device: str) -> tuple[int, int]:
    """Permanent bytes, and the additional peak of a step; call it in a process that does nothing else."""

    def step(student: DINOProjectionHead, teacher: DINOProjectionHead, loss: DINOLoss, features: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            if way == "factored":
                with torch.no_grad():
                    targets = teacher.factored_logits(features[:2])
                loss(targets, student.factored_logits(features)).backward()
                return
            with torch.no_grad():
                probabilities = F.softmax((teacher(features[:2]).float() - loss.center) / 0.04, dim=-1)
            scores = student(features).float() / 0.1
            losses = [
                -(probabilities[t] * F.log_softmax(scores[s], dim=-1)).sum(dim=-1).mean()
                for t in range(2)
                for s in range(views)
                if s != t
            ]
            torch.stack(losses).mean().backward()

    def make(outputs: int) -> tuple[DINOProjectionHead, DINOProjectionHead, DINOLoss, torch.optim.AdamW]:
        student = DINOProjectionHead(WIDTH, output_dim=outputs, batch_norm=False).to(device)
        teacher = copy.deepcopy(student).requires_grad_(False)
        loss = DINOLoss(outputs, warmup_teacher_temp_epochs=0).to(device)
        return student, teacher, loss, torch.optim.AdamW(student.parameters())

    small = make(64)
    step(*small[:3], torch.randn(views, 2, WIDTH, device=device))  # libraries allocate memory on first use
    small[3].step()
    del small
    before = resident("VmRSS", device)
    student, teacher, loss, optimizer = make(outputs)
    features = torch.randn(views, batch, WIDTH, device=device)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    stays = resident("VmRSS", device) - before
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
    now = resident("VmRSS", device)
    step(student, teacher, loss, features)
    return stays, resident("VmHWM", device) - now


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[4096, 65_536, 262_144], help="K (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128], help="samples per batch (%(default)s)")
    parser.add_argument("--views", type=int, nargs="+", default=[2, 10], help="views, 2 of them global (%(default)s)")
    parser.add_argument("--precision", nargs="+", default=["32", "bf16"], choices=["32", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--of", choices=["factored", "logits"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = itertools.product(args.prototypes, args.precision, args.views, args.batch)
    if args.of:
        ((outputs, precision, views, batch),) = cases
        print(*measure(outputs, batch, views, precision == "bf16", args.of, args.device))
        return
    print("| K | precision | views | batch | permanent, MiB | step, MiB | step on logits, MiB |")
    print("|---|---|---|---|---|---|---|")
    for outputs, precision, views, batch in cases:
        row = []
        for way in ("factored", "logits"):
            command = [sys.executable, "-W", "ignore", __file__, "--of", way, "--device", args.device]
            command += ["--prototypes", str(outputs), "--batch", str(batch)]
            command += ["--views", str(views), "--precision", precision]
            stays, most = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            row.append(most)
        mib = " | ".join(f"{number / 2**20:,.0f}" for number in (stays, *row))
        print(f"| {outputs:,} | {precision} | {views} | {batch} | {mib} |", flush=True)


if __name__ == "__main__":
    main()
