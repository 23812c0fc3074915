"""bench/sanitize.py: its cases launch every kernel, its parsers read the tools, its parent finds what is wrong.

compute-sanitizer itself is played by a script that takes the same options; the cases run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "bench"))

import sanitize  # noqa: E402
import sanitize_control  # noqa: E402
import sanitize_processes as processes  # noqa: E402
from kernel_profile_launches import entry_kernels, function_name, jit_functions  # noqa: E402
from sanitize_cases import CASES, excess, few_splits  # noqa: E402
from sanitize_report import Findings, parse, reports_of  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
PACKAGE = ROOT / "kernels" / "tcopd_kernels"

MEMCHECK = """========= COMPUTE-SANITIZER
logprob/plain  0.5 s  right
========= Invalid __global__ write of size 4 bytes
=========     at forward_kernel+0x160 in _triton_forward.py:57
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f6510c00200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f6510c00000 of size 512 bytes
=========
========= Invalid __global__ write of size 4 bytes
=========     at mixture_dlogits_kernel+0x1a0 in _triton_mixture.py:260
=========     by thread (4,0,0) in block (0,0,0)
=========
========= Invalid __global__ write of size 4 bytes
=========     at control_kernel+0x90 in sanitize_control.py:30
=========     by thread (127,0,0) in block (0,0,0)
=========
========= Invalid __shared__ read of size 4 bytes
=========     at some_kernel_of_torch+0x90
=========
========= Error: process didn't terminate successfully
========= Target application returned an error
========= ERROR SUMMARY: 5 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at
=========     keep_kernel+0xb0 in _triton_loss.py:28
=========     and Read access at
=========     keep_kernel+0xc0 in _triton_loss.py:30
=========     [1024 hazards]
=========
========= Warning: Race reported between Write access at dlogits_kernel+0xf0 in _triton_loss.py:40
=========     and Read access at dlogits_kernel+0x280 in _triton_loss.py:46 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def names():
    return processes.checked_names()


def test_memcheck_reports_go_to_their_kernels():
    found = parse(MEMCHECK, "memcheck", names())
    assert (found.errors, found.warnings) == (5, 0)
    counts = {"forward_kernel": 1, "mixture_dlogits_kernel": 1, "control_kernel": 1, "other": 1}
    assert found.by_kernel == counts
    assert found.shown[0].startswith("Invalid __global__ write of size 4 bytes\nat forward_kernel+0x160")


def test_racecheck_reports_go_to_their_kernels():
    found = parse(RACECHECK, "racecheck", names())
    assert (found.errors, found.warnings, found.by_kernel) == (1, 1, {"keep_kernel": 1, "dlogits_kernel": 1})


@pytest.mark.parametrize(
    ("text", "tool", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "memcheck", 0),
        ("========= ERROR SUMMARY: 1 error\n", "memcheck", 1),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "racecheck", 0),
        ("========= COMPUTE-SANITIZER\n", "memcheck", None),
        ("========= ERROR SUMMARY: 0 errors\n", "racecheck", None),
    ],
)
def test_without_a_summary_nothing_is_known(text, tool, errors):
    assert parse(text, tool, names()) == Findings(errors, None if errors is None else 0)


def test_the_programs_own_output_is_no_report():
    assert reports_of("loss/plain 1 s right\n========= COMPUTE-SANITIZER\nforward_kernel\n") == []


