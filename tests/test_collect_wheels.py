"""bench/wheels.sh, with a pip that leaves files of the wheels' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from running import ROOT

PYTHON = """#!{python}
import pathlib, re, sys
words = sys.argv[1:]
assert words[:2] == ["-m", "pip"], words
command = "wheel" if "wheel" in words else "download"
folder = pathlib.Path(words[words.index("-w" if command == "wheel" else "-d") + 1])
packages = [word for word in words if re.fullmatch(r"[\\w.-]+==[\\w.]+", word)]
assert packages and folder.is_dir()
for name, _, version in (package.partition("==") for package in packages):
    size = {large} if name == "nvidia-cutlass-dsl-libs-core" else 1024
    with open(folder / f"{{name.replace('-', '_')}}-{{version}}-{tag}.whl", "wb") as wheel:
        wheel.truncate(size)
"""


def collect(folder, tag: str = "py3-none-any", large: int = 1024, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script in a checkout of its own."""
    (folder / "bench").mkdir()
    shutil.copy(ROOT / "bench" / "wheels.sh", folder / "bench")
    python = folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, tag=tag, large=large))
    python.chmod(0o755)
    return subprocess.run(
        ["bash", "bench/wheels.sh"],
        cwd=folder, env=os.environ | {"PYTHON": str(python)} | variables, capture_output=True, text=True,
    )  # fmt: skip


def test_the_default_folder(tmp_path):
    (tmp_path / ".whl").mkdir()
    (tmp_path / ".whl" / "old-1.0-py3-none-any.whl").write_text("from an earlier time")
    done = collect(tmp_path)
    assert done.returncode == 0, done.stderr
    wheels = list((tmp_path / ".whl").iterdir())
    assert done.stdout == f"{len(wheels)} wheels, {len(wheels)} KiB in .whl\n"
    assert any(wheel.name.startswith("deepspeed-") for wheel in wheels) and all("old" not in w.name for w in wheels)


def test_a_large_wheel_is_left_in_parts(tmp_path):
    done = collect(tmp_path, large=100 << 20, CUTLASS="1")
    assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / ".whl").glob("nvidia_cutlass_dsl_libs_core-*"))
    assert [part.name.rpartition(".")[2] for part in parts] == ["part00", "part01"]
    assert sum(part.stat().st_size for part in parts) == 100 << 20 and max(p.stat().st_size for p in parts) < 60 << 20


def test_compiled_deepspeed_is_refused(tmp_path):
    done = collect(tmp_path, tag="cp312-cp312-linux_x86_64")
    assert done.returncode == 1 and "holds compiled code" in done.stderr
