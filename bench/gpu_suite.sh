#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine and a half minutes: kernel tests, the demo, joint
# launches of several models (bench/multi_launch.py), memory of frozen teachers (bench/teacher_memory.py) and the kernel
# benchmark.
#     [OUT=FOLDER] [PYTHON=python3] bash bench/gpu_suite.sh [--dry-run]
# Writes OUT/summary.json, kernels_gpu.json, multi_launch_gpu.json, teacher_memory_gpu.json, demo.json and one log per
# step (OUT: bench/results, of a dry run runs/gpu_suite). Nothing is fetched: wheels in .whl/
# (bench/wheels.sh) are installed into /tmp/site.
# --dry-run does the same on the CPU at tiny sizes. GIT_SHA names the commit where the copy has no .git.
# Exit status 1 when a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY_RUN=
case ${1:-} in
  '') ;;
  --dry-run) DRY_RUN=1 ;;
  *) echo "usage: bash bench/gpu_suite.sh [--dry-run]" >&2; exit 2 ;;
esac
# Figures of a dry run have no place among the results.
OUT=${OUT:-$([ -n "$DRY_RUN" ] && echo runs/gpu_suite || echo bench/results)}
mkdir -p "$OUT" || exit 1
OUT=$(realpath "$OUT")
rm -f "$OUT"/{summary,kernels_gpu,multi_launch_gpu,teacher_memory_gpu,demo}.json
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ -d .whl ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .whl/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:/tmp/site"
fi
if [ -n "$DRY_RUN" ]; then
  export CUDA_VISIBLE_DEVICES=
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch sees no CUDA device; on a machine without one use --dry-run" >&2
  exit 1
fi

STEPS="$WORK/steps.tsv"
# step NAME SECONDS COMMAND…: runs it under a timeout, output to a log and the end of it here.
step() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" >>"$STEPS"
  tail -n 40 "$OUT/$name.log"
}

# Wheels of the modules that the demo needs and this Python lacks.
missing_wheels() {
  "$PYTHON" - <<'PY'
from importlib.util import find_spec

WHEELS = {
    "accelerate": "accelerate", "annotated_types": "annotated-types", "antlr4": "antlr4-python3-runtime",
    "cpuinfo": "py-cpuinfo", "datasets": "datasets", "deepspeed": "deepspeed", "dill": "dill", "einops": "einops",
    "hjson": "hjson", "jinja2": "jinja2", "latex2sympy2_extended": "latex2sympy2-extended",
    "math_verify": "math-verify", "matplotlib": "matplotlib", "msgpack": "msgpack", "multiprocess": "multiprocess",
    "ninja": "ninja", "omegaconf": "omegaconf", "psutil": "psutil", "pyarrow": "pyarrow", "pydantic": "pydantic",
    "pydantic_core": "pydantic-core", "rich": "rich", "sympy": "sympy", "tensorboard": "tensorboard",
    "transformers": "transformers", "typing_inspection": "typing-inspection", "yaml": "pyyaml",
}  # fmt: skip
print(" ".join(wheel for module, wheel in WHEELS.items() if find_spec(module) is None))
PY
}

"$PYTHON" - <<'PY'
import platform
from importlib import metadata

import torch

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (dry run)"
names = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "cut-cross-entropy", "trl", "verl")
found = [f"{name} {metadata.version(name)}" for name in names if any(metadata.distributions(name=name))]
print(f"{gpu}; Python {platform.python_version()}; CUDA {torch.version.cuda}; {', '.join(found)}")
PY

# Compiling takes most of the tests' time, and the card is large enough for several of them.
WORKERS=()
[ -z "$DRY_RUN" ] && "$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n 6)
step gpu_tests 140 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider "${WORKERS[@]}" --junitxml "$WORK/gpu_tests.xml"

if [ -n "$DRY_RUN" ]; then
  # A busy CPU may take minutes; what the dry run shows is that every step works.
  BENCH=(--shapes tiny --rounds 2) LAUNCH=(--tiny --rounds 2) DEMO=(--steps 1) DEMO_S=400 TOTAL_S=1200
  TEACHERS=(--tiny --teachers 0,1) TEACHERS_S=300
