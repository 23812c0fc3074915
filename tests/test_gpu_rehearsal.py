"""The GPU tests at small sizes without a GPU, so that none of their lines runs for the first time on the day there is
one. tests/gpu/gpu_mode.py says what a rehearsal is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.mark.slow
def test_every_gpu_test_passes_its_rehearsal(tmp_path):
    folder, report = Path(__file__).with_name("gpu"), tmp_path / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), "--junitxml", str(report)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None and int(suite.attrib["tests"]) > 200
    assert suite.attrib["skipped"] == "0", result.stdout[-6000:]
