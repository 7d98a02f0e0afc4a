import json
import runpy
import sys
from pathlib import Path

import pytest

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
        ("watching", ["--rounds", "1", "--epochs", "1"], "watched / alone: "),
    ],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs(name, options, printed, monkeypatch, capsys):
    """People read the values; this only shows that it works."""
    (train, labels), test = digits()
    monkeypatch.setattr(fit_digits, "digits", lambda: ((train[:140], labels[:140]), test))
    file = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, *options])
    runpy.run_path(file, run_name="__main__")
    assert printed in capsys.readouterr().out


@pytest.mark.slow
def test_the_objectives_figures_go_to_a_file_and_a_wrong_variant_stops_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["objective.py"])
    objective = runpy.run_path(str(BENCHMARKS / "objective.py"))
    options = ["--rounds", "2", "--prototypes", "64", "--batch", "2", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["objective.py", *options])
    objective["main"]()
    assert "| 64 | 2 | factored frozen | " in capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(objective["VARIANTS"])
    assert all(row["seconds"] > 0 and row["rounds"] == 2 for row in rows)
    right = objective["VARIANTS"]["factored"]
    objective["VARIANTS"]["factored"] = lambda teacher, student, center: 1.01 * right(teacher, student, center)
    with pytest.raises(SystemExit, match="factored differs from the loop over pairs"):
        objective["main"]()


def test_every_benchmark_is_run_here():
    assert {file.stem for file in BENCHMARKS.glob("*.py")} == {
        "import_time",
        "callbacks",
        "objective",
        "memory",
        "train_step",
        "watching",
    }
