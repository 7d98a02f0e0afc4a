import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dino_head

ROOT = Path(__file__).parents[1]

BOUNDARY = """
import sys
{statement}
heavy = {{"lightning", "pytorch_lightning", "torchmetrics", "kornia"}} & set(sys.modules)
print(",".join(sorted(heavy)))
"""


def imported_by(statement: str) -> set[str]:
    command = [sys.executable, "-W", "ignore", "-c", BOUNDARY.format(statement=statement)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(output.strip().split(",")) - {""}


def test_importing_the_library_loads_no_lightning_no_torchmetrics_and_no_kornia():
    assert imported_by("import dino_head") == set()


def test_the_check_of_imports_can_fail():
    assert "lightning" in imported_by("import dino_head.callbacks")


@pytest.mark.parametrize(("folder", "forbidden"), [("dino_head", "lightning"), ("callbacks", "callbacks")])
def test_the_arrows_between_the_rooms_run_one_way(folder, forbidden):
    modules = set()
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").split(".")[0])
    assert modules
    assert forbidden not in modules
    assert "examples" not in modules


def test_public_names():
    assert {name for name in dir(dino_head) if name in dino_head.__all__} == set(dino_head.__all__)
    assert len(dino_head.__all__) <= 18  # the budget: 5 modules, 3 metrics, about 10 functions


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "dino-head"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_every_module_once_and_no_top_level_callbacks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"dino_head/{file.name}" for file in (ROOT / "dino_head").glob("*.py")}
    expected |= {f"dino_head/callbacks/{file.name}" for file in (ROOT / "callbacks").glob("*.py")}
    expected.add("dino_head/py.typed")
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert len(names) == len(set(names))
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_beside_a_users_own_callbacks_folder(wheel, tmp_path):
    """From another folder, with the checkout out of reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("MINE = True")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path / 'site')!r}]\n"
        "import callbacks, dino_head, dino_head.callbacks as ours\n"
        "print(callbacks.MINE, dino_head.__file__, ours.FreezeLastLayerCallback.__module__)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert output == [
        "True",
        str(tmp_path / "site" / "dino_head" / "__init__.py"),
        "dino_head.callbacks.freeze_last_layer",
    ]
