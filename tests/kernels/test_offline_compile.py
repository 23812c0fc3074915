"""The hot Triton kernels compile for Hopper without a GPU, use its tensor cores and TMA, and do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "bench" / "offline_compile.py"
DEFAULT_TILE = "/bf16/plain/tma/128x128x64/"


def run_python(*args):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=300)


def test_sm90_kernels_use_wgmma_and_tma_without_spills(tmp_path):
    out = tmp_path / "compile.json"
    result = run_python(str(SCRIPT), "--archs", "90", "--only", DEFAULT_TILE, "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(out.read_text())
    assert report["device"] == "offline compile, no GPU"
    assert [row["variant"]["kernel"] for row in report["rows"]] == ["forward", "dlogits"]
    for row in report["rows"]:
        assert row["hot"] and row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["wgmma"].startswith("m64n") and row["tma"]
        assert 0 < row["shared_bytes"] <= 227 * 1024


def test_a_variant_over_the_limit_fails_the_run():
    program = "import sys, offline_compile as o; o.SHARED_LIMIT_BYTES[90] = 1024; sys.exit(o.main())"
    result = run_python("-c", program, "--archs", "90", "--only", "/forward" + DEFAULT_TILE)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAULT: shared memory" in result.stdout


def test_an_unknown_variant_is_an_error():
    result = run_python(str(SCRIPT), "--archs", "90", "--only", "no-such-variant")
    assert result.returncode == 2 and "no-such-variant" in result.stderr
