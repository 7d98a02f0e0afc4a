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


@pytest.fixture
def learning():
    """The names of the benchmark of learning, with a smaller network."""
    names = runpy.run_path(str(BENCHMARKS / "learning.py"))
    names["SETTINGS"].update(width=32, depth=1, batch_size=8)
    return names


def test_the_labels_of_the_images_that_the_benchmark_makes_are_those_of_their_shapes(learning):
    images, classes, labels = learning["make_images"](400, seed=0)
    assert images.shape == (400, 1, 96, 96)
    assert labels.shape == (400, 96, 96)
    assert classes.unique().tolist() == list(range(len(learning["CLASSES"])))
    assert len(learning["PIXEL_LABELS"]) == 1 + len(learning["CLASSES"])
    for image, kind, label in zip(images, classes, labels, strict=True):
        assert label.unique().tolist() == [0, 1 + kind]
        steps = image[0].diff(dim=0)[:, 1:].abs() + image[0].diff(dim=1)[1:].abs()  # large in a texture
        inside = label[1:, 1:] > 0
        assert steps[inside].mean() > 1.5 * steps[~inside].mean(), learning["CLASSES"][kind]


def test_the_same_seed_makes_the_same_images_and_another_one_others(learning):
    first, again, other = (learning["make_images"](20, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05


def test_the_label_of_a_patch_is_the_most_frequent_one_of_its_pixels(learning):
    _, _, labels = learning["make_images"](10, seed=0)
    found = learning["patch_labels"](labels)
    assert found.shape == (10, 36)
    for index, label in enumerate(labels):
        for patch in range(36):
            y, x = 16 * (patch // 6), 16 * (patch % 6)
            assert label[y : y + 16, x : x + 16].flatten().bincount().argmax() == found[index, patch]


@pytest.mark.slow
def test_the_benchmark_of_learning_probes_as_many_patches_of_each_label(learning):
    for _, _, labels, chosen in learning["Probe"](300).sides:
        counts = labels.flatten()[chosen].bincount()
        assert len(counts) == 17
        assert counts.min() == counts.max() > 20
        assert len(chosen.unique()) == len(chosen)


def test_both_methods_of_the_benchmark_of_learning_start_from_the_same_weights(learning):
    dino, dinov2, other = (
        learning["build"](learning["METHODS"][method], seed).state_dict() for method, seed in ((0, 3), (1, 3), (0, 4))
    )
    assert dino.keys() < dinov2.keys()
    assert all(torch.equal(value, dinov2[name]) for name, value in dino.items())
    assert not torch.equal(dino["student.head.last_layer.weight_v"], other["student.head.last_layer.weight_v"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [0, 1])
def test_the_benchmark_of_learning_trains_the_teacher_that_it_probes(learning, method):
    images = learning["make_images"](32, seed=0)[0]
    model = learning["build"](learning["METHODS"][method], seed=0)
    before = learning["of_teacher"](model)(images)
    times = learning["fit"](model, images, 3, seed=0)
    after = learning["of_teacher"](model)(images)
    assert model.trainer.global_step == 3
    assert times["cpu_seconds"] > 0
    assert [tuple(tokens.shape) for tokens in after] == [(32, 32), (32, 36, 32)]
    assert not any(torch.allclose(ours, theirs) for ours, theirs in zip(before, after, strict=True))


@pytest.mark.slow
def test_nearest_neighbours_among_pixels_are_near_chance(learning):
    """Chance is 6.25% for images, 5.9% for patches, whose pixels show the texture at best: one class of four."""
    found = learning["Probe"](1000).accuracy(learning["pixels"])
    assert 3 < found["cls"] < 11
    assert found["patch"] < 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_of_learning_trains_each_method_with_each_seed(learning, tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    options = ["--minutes", "0.005", "--seeds", "3", "4", "--images", "64", "--held-out", "100", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["learning.py", *options])
    learning["main"]()
    assert "| DINO + iBOT + KoLeo | 4 | " in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    methods = list(learning["METHODS"])
    assert [row["what"] for row in rows] == ["pixels", "untrained", "untrained", *methods, *methods]
    assert [row["seed"] for row in rows[3:]] == [3, 3, 4, 4]
    assert all(row["steps"] >= 1 and row["cpu_seconds"] > 0 for row in rows[3:])
    assert all(0 <= row[name] <= 100 for row in rows for name in ("cls", "patch"))


def test_every_benchmark_is_run_here():
    assert {file.stem for file in BENCHMARKS.glob("*.py")} == {
        "import_time",
        "callbacks",
        "learning",
        "objective",
        "masks",
        "memory",
        "train_step",
        "watching",
        "gpu",
        "patches",
        "measuring",
    }
