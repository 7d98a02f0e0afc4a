"""Each name of dino_head.vision works with the packages that it needs, and every missing package names its extra."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dino_head.vision
from dino_head._extras import EXTRAS, packages_of_extras

ROOT = Path(__file__).parents[2]

# For each set of packages, a use of every name that needs them beside torch.
USES = {
    (): """
from dino_head import DINOProjectionHead
from dino_head.vision import Features, ResumableLoader, TokenFeatures, check_backbone
assert TokenFeatures(torch.nn.Conv2d(3, 8, 4, 4), "", lambda maps: maps).patch_size == (4, 4)
backbone = Features(torch.nn.Flatten(), lambda features: features)
check_backbone(backbone, DINOProjectionHead(48, 8, 4, 16), [torch.zeros(2, 3, 4, 4)])
trainer = SimpleNamespace(world_size=1, global_rank=0, fit_loop=SimpleNamespace(batch_idx=-1))
assert len([*ResumableLoader(torch.arange(8), 4, trainer)]) == 2
""",
    ("kornia",): """
from dino_head.vision import dino_views
assert len(dino_views(16, 8, 1)(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))) == 3
""",
    ("transformers",): """
from dino_head.vision import vit
assert vit("tiny", 16, 32, width=64, depth=1)(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
""",
    ("numpy", "pillow"): """
from dino_head.vision import read_image
assert read_image(str(folder / "a.png"), 16).shape == (3, 16, 16)
""",
    ("nibabel",): """
from dino_head.vision import read_volume
assert read_volume(str(folder / "a.nii"), 8).shape == (1, 8, 8, 8)
""",
    ("datasets", "lightning", "pillow"): """
from dino_head.vision import ImageData, StreamData
assert not ImageData(str(folder)).has_classes
assert not StreamData(str(folder)).has_classes
""",
    ("lightning", "nibabel"): """
from dino_head.vision import VolumeData
assert VolumeData(str(folder)).description.startswith("1 files")
""",
}


def requirements(name, extras=("",)):
    """The installed distributions that one needs, itself included, with those that they need."""
    needed, pending = set(), [(canonicalize_name(name), extra) for extra in extras]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in needed:
            continue
        needed.add((name, extra))
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(requirement.name), one) for one in ("", *requirement.extras)]
    return {name for name, _ in needed}


def environment(folder, packages):
    """A folder of links to the files of torch, these packages and the packages that they need, and to no others."""
    folder.mkdir()
    for name in set().union(*map(requirements, ("torch", *packages))):
        files = distribution(name).files or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution(name).locate_file(top))
    return folder


def run(code, folder):
    """Run the code with the packages of a folder alone."""
    begin = f"import sys; sys.path[1:1] = [{str(ROOT)!r}, {str(folder)!r}]\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", begin + code], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with an image and a volume."""
    from helpers.pictures import picture
    from helpers.scans import write_scan

    folder = tmp_path_factory.mktemp("data")
    picture().save(folder / "a.png")
    write_scan(folder / "a.nii", [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("packages", USES, ids=lambda packages: "-".join(packages) or "torch")
def test_names_work_with_the_packages_that_they_need_and_no_others(packages, data, tmp_path):
    begin = f"from pathlib import Path; from types import SimpleNamespace; import torch; folder = Path({str(data)!r})"
    result = run(begin + USES[packages], environment(tmp_path / "site-packages", packages))
    assert result.returncode == 0, result.stderr[-2000:]


def test_every_name_is_used_above():
    assert {*dino_head.vision.__all__} == {*dino_head.vision._MODULES} <= {*dir(dino_head.vision)}
    assert [name for name in dino_head.vision.__all__ if name not in "".join(USES.values())] == []
    with pytest.raises(AttributeError, match=r"module 'dino_head\.vision' has no attribute 'Image'"):
        dino_head.vision.Image  # noqa: B018


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("dino_views", "kornia", "train"),
        ("read_image", "PIL", "train"),
        ("ImageData", "datasets", "train"),
        ("StreamData", "datasets", "train"),
        ("vit", "transformers", "train"),
        ("read_volume", "nibabel", "volumes"),
        ("VolumeData", "nibabel", "volumes"),
        ("volume_views", "monai", "volumes"),
    ],
)
def test_a_missing_package_names_the_extra_to_install(name, package, extra, monkeypatch):
    class Missing:
        def find_spec(self, name, *_):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for module in [*sys.modules]:
        if module.startswith(("dino_head.vision.", package)):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    message = f'dino_head.vision.{name} needs {package}: pip install "dino-head[{extra}]"'
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        use(name)


def use(name):
    if name == "volume_views":  # a module
        importlib.import_module(f"dino_head.vision.{name}")
    else:
        getattr(dino_head.vision, name)()


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_is_named_by_its_error(extra):
    """Those that the error knows are those that the extra installs."""
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {canonicalize_name(Requirement(line).name) for line in extras[extra]} - {"dino-head"}
    known = packages_distributions()
    assert {canonicalize_name(known[package][0]) for package in EXTRAS[extra]} == installed
    for package in EXTRAS[extra]:
        message = rf'^a needs {package}: pip install "dino-head\[{extra}\]"$'
        with pytest.raises(ModuleNotFoundError, match=message), packages_of_extras("a"):
            raise ModuleNotFoundError("No module", name=package)


def test_the_error_of_any_other_module_is_not_changed():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'nothing'$"), packages_of_extras("a"):
        import nothing  # noqa: F401
