"""What is installed, what each room imports, and what the repository says about itself."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dino_head

ROOT = Path(__file__).parents[1]
ROOMS = {
    "dino_head": ROOT / "dino_head",
    "dino_head.callbacks": ROOT / "callbacks",
    "dino_head.examples": ROOT / "examples",
}
LINKS = [ROOT / "dino_head" / name for name in ("callbacks", "examples")]
# Of each file below the rooms, its path when installed and its path in the checkout, with and without symlinks.
FILES = {
    f"{room.replace('.', '/')}/{file.relative_to(folder).as_posix()}": file
    for room, folder in ROOMS.items()
    for file in folder.rglob("*")
    if file.is_file() and "__pycache__" not in file.parts and not {*LINKS} & {file, *file.parents}
}


# Imports


def run_python(code: str, folder: Path = ROOT) -> list[str]:
    """The lines that the code prints in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.splitlines()


def test_importing_the_library_loads_no_lightning_no_torchmetrics_and_no_kornia():
    """The metrics, which load one of the three, show that the check can fail."""
    heavy = 'print(sorted({"lightning", "pytorch_lightning", "torchmetrics", "kornia"} & {*sys.modules}))'
    assert run_python(f"import sys, dino_head\n{heavy}\nimport dino_head.metrics\n{heavy}") == [
        "[]",
        "['torchmetrics']",
    ]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every name that the code imports, also inside functions: `a.b` and `a.b.c` of `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


# What a room must not import. The longest name that a file's path begins with is its room.
LIGHTNING = {"lightning", "pytorch_lightning"}
ABOVE_CORE = {f"dino_head.{room}" for room in ("vision", "callbacks", "cli", "examples")}
OUTSIDE = {"callbacks", "examples", "helpers", "tests"}  # names that only a checkout has
FORBIDDEN = {
    "dino_head": {*OUTSIDE, *ABOVE_CORE, *LIGHTNING, "torchmetrics", "kornia"},
    "dino_head/metrics": {*OUTSIDE, *ABOVE_CORE, *LIGHTNING},
    "dino_head/vision": {*OUTSIDE, "dino_head.callbacks", "dino_head.cli", "dino_head.examples"},
    "dino_head/callbacks": {*OUTSIDE, "dino_head.cli", "dino_head.examples"},
    "dino_head/cli": {*OUTSIDE, "dino_head.examples"},
    "dino_head/examples": OUTSIDE,
}


def against_the_arrows(path: str, source: str) -> set[str]:
    """The imports of a file that its room must not have."""
    room = max((room for room in FORBIDDEN if path.startswith((f"{room}/", f"{room}."))), key=len)
    return {
        name
        for name in imports(ast.parse(source))
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in FORBIDDEN[room])
    }


MODULES = {path: file.read_text(encoding="utf-8") for path, file in FILES.items() if path.endswith(".py")}


def test_imports_between_the_rooms_run_one_way():
    assert {path.split("/")[1] for path in MODULES} >= {
        "head.py",
        "checkpoints",
        "vision",
        "callbacks",
        "cli",
        "examples",
    }
    found = {path: against_the_arrows(path, source) for path, source in MODULES.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(("path", "line"), [
    ("dino_head/head.py", "import lightning.pytorch as pl"),
    ("dino_head/losses.py", "from torchmetrics import Metric"),
    ("dino_head/functional/dino.py", "from dino_head import callbacks"),
    ("dino_head/metrics/rankme.py", "from pytorch_lightning import Callback"),
    ("dino_head/vision/images.py", "from dino_head.cli.run_folder import fingerprint"),
    ("dino_head/callbacks/report/page.py", "from callbacks.schedule import ScheduleCallback"),
    ("dino_head/callbacks/schedule.py", "def f():\n    import dino_head.examples.dino_module"),
    ("dino_head/cli/fit.py", "from dino_head.examples.dino_module import DINO"),
    ("dino_head/examples/fit_digits.py", "import examples.dino_module"),
])  # fmt: skip
def test_an_import_against_the_arrows_is_found(path, line):
    assert against_the_arrows(path, line)


# Names that Python has on POSIX systems alone. Reaching one while a module is imported breaks the module on Windows.
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
EVERYWHERE = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
POSIX_NAMES = re.compile(
    r"signal\.(?:SIG[A-Z]+[0-9]*|alarm|setitimer|pause|pthread_kill)"
    r"|os\.(?:fork|forkpty|get[eug]+id|killpg|mkfifo|nice|register_at_fork|sched_\w+|set[eug]+id|statvfs|sysconf|uname|wait)"
    r"|select\.(?:poll|epoll)|time\.tzset"
)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    yield node
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from at_import(child)


def posix_only(source: str) -> set[str]:
    found = set()
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & POSIX_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & POSIX_MODULES
            found |= {name for alias in node.names if POSIX_NAMES.fullmatch(name := f"{node.module}.{alias.name}")}
        elif isinstance(node, ast.Attribute) and POSIX_NAMES.fullmatch(ast.unparse(node)):
            found.add(ast.unparse(node))
    return found - {f"signal.{name}" for name in EVERYWHERE}


def test_no_module_needs_a_posix_only_name_to_be_imported():
    """The tests as well: Windows collects all of them."""
    tests = {str(file): file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py")}
    found = {path: posix_only(source) for path, source in {**MODULES, **tests}.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(("source", "names"), [
    ("import fcntl", {"fcntl"}),
    ("from resource import getrusage", {"resource"}),
    ("from signal import SIGUSR1", {"signal.SIGUSR1"}),
    ("class A:\n    stop = [signal.SIGKILL, signal.SIGINT]", {"signal.SIGKILL"}),
    ("@mark(signal.SIGHUP)\ndef f(pid=os.fork()): pass", {"signal.SIGHUP", "os.fork"}),
    ("def f():\n    import resource\n    os.kill(os.getpid(), signal.SIGKILL)", set()),
])  # fmt: skip
def test_a_posix_only_name_at_import_is_found(source, names):
    assert posix_only(source) == names


# The wheel


def is_source(name: str) -> bool:
    return name.endswith((".py", "/py.typed")) or "/recipes/" in name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a checkout without symlinks: git writes the target of each into a text file."""
    source = tmp_path_factory.mktemp("source") / "dino-head"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        file = source / name
        if (ROOT / name).is_symlink():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text((ROOT / name).readlink().as_posix())
        elif (ROOT / name).exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, file)
    return build(source, tmp_path_factory.mktemp("wheel"))


def build(source, folder):
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    return folder / run_python(code, source)[-1]


def sources_of(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert any(name.endswith("licenses/LICENSE") for name in names)
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_of_a_checkout_without_symlinks_holds_every_file_of_the_rooms(wheel):
    """So nothing is missing in the list of packages, and there is no top-level `callbacks` or `examples`."""
    expected = {name for name in FILES if is_source(name)}
    assert {
        "dino_head/callbacks/schedule.py",
        "dino_head/examples/recipes/digits.yaml",
        "dino_head/py.typed",
    } < expected
    assert sources_of(wheel) == expected


def test_the_wheel_of_a_checkout_with_symlinks_is_the_same(wheel, tmp_path):
    for name in ("dino_head", "callbacks", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, symlinks=True, ignore=ignored)
    if not (tmp_path / "source" / "dino_head" / "callbacks").is_symlink():
        pytest.skip("this checkout has no symlinks")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / "source")
    assert sources_of(build(tmp_path / "source", tmp_path)) == sources_of(wheel)


def test_the_wheel_works_beside_a_users_own_callbacks_and_examples_folders(wheel, tmp_path):
    """From another folder, with the checkout out of reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for name in ("callbacks", "examples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True")
    printed = run_python(
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path / 'site')!r}]\n"
        "import callbacks, examples, dino_head\n"
        "import dino_head.callbacks as ours, dino_head.examples.dino_module as module, dino_head.cli as cli\n"
        "print(callbacks.MINE, examples.MINE)\n"
        "for part in (dino_head, ours, module, cli): print(part.__file__)",
        tmp_path,
    )
    places = ["__init__.py", "callbacks/__init__.py", "examples/dino_module.py", "cli/__init__.py"]
    assert printed == ["True True", *(str(tmp_path / "site" / "dino_head" / place) for place in places)]


# Names, settings and files about the repository


def test_public_names():
    assert {name for name in dir(dino_head) if name in dino_head.__all__} == set(dino_head.__all__)
    assert len(dino_head.__all__) <= 18  # the budget: 5 modules, 3 metrics, about 10 functions


def test_pre_commit_runs_the_lint_of_make_test():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    lint = re.search(r"\nlint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text())[1]
    assert entries == [line.removeprefix("\t$(BIN)/") for line in lint.splitlines()]


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dino_head.__version__
