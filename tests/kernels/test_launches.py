"""The kernels' calls through Triton's compiler and launcher, on a driver that only checks (bench/launches.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="needs a C compiler and Python.h",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "bench")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def test_every_kernel_compiles_for_real_calls_and_is_launched():
    done = run("bench/launches.py", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout


# More programs along y than a grid can have.
REFUSED = """
import torch, stand_in_gpu
stand_in_gpu.install(90)
from tcopd_kernels import _triton_forward

_triton_forward.finish_kernel[(1, 70000)](*torch.empty(7, 600), 600, HAS_ENTROPY=False, BLOCK=128)
"""


def test_what_a_real_driver_would_refuse_is_refused():
    done = run("-c", REFUSED)
    assert done.returncode != 0 and "invalid argument" in done.stderr, done.stderr