def test_entry_kernels_are_what_the_code_launches():
    """By the source: names that are subscripted with a grid and called. Fails where a kernel is launched otherwise."""
    launched = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            grid = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            if grid and isinstance(node.func.value, ast.Name) and isinstance(node.func.slice, ast.Tuple):
                launched.add(node.func.value.id)
    assert {function_name(kernel) for kernel in entry_kernels()} == launched
    assert set(entry_kernels()) < set(jit_functions())


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench/sanitize.py", *map(str, words)])
    return sanitize.main()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sanitize") / "out.json"
    command = [sys.executable, str(ROOT / "bench" / "sanitize.py"), "--dry-run", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_the_cases_launch_every_kernel_and_are_right(dry_run):
    assert [row["case"] for row in dry_run["cases"]] == list(CASES)
    assert all(row["wrong"] == {} for row in dry_run["cases"])
    launched = {kernel for row in dry_run["cases"] for kernel in row["kernels"]}
    assert launched == set(entry_kernels()) and dry_run["not_launched"] == []
    assert dry_run["command"].startswith("python bench/sanitize.py --dry-run") and dry_run["faults"] == []


def test_the_cases_turn_every_switch_of_every_kernel_both_ways(dry_run):
    seen: dict[str, set] = {}
    for row in dry_run["cases"]:
        for name, values in row["flags"].items():
            seen.setdefault(name, set()).update(values)
    # What a GPU alone decides, or the choice among tiles.
    elsewhere = ("USE_TMA", "FLATTEN", "WARP_SPECIALIZE")
    one_way = {name for name, values in seen.items() if len(values) < 2 and not name.endswith(elsewhere)}
    assert one_way == set() and len(seen) > 20


FAKE = """#!{python}
import subprocess, sys
words = sys.argv[1:]
if words == ["--version"]:
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.0.0 (build 1)")
    sys.exit()
tool = words[words.index("--tool") + 1]
app = words[words.index({python!r}):]
assert ("--padding" in words) == (tool == "memcheck") and "kns=keep_kernel" in words
print("========= COMPUTE-SANITIZER", flush=True)
status = subprocess.run(app).returncode
cases = app[app.index("--case") + 1]
{body}
"""
BODY = """
reports = ["control_kernel"] + ["keep_kernel"] * ("loss" in cases)
for kernel in reports:
    print("========= Invalid __global__ write of size 4 bytes\\n=========     at " + kernel + "+0x90\\n=========")
n = len(reports)
print(f"========= ERROR SUMMARY: {n} errors")
sys.exit(86)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compute-sanitizer that reports the control, and keep_kernel wherever a case of the loss runs."""

    def make(body=BODY):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "compute-sanitizer"
        program.write_text(FAKE.format(python=sys.executable, body=body))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def check(monkeypatch, tmp_path, cases, budget_s=400.0):
    monkeypatch.setattr(sanitize, "CASES", cases)
    out = tmp_path / "out.json"
    args = argparse.Namespace(tools=["memcheck"], json=out, budget_s=budget_s, jobs=1, all_tiles=False, dry_run=False)
    return sanitize.check_all(args), json.loads(out.read_text())


def test_reports_count_for_the_cases_that_launch_the_kernel(fake, monkeypatch, tmp_path):
    fake()
    status, report = check(monkeypatch, tmp_path, ["loss/plain", "several/plain"])
    found = report["tools"]["memcheck"]
    assert status == 1 and report["compute_sanitizer"] == "2025.3.0.0"
    assert [(row["case"], row["errors"]) for row in found["rows"]] == [("loss/plain", 1), ("several/plain", 0)]
    assert found["control_reported"] and report["faults"][-1] == "memcheck: loss/plain: 1 errors in keep_kernel"
    assert " --kernel-name kns=… python" in found["command"] and str(ROOT) not in found["command"]


@pytest.mark.parametrize("reported", [True, False])
def test_a_tool_that_misses_the_control_has_checked_nothing(reported):
    case = {"case": "step/plain", "wrong": {}, "errors": 0}
    report = {
        "cases": [case],
        "not_launched": [],
        "tools": {"racecheck": {"rows": [case], "control_reported": reported}},
    }
    missed = "racecheck did not report the fault that was made on purpose: it may have checked nothing"
    assert sanitize.faults_of(report) == [missed] * (not reported)


def test_a_tool_that_hangs_is_ended_with_its_program(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize, "LEAST_S", 1)
    fake(body="import time\ntime.sleep(600)")
    runner = processes.Runner("compute-sanitizer", tmp_path, 3.0, False)
    plain = [{"case": "several/plain", "kernels": {"_triton_multi.multi_kernel": 1}}]
    found = sanitize.under_tool(runner, "memcheck", plain, 0.9)
    assert found["end"] == "out of time" and found["rows"][0]["errors"] is None
    assert sanitize.tool_verdict(found["rows"][0])


def test_no_time_left(fake, monkeypatch, tmp_path):
    fake()
    status, report = check(monkeypatch, tmp_path, ["several/plain"], budget_s=0.0)
    assert status == 1 and report["tools"]["memcheck"] == {"skipped": "no case runs without the tool"}
    assert report["cases"] == [{"case": "several/plain", "failed": "time budget spent"}]


def test_a_case_that_fails_does_not_hide_the_others(monkeypatch, tmp_path, capsys):
    def run_case(name, dtype, device):
        if name == "loss/plain":
            raise RuntimeError("an illegal memory access\nmore")
        return {}, {"loss": 0.5} if name == "loss/options" else {}

    monkeypatch.setattr(sanitize, "run_case", run_case)
    out = tmp_path / "rows.json"
    assert sanitize.run_cases(["loss/plain", "loss/options", "step/plain"], out, None, True) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [sanitize.verdict(row) for row in rows] == [
        "failed: RuntimeError: an illegal memory access", "wrong: {'loss': 0.5}", "right",
    ]  # fmt: skip
    assert "step/plain" in capsys.readouterr().out


def test_on_a_gpu_every_case_is_waited_for_and_the_control_comes_last(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(sanitize, "run_case", lambda name, dtype, device: ({}, seen.append((name, dtype, device.type))))
    monkeypatch.setattr(sanitize, "run_control", lambda tool, device: seen.append(tool))
    assert sanitize.run_cases(["loss/plain"], None, "racecheck", False) == 0
    assert seen == [("loss/plain", torch.bfloat16, "cuda"), "wait", "racecheck", "wait"]


def test_a_control_that_costs_the_context_is_no_failure(monkeypatch):
    def fault(tool, device):
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(sanitize, "run_case", lambda name, dtype, device: ({}, {"loss": 1.0}))
    monkeypatch.setattr(sanitize, "run_control", fault)
    assert sanitize.run_cases(["loss/plain"], None, "memcheck", False) == 0


@pytest.mark.parametrize(("all_tiles", "launched"), [(False, []), (True, ["a", "b"])])
def test_default_tiles_or_all_of_them(all_tiles, launched):
    from tcopd_kernels import _triton_tiles
    from tcopd_kernels._triton_tiles import Tile

    tiles = {Tile(128, 128, 64, 8, 4): "a", Tile(128, 256, 64, 8, 3): "b"}
    seen: list[str] = []
    with sanitize.tiles_of(all_tiles):
        chosen = _triton_tiles.choose_tile(("key",), list(tiles), lambda tile: seen.append(tiles[tile]))
    assert seen == launched and tiles[chosen] == "a"
    _triton_tiles._chosen.pop(("key",), None)


def test_programs_walk_several_tiles():
    splits, tiles = few_splits(2, 16, 132)
    assert tiles > 1 and splits * tiles >= 16


def test_wrong_and_missing_numbers_are_seen():
    exact = {"loss": torch.tensor(2.0).double(), "grad_hidden": torch.ones(3).double()}
    found = {"loss": torch.tensor(float("nan")), "grad_hidden": torch.ones(3) * 1.1}
    assert set(excess(found, exact, None)) == {"loss", "grad_hidden"}
    assert set(excess(found, exact, 0.2)) == {"loss"}


@pytest.mark.parametrize("fault", ["", *sanitize_control.FAULTS.values()])
def test_the_control_compiles_for_a_gpu(fault):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {"FAULT": fault, "BLOCK": sanitize_control.BLOCK}
    signature = {"out": "*i32", "FAULT": "constexpr", "BLOCK": "constexpr"}
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    source = ASTSource(fn=sanitize_control.control_kernel, signature=signature, constexprs=constants, attrs={})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.name == processes.CONTROL  # the name that the filter lets through
    assert ("st.shared.b32 [at]" in compiled.asm["ptx"]) == (fault == "shared")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compute-sanitizer is not on PATH"),
        (["--tools", "memchek"], "unknown 'memchek'; known are memcheck, racecheck"),
        (["--case", "loss"], "unknown 'loss'"),
        (["--case", "loss/plain"], "no CUDA device; set TRITON_INTERPRET=1"),
    ],
)
def test_bad_input_gets_one_message(monkeypatch, capsys, words, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sanitize, "sanitizer_program", lambda: None)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *words)
    assert message in capsys.readouterr().err


def test_a_program_without_a_gpu_is_told_so(monkeypatch, capsys, fake):
    fake()
    with pytest.raises(SystemExit):
        run_main(monkeypatch)
    assert "torch sees no CUDA device" in capsys.readouterr().err
