"""Work in several processes, which find each other as those of torchrun do."""

import functools
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

# A fork server imports the slow packages once and forks each process from itself: new every time, and started at once.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if START_METHOD == "forkserver":
    multiprocessing.get_context(START_METHOD).set_forkserver_preload(["lightning.pytorch.cli", "torchmetrics"])


def run_in_processes(work: Callable[[Path], Any], folder: Path, processes: int = 2) -> list[Any]:
    """The results of `work(folder)`, a function that can be imported by name, in each of some new processes.

    Raises:
        ProcessRaisedException: a process raised an error.
        ProcessExitedException: a process was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        _start, (work, folder, processes, port), nprocs=processes, start_method=START_METHOD
    )
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(processes)]


def _start(rank: int, work: Callable[[Path], Any], folder: Path, processes: int, port: int) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**world, **meeting}.items()})
    torch.set_num_threads(1)
    torch.save(work(folder), folder / f"result{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at the interpreter's end, threads of gloo that still run sometimes abort the process


def in_gloo_group(work: Callable[[int, Path], Any]) -> Callable[[Path], Any]:
    """`work(rank, folder)` as work for `run_in_processes`, in a group of all its processes."""

    @functools.wraps(work)
    def joined(folder: Path) -> Any:
        dist.init_process_group("gloo")
        result = work(dist.get_rank(), folder)
        dist.barrier()  # gloo may wait for ever for a process that destroys the group earlier
        return result

    return joined
