"""bench/kernel_profile_ncu.py, with a script for ncu that takes the same options and prints its documented format."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")
sys.path.insert(0, str(ROOT / "bench"))

import kernel_profile_ncu as ncu  # noqa: E402
import kernel_profile_report as report  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny run is for machines without a GPU")

NCU = '''==PROF== Connected to process 4711 (/usr/bin/python3.12)
a line of the program, "quoted"
==PROF== Profiling "forward_kernel" - 0: 0%....50%....100% - 12 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
{row0},"GPU Speed Of Light Throughput","Duration","ns","14,000,000","","",""
{row0},"GPU Speed Of Light Throughput","DRAM Throughput","%","12.5","","",""
{row0},"SpeedOfLight","","","","SOLBottleneck","OPT","This kernel is, in part, bound by ""waiting"""
{row0},"Launch Statistics","Registers Per Thread","register/thread","153","","",""
{row0},"Occupancy","Achieved Occupancy","%","n/a","","",""
{row1},"GPU Speed Of Light Throughput","Duration","ns","16,000,000","","",""
{row2},"Occupancy","Achieved Occupancy","%","12.40","","",""
==PROF== Disconnected from process 4711
'''.format(
    row0='"0","4711","python3.12","127.0.0.1","forward_kernel","1","7","(256, 1, 1)","(768, 1, 1)","0","9.0"',
    row1='"1","4711","python3.12","127.0.0.1","forward_kernel","1","7","(256, 1, 1)","(768, 1, 1)","0","9.0"',
    row2='"2","4711","python3.12","127.0.0.1","dlogits_kernel","1","7","(128, 1, 1)","(1187, 1, 1)","0","9.0"',
)


def test_ncus_table():
    forward, dlogits = ncu.parse(NCU)
    assert forward == {
        "kernel": "forward_kernel", "block": "(256, 1, 1)", "grid": "(768, 1, 1)", "launches": 2,
        "Duration [ns]": 15e6, "DRAM Throughput [%]": 12.5, "Registers Per Thread [register/thread]": 153.0,
    }  # fmt: skip
    assert dlogits["Achieved Occupancy [%]"] == 12.4
    table = report.ncu_table([forward, dlogits])
    assert table.splitlines()[2].startswith("| forward_kernel | (768, 1, 1) | 2 | 15000000 | 12.5 | 153 | –")


FAKE = """#!{python}
import subprocess, sys
words = sys.argv[1:]
assert "--csv" in words and "regex:^(forward_kernel|dlogits_kernel|keep_kernel)$" in words
assert words[words.index("--clock-control") + 1] == "none"
{body}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def make(body):
        program = tmp_path / "ncu"
        program.write_text(FAKE.format(python=sys.executable, body=body))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


def test_ncu_runs_the_hot_kernels(fake, tmp_path):
    """Its program is run as ncu would, with the torch backend."""
    (tmp_path / "table").write_text(NCU)
    fake(
        f"done = subprocess.run(words[words.index({sys.executable!r}):])\n"
        f"assert done.returncode == 0\nprint(open({str(tmp_path / 'table')!r}).read())"
    )
    assert len(ncu.run_ncu("tiny", 200.0, tiny=True)["kernels"]) == 2


def test_metrics_that_ncu_does_not_know_are_left_out(fake, tmp_path):
    (tmp_path / "table").write_text(NCU)
    fake(
        'if "--metrics" in words:\n    print("==ERROR== Failed to find metric sm__pipe"); sys.exit(1)\n'
        f"print(open({str(tmp_path / 'table')!r}).read())"
    )
    assert len(ncu.run_ncu("tiny", 100.0)["kernels"]) == 2


@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        (
            'print("==PROF== Connected"); print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"); '
            "sys.exit(1)",
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission",
        ),
        ('print("==WARNING== No kernels were profiled.")', "==WARNING== No kernels were profiled."),
        ("sys.exit(3)", "status 3, no rows"),
        ("import time; time.sleep(60)", "ncu did not end within 0 s"),
    ],
)
def test_what_ncu_says_when_it_fails(fake, body, trouble):
    fake(body)
    assert ncu.run_ncu("tiny", 0.8 if "sleep" in body else 100.0) == {"trouble": trouble}


def test_without_ncu(monkeypatch):
    monkeypatch.setattr(ncu, "ncu_program", lambda: None)
    assert ncu.run_ncu("tiny", 10.0) == {"trouble": "ncu is not on PATH"}
