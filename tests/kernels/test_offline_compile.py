"""The hot Triton kernels compile for Hopper without a GPU, use its tensor cores and TMA, and do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
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
    kernels = [row["variant"]["kernel"] for row in report["rows"]]
    assert {"forward_kernel", "dlogits_kernel"} <= set(kernels)
    for row in report["rows"]:
        assert row["hot"] and row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["wgmma"].startswith("m64n") and row["tma"] and row["wgmma_in_flight"] == 1
        assert 0 < row["shared_bytes"] <= 227 * 1024


def test_a_variant_over_the_limit_fails_the_run():
    program = "import sys, offline_compile as o; o.SHARED_LIMIT_BYTES[90] = 1024; sys.exit(o.main())"
    result = run_python("-c", program, "--archs", "90", "--only", "/forward" + DEFAULT_TILE)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAULT: shared memory" in result.stdout


def test_spills_of_a_hot_variant_fail_the_run_and_others_do_not():
    program = textwrap.dedent(
        """
        import sys
        from dataclasses import replace
        import offline_compile as o
        inspect = o.inspect_ptx
        o.inspect_ptx = lambda *args: inspect(*args) | {"spill_bytes": 8}
        spec = next(iter(s for s in o.all_specs((90,)).values() if "/forward" + sys.argv[1] in s.name))
        rows = [o.table_row(s, o.compile_and_inspect(s)) for s in (spec, replace(spec, hot=False))]
        print([row["faults"] for row in rows])
        """
    )
    result = run_python("-c", program, DEFAULT_TILE)
    assert result.stdout.splitlines()[-1] == "[['spills'], []]", result.stdout + result.stderr


def test_amd_kernels_use_matrix_instructions_without_spills(tmp_path):
    out = tmp_path / "compile.json"
    arguments = ("--archs", "gfx90a", "gfx942", "--only", "/bf16/plain/ptr/128x128x64/", "--jobs", "2")
    result = run_python(str(SCRIPT), *arguments, "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["arch"] for row in rows} == {"gfx90a", "gfx942"}
    for row in rows:
        assert row["mfma"] and row["spill_bytes"] == 0 and 0 < row["registers"] <= 256


def test_every_family_lists_unique_variants_for_every_architecture():
    program = textwrap.dedent(
        """
        import offline_compile as o
        specs = o.all_specs(tuple(o.SHARED_LIMIT_BYTES))
        for spec in specs.values():
            assert set(spec.signature) == set(spec.kernel.arg_names), spec.name
            constants = {name for name, kind in spec.signature.items() if kind == "constexpr"}
            assert constants == set(spec.constants), spec.name
        print({spec.arch for spec in specs.values()} == set(o.SHARED_LIMIT_BYTES), len(specs) > 100)
        """
    )
    result = run_python("-c", program)
    assert result.stdout.split() == ["True", "True"], result.stdout + result.stderr


def test_an_unknown_variant_is_an_error():
    result = run_python(str(SCRIPT), "--archs", "90", "--only", "no-such-variant")
    assert result.returncode == 2 and "no-such-variant" in result.stderr