else
  BENCH=(--shapes full --rounds 5) LAUNCH=() DEMO=() DEMO_S=130 TOTAL_S=545
  TEACHERS=(--device cuda --jobs 6) TEACHERS_S=150
fi
MISSING=$(missing_wheels)
if [ -n "$MISSING" ]; then
  step demo 10 sh -c 'echo "error: missing wheels: $1 (collect them with bench/wheels.sh)"; exit 3' sh "$MISSING"
else
  step demo "$DEMO_S" "$PYTHON" -m tcopd_fast.cli demo --out "$WORK/demo" "${DEMO[@]}"
fi
step multi_launch 45 "$PYTHON" bench/multi_launch.py "${LAUNCH[@]}" --json "$OUT/multi_launch_gpu.json"
if [ -z "$MISSING" ]; then
  step teacher_memory "$TEACHERS_S" "$PYTHON" bench/teacher_memory.py "${TEACHERS[@]}" --no-steps \
    --out "$WORK/teachers" --json "$OUT/teacher_memory_gpu.json"
fi
# The benchmark takes what is left, and reports the cases that it did not come to.
LEFT=$((TOTAL_S - SECONDS))
step kernel_bench "$LEFT" \
  "$PYTHON" bench/kernel_bench.py "${BENCH[@]}" --budget-s $((LEFT - 30)) --json "$OUT/kernels_gpu.json"

STEPS="$STEPS" WORK="$WORK" OUT="$OUT" DRY_RUN="$DRY_RUN" "$PYTHON" - <<'PY'
"""demo.json, summary.json and the closing table."""
import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

work, out = Path(os.environ["WORK"]), Path(os.environ["OUT"])
dry_run = bool(os.environ["DRY_RUN"])
steps = {}
for line in Path(os.environ["STEPS"]).read_text().splitlines():
    name, status, seconds = line.split("\t")
    word = {"0": "passed", "124": "timed out", "137": "timed out"}.get(status, "failed")
    steps[name] = {"result": word, "exit_status": int(status), "seconds": int(seconds)}

counts = {}
if (work / "gpu_tests.xml").is_file():
    suite = ElementTree.parse(work / "gpu_tests.xml").getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    steps["gpu_tests"] |= counts
ran = counts.get("tests", 0) - counts.get("skipped", 0)
if steps["gpu_tests"]["result"] == "passed" and (counts.get("tests", 0) == 0 if dry_run else ran == 0):
    steps["gpu_tests"]["result"] = "failed"
    steps["gpu_tests"]["reason"] = "no test ran"

runs = {}
for folder in sorted(path.parent for path in (work / "demo").glob("*/eval.jsonl")):
    runs[folder.name] = {
        "environment": json.loads((folder / "environment.json").read_text()),
        "eval": [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()],
    }
    if (folder / "metrics.jsonl").is_file():
        runs[folder.name]["metrics"] = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
missing = {"g_opd", "tc_opd"} - set(runs)
if steps["demo"]["result"] == "passed" and missing:
    steps["demo"] |= {"result": "failed", "reason": f"no eval numbers of {', '.join(sorted(missing))}"}
if runs:
    (out / "demo.json").write_text(json.dumps({"dry_run": dry_run, "runs": runs}, indent=1) + "\n")

sha = os.environ.get("GIT_SHA")
about = {"dry_run": dry_run, "git_sha": sha}
try:
    from tcopd_fast.rundir import environment
except ImportError as error:
    about["environment_error"] = str(error)
else:
    about |= environment()
    about["git_sha"] = about["git_sha"] or sha
about["command"] = "bash bench/gpu_suite.sh" + " --dry-run" * dry_run
(out / "summary.json").write_text(json.dumps({**about, "steps": steps}, indent=1) + "\n")

print(f"\n{'step':14} {'result':10} {'seconds':>7}")
for name, found in steps.items():
    detail = ", ".join(f"{found[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in found)
    print(f"{name:14} {found['result']:10} {found['seconds']:7}  {found.get('reason', '') or detail}")
sys.exit(any(found["result"] != "passed" for found in steps.values()))
PY
