"""The kernels for several models compile for Hopper without a GPU, use its tensor cores and TMA, and do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = """
import json, sys, offline_compile, offline_multi
specs = {spec.name: spec for spec in offline_multi.specs([90])}
found = {name: offline_compile.compile_and_inspect(specs[name]) | {"hot": specs[name].hot} for name in sys.argv[1:]}
print(json.dumps(found))
"""
STATISTICS = "sm_90/multi/bf16/plain/tma/128x128x64/w8s4/align16"
FINALIZE = "sm_90/finalize/off_policy/16x128"


def test_hot_variants_do_not_spill():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCH), *filter(None, sys.path)])
    command = [sys.executable, "-c", PROGRAM, STATISTICS, FINALIZE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for row in found.values():
        assert row["hot"] and row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 227 * 1024
    assert found[STATISTICS]["wgmma"].startswith("m64n") and found[STATISTICS]["tma"]
