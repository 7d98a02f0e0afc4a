"""Rules stay apart from watching, and files stay few and short."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "callbacks"
FILES = {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in FOLDER.rglob("*.py")}
CHECKED = {name for name in FILES if name.startswith("_checks/")}
RULES = {"_after_step", "freeze_last_layer", "schedule", "teacher_update"}
WATCHING = {"_features", "collapse_monitor", "knn_probe", *(name for name in FILES if name.startswith("report/"))}
CHECKS = {"testing"}
PACKAGE = "dino_head.callbacks"


def imported(file):
    """Modules of the callbacks that a file imports, by their names in FILES; "" is the whole package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = {name.removeprefix(PACKAGE).lstrip(".").replace(".", "/") for name in names if name.startswith(PACKAGE)}
    return {path for path in paths if path in FILES or f"{path}/__init__" in FILES or path == ""}


def test_every_file_is_a_rule_watches_or_is_a_check():
    assert CHECKED | RULES | WATCHING | CHECKS | {"__init__"} == set(FILES)


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_import_rules_alone(name):
    assert imported(FILES[name]) <= RULES | CHECKED | {"_checks"}


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_the_checks_import_checks_alone(name):
    assert imported(FILES[name]) <= CHECKED | {"_checks"}


def test_at_most_three_private_parts_of_which_small_ones_have_several_users():
    private = [name for name in FILES if name.startswith("_") and not name.startswith("__") and "/" not in name]
    assert len(private) <= 2  # and the package _checks
    for name in private:
        users = [file for file in FILES.values() if name in imported(file)]
        assert len(users) > 1 or len(FILES[name].read_text().splitlines()) >= 100, name


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_longer_than_400_lines(name):
    assert len(FILES[name].read_text().splitlines()) <= 400
