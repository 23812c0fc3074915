"""What users install or copy: the wheel, and the folder tcopd_kernels on its own.

Child processes see the standard library, the copy under test, and torch with what torch itself depends on.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "tcopd_kernels"

# Imports and runs the packages named first in turn; prints the third-party packages that the first import loaded,
# those that all of it loaded, and where the packages came from.
EXAMPLE = """
import importlib, sys
names = sys.argv[1].split(",")
sys.path += sys.argv[2:]
import torch

def loaded():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

def run(kernels):
    hidden = torch.randn(7, 16, requires_grad=True)
    head = torch.randn(33, 16, requires_grad=True)
    targets, weights = torch.randint(33, (7,)), torch.full((7,), 1 / 7)
    logprob, _, entropy = kernels.linear_logprob(hidden, head, targets, entropy=True)
    loss, _, tokens = kernels.linear_tcopd_loss(hidden, head, targets, advantage=torch.randn(7), weights=weights)
    teachers = kernels.multi_linear_logprob([hidden, hidden], [head, head], targets)
    (loss + entropy.mean()).backward()
    torch.testing.assert_close(logprob, torch.log_softmax(hidden @ head.T, 1)[range(7), targets])
    torch.testing.assert_close(teachers[1], logprob.detach())
    torch.testing.assert_close(tokens.logprob, logprob.detach())
    assert torch.isfinite(hidden.grad).all() and head.grad.abs().max() > 0

before = loaded()
packages = [importlib.import_module(names[0])]
at_import = loaded() - before
packages += [importlib.import_module(name) for name in names[1:]]
for package in packages:
    run(package)
assert not any("tcopd_kernels._triton" in name for name in sys.modules), "only a GPU needs the Triton kernels"
print(*at_import, sep=" ")
print(*loaded() - before, sep=" ")
print(*(package.__file__ for package in packages), sep=" ")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources so that no build folder appears beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*_cache")
    for name in ("pyproject.toml", "setup.py", "README.md", "tcopd_fast", "kernels", "tests", "bench"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=junk)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def only_torch(tmp_path_factory) -> Path:
    """A folder that holds torch, triton and everything they need, but nothing else of this environment."""
    folder = tmp_path_factory.mktemp("torch")
    pending, seen = ["torch", "triton"], set()
    while pending:
        name = pending.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # triton on other systems, CUDA libraries of another build of torch
        if (key := distribution.name.lower().replace("_", "-")) in seen:
            continue
        seen.add(key)
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(entry)))
            if target.exists() and not (folder / entry).exists():
                (folder / entry).symlink_to(target)
        needs = [Requirement(text) for text in distribution.requires or ()]
        pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    assert "numpy" not in seen and "transformers" not in seen
    return folder


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def run_example(names: str, *folders: Path) -> tuple[set[str], set[str], list[Path]]:
    """What EXAMPLE prints."""
    command = [sys.executable, "-I", "-S", "-c", EXAMPLE, names, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stdout + run.stderr
    at_import, at_end, files = run.stdout.splitlines()
    return set(at_import.split()), set(at_end.split()), [Path(file) for file in files.split()]


def python_files(package: Path) -> set[str]:
    return {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}


def test_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        requirements = [
            line.removeprefix("Requires-Dist: ")
            for line in archive.read(f"{info}/METADATA").decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    assert {name.split("/")[0] for name in names} == {"tcopd_fast", "tcopd_kernels", info}
    assert {"tcopd_fast/py.typed", "tcopd_kernels/py.typed", f"{info}/entry_points.txt"} <= names
    assert "tcopd_fast/miniature/miniature.yaml" in names
    code = {name for name in names if name.endswith(".py")}
    assert code == python_files(ROOT / "tcopd_fast") | python_files(KERNELS)
    assert any(name.startswith("tcopd_fast/miniature/assets/") for name in names)
    always = [Requirement(text) for text in requirements if "extra ==" not in text]
    assert {requirement.name for requirement in always} == {"torch", "triton"}


def test_no_package_named_kernels():
    """Such a package would hide the one of that name which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_installed_kernels_need_torch_alone(wheel, only_torch, tmp_path):
    pip("install", "--no-deps", "--no-compile", "--target", tmp_path, wheel)
    at_import, at_end, (file,) = run_example("tcopd_kernels", tmp_path, only_torch)
    assert file.is_relative_to(tmp_path)
    assert at_import == {"tcopd_kernels"}
    assert not at_end & {"tcopd_fast", "triton"}


def test_copied_folder_works_inside_another_package_and_beside_the_installed_one(wheel, only_torch, tmp_path):
    """Two copies in one process also must not register torch operators under the same name."""
    project = tmp_path / "project"
    shutil.copytree(KERNELS, project / "tcopd_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "__init__.py").touch()
    pip("install", "--no-deps", "--no-compile", "--target", tmp_path / "installed", wheel)
    folders = tmp_path, tmp_path / "installed", only_torch
    at_import, _, files = run_example("project.tcopd_kernels,tcopd_kernels", *folders)
    assert at_import == {"project"}
    assert files[0].is_relative_to(project) and files[1].is_relative_to(tmp_path / "installed")


def test_modules_refer_to_each_other_relatively():
    """So that the folder works under any name; strings that name modules count as well."""
    absolute = {
        f"{path.relative_to(KERNELS).as_posix()}:{number}"
        for path in KERNELS.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.lstrip().startswith(("from tcopd_kernels", "import tcopd_kernels")) or '"tcopd_kernels.' in line
    }
    assert not absolute
