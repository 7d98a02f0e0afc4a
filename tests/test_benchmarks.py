import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("import_time", ["--rounds", "1"], "import dino_head / import torch: "),
        ("callbacks", ["--rounds", "1", "--calls", "10", "--prototypes", "64"], "hooks of a frozen step: "),
    ],
)
def test_the_benchmark_runs(name, options, printed):
    """The figures themselves are read by people; here it is only kept alive."""
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / f"{name}.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed in result.stdout


def test_every_benchmark_is_run_here():
    assert {file.stem for file in BENCHMARKS.glob("*.py")} == {"import_time", "callbacks"}
