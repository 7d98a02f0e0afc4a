import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_head.examples import fit_digits
from dino_head.examples.fit_digits import digits

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("import_time", ["--rounds", "1"], "import dino_head / import torch: "),
        ("callbacks", ["--rounds", "1", "--calls", "10", "--prototypes", "64"], "a loop over parameters "),
        ("train_step", ["--rounds", "1", "--batch", "2", "--prototypes", "64", "--scale", "0.2"], "usual / ours: "),
        ("memory", ["--prototypes", "64", "--batch", "2", "--views", "2", "--precision", "32"], "| 64 | 32 | 2 | 2 | "),
        ("masks", ["--rounds", "1"], "128 views of 16 x 16: "),
        (
            "patches",
            ["--rounds", "1", "--prototypes", "64", "--samples", "6"],
            ", Sinkhorn | 64 | 6 | factored | ",
        ),
        ("watching", ["--rounds", "1", "--epochs", "1"], "watched / alone: "),
    ],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs(name, options, printed, monkeypatch, capsys):
    """People read the values; this only shows that it works."""
    (train, labels), test = digits()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(fit_digits, "digits", lambda: ((train[:140], labels[:140]), test))
    file = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, *options])
    runpy.run_path(file, run_name="__main__")
    assert printed in capsys.readouterr().out


@pytest.mark.slow
def test_results_of_the_objective_go_to_a_file_and_a_wrong_variant_stops_it(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["objective.py"])
    objective = runpy.run_path(str(BENCHMARKS / "objective.py"))
    options = ["--rounds", "2", "--prototypes", "64", "--samples", "2", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["objective.py", *options])
    objective["main"]()
    assert "| DINO | 64 | 2 | factored frozen | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(objective["VARIANTS"])
    assert all(row["seconds"] > 0 and row["rounds"] == 2 for row in rows)
    right = objective["VARIANTS"]["factored"]
    objective["VARIANTS"]["factored"] = lambda teacher, student, center: 1.01 * right(teacher, student, center)
    with pytest.raises(SystemExit, match="factored differs from pairwise"):
        objective["main"]()


@pytest.fixture
def gpu(monkeypatch):
    """The names of the benchmark on a GPU."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(BENCHMARKS / "gpu.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_gpu_benchmark_runs_at_reduced_size(gpu, tmp_path, monkeypatch, capsys):
    options = ["--device", "cpu", "--tests", "noticed and item", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu["main"]()
    printed = capsys.readouterr().out
    assert "REDUCED SIZE" in printed
    assert "| step of ViT-tiny: DINOv2, usual | 64 | 2 | " in printed
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert (result["tests"]["passed"], result["problems"]) == (1, [])
    of_patches = [name for name in gpu["NAMES"] if name != "pairwise"]
    assert len(result["rows"]) == 2 * 2 * len(gpu["NAMES"]) + 2 * len(of_patches) + 4
    assert all(row["seconds"] > 0 for row in result["rows"])


def test_problems_of_the_gpu_benchmark_are_its_exit_status_and_the_other_parts_run(gpu, monkeypatch, capsys):
    row = {"what": "a step", "prototypes": 64, "samples": 2, "seconds": 0.5, "images_per_second": 4.0, "bytes": 2**20}
    parts = {
        "run_tests": lambda device, selected: {"ok": False, "passed": 3, "failed": 1},
        "measure_objectives": lambda *arguments: 1 / 0,
        "measure_step": lambda *arguments: [row],
    }
    for name, part in parts.items():
        monkeypatch.setitem(gpu["main"].__globals__, name, part)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"(?s)not all tests passed.*ZeroDivisionError"):
        gpu["main"]()
    printed = capsys.readouterr().out
    assert "tests: 3 passed, 1 failed" in printed
    assert "| a step | 64 | 2 | 500.00 |  |  | 4.0 | 1 |" in printed


def test_a_variant_that_runs_out_of_memory_is_a_row_of_the_gpu_benchmark(gpu):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = gpu["interleaved"]({"large": too_large, "small": lambda: None}, 2, "cpu")
    assert found.keys() == {"small"}
    row = {"what": "usual", "prototypes": 65536, "samples": 128, "floor": 1.0, "seconds": None, "bytes": None}
    assert "| usual | 65,536 | 128 | out of memory |  |  |  | out of memory |" in gpu["table"]([row])


@pytest.mark.slow
def test_the_gpu_benchmark_and_its_tests_need_no_optional_package():
    code = """
import runpy, sys
optional = "datasets hypothesis jsonargparse kornia monai nibabel sklearn xdist"
sys.modules.update(dict.fromkeys(optional.split()))  # None: importing it raises ImportError
import test_gpu
gpu = runpy.run_path("benchmarks/gpu.py")
gpu["train_step"].make("tiny", 1, 64, 0.2, gpu["torch"].device("cpu"), depth=1)
"""
    root = BENCHMARKS.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": path}, check=True)


def test_every_benchmark_is_run_here():
    assert {file.stem for file in BENCHMARKS.glob("*.py")} == {
        "import_time",
        "callbacks",
        "objective",
        "masks",
        "memory",
        "train_step",
        "watching",
        "gpu",
        "patches",
        "measuring",
    }
