#!/usr/bin/env bash
# What needs a GPU, in three parts of less than ten minutes each:
#     [OUT=FOLDER] [PYTHON=python3] bash bench/gpu_suite.sh [--dry-run] [kernels|checks|models]
# kernels (default): tests of every kernel, the demo, and the kernel benchmark against other packages.
# checks: ceilings and every kernel against its floor, then compute-sanitizer on a small case of every kernel.
# models: memory and time of teachers (bench/teacher_memory.py), joint launches of several models
#     (bench/multi_launch.py) and whole steps of mid-size models (bench/midsize.py).
# Writes the JSON of each step, gpu_PART.json with the outcome of all, and gpu_PART.log to OUT (bench/results, of a dry
# run runs/gpu_suite). Nothing is fetched: wheels in .whl/ (bench/wheels.sh) are installed into /tmp/site-packages.
# --dry-run does the same on the CPU at tiny sizes, Triton kernels in the interpreter. GIT_SHA names the commit where
# the copy has no .git. Exit status 1 when a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY_RUN= PART=kernels
for word in "$@"; do
  case $word in
    --dry-run) DRY_RUN=1 ;;
    kernels | checks | models) PART=$word ;;
    *) echo "usage: bash bench/gpu_suite.sh [--dry-run] [kernels|checks|models]" >&2; exit 2 ;;
  esac
done
# Figures of a dry run have no place among the results.
OUT=${OUT:-$([ -n "$DRY_RUN" ] && echo runs/gpu_suite || echo bench/results)}
mkdir -p "$OUT" || exit 1
OUT=$(realpath "$OUT")
LOG="$OUT/gpu_$PART.log"
# Relative, because commands stand in the results.
WORK=runs/gpu_work
rm -rf "$WORK"
mkdir -p "$WORK" || exit 1
trap 'rm -rf "$WORK"' EXIT
case $PART in
  kernels) RESULTS=(kernels_gpu demo_gpu gpu_kernels) ;;
  checks) RESULTS=(kernel_profile_gpu sanitize_gpu gpu_checks) ;;
  models) RESULTS=(teacher_memory_gpu multi_launch_gpu midsize_gpu gpu_models) ;;
esac
rm -f "$LOG"
for name in "${RESULTS[@]}"; do rm -f "$OUT/$name.json"; done

export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# QuACK tells installed packages from its own code by this name.
SITE=/tmp/site-packages
if [ -d .whl ]; then
  # A wheel in parts is joined once all of them are there.
  mkdir -p /tmp/wheels "$WORK/joined"
  find .whl -name '*.whl.part*' -exec cp -t /tmp/wheels {} +
  for first in /tmp/wheels/*.whl.part00; do
    [ -e "$first" ] || continue
    name=$(basename "$first" .part00)
    cat /tmp/wheels/"$name".part* >"$WORK/joined/$name"
    "$PYTHON" -m zipfile -t "$WORK/joined/$name" >/dev/null 2>&1 || rm "$WORK/joined/$name"
  done
  find .whl "$WORK/joined" -type f -name '*.whl' -print0 |
    xargs -0 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" || exit 1
  # The second is what CUTLASS's .pth file would add; Python reads those in folders of its own only.
  export PYTHONPATH="$PYTHONPATH:$SITE:$SITE/nvidia_cutlass_dsl/dsl_packages"
fi
INTERPRET=()
if [ -n "$DRY_RUN" ]; then
  export CUDA_VISIBLE_DEVICES=
  INTERPRET=(env TRITON_INTERPRET=1)
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch sees no CUDA device; on a machine without one use --dry-run" >&2
  exit 1
fi

STEPS="$WORK/steps.tsv"
# step NAME SECONDS COMMAND…: runs it under a timeout, output to the log and the end of it here, results to OUT.
step() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)" | tee -a "$LOG"
  timeout -k 10 "$limit" "$@" >"$WORK/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" >>"$STEPS"
  cat "$WORK/$name.log" >>"$LOG"
  find "$WORK" -maxdepth 1 -name '*_gpu.json' -exec mv -t "$OUT" {} +
  tail -n 40 "$WORK/$name.log"
}

# limit SECONDS: on a GPU as it is; a busy CPU may take minutes, and what a dry run shows is that every step works.
limit() { [ -n "$DRY_RUN" ] && echo 600 || echo "$1"; }

# The trainer's modules that this Python lacks, by the names of their wheels.
missing_wheels() {
  "$PYTHON" - <<'PY'
from importlib.util import find_spec

WHEELS = {
    "accelerate": "accelerate", "annotated_types": "annotated-types", "antlr4": "antlr4-python3-runtime",
    "cpuinfo": "py-cpuinfo", "datasets": "datasets", "deepspeed": "deepspeed", "dill": "dill", "einops": "einops",
    "hjson": "hjson", "jinja2": "jinja2", "latex2sympy2_extended": "latex2sympy2-extended",
    "math_verify": "math-verify", "matplotlib": "matplotlib", "msgpack": "msgpack", "multiprocess": "multiprocess",
    "ninja": "ninja", "omegaconf": "omegaconf", "peft": "peft", "psutil": "psutil", "pyarrow": "pyarrow",
    "pydantic": "pydantic", "pydantic_core": "pydantic-core", "rich": "rich", "sympy": "sympy",
    "tensorboard": "tensorboard", "transformers": "transformers", "typing_inspection": "typing-inspection",
    "yaml": "pyyaml",
}  # fmt: skip
print(" ".join(wheel for module, wheel in WHEELS.items() if find_spec(module) is None))
PY
}
MISSING=$(missing_wheels)
# trainer_step NAME SECONDS COMMAND…: a step that needs them, if only to say what it ran on.
trainer_step() {
  if [ -n "$MISSING" ]; then
    step "$1" 10 sh -c 'echo "error: missing wheels: $1 (collect them with bench/wheels.sh)"; exit 3' sh "$MISSING"
  else
    step "$@"
  fi
}

kernels() {
  local workers=() total=470 left
  # Compiling takes most of the tests' time, and the card is large enough for several of them.
  [ -z "$DRY_RUN" ] && "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  step gpu_tests "$(limit 180)" "${INTERPRET[@]}" "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider \
    --continue-on-collection-errors "${workers[@]}" --junitxml "$WORK/gpu_tests.xml"
  trainer_step demo "$(limit 130)" "$PYTHON" -m tcopd_fast.cli demo --out "$WORK/demo" ${DRY_RUN:+--steps 1}
  # The benchmark takes what is left, and reports the cases that it did not come to.
  left=$([ -n "$DRY_RUN" ] && echo 400 || echo $((total - SECONDS)))
  trainer_step kernel_bench "$left" "${INTERPRET[@]}" "$PYTHON" bench/kernel_bench.py --budget-s $((left - 30)) \
    $([ -n "$DRY_RUN" ] && echo --shapes tiny --rounds 2 || echo --shapes full --rounds 5) --json "$WORK/kernels_gpu.json"
}

checks() {
  trainer_step kernel_profile "$(limit 180)" "${INTERPRET[@]}" "$PYTHON" bench/kernel_profile.py \
    $([ -n "$DRY_RUN" ] && echo --tiny || echo --budget-s 150 --ncu) --json "$WORK/kernel_profile_gpu.json"
  trainer_step sanitize "$(limit 330)" "$PYTHON" bench/sanitize.py \
    $([ -n "$DRY_RUN" ] && echo --dry-run || echo --budget-s 300) --json "$WORK/sanitize_gpu.json"
}

models() {
  trainer_step midsize "$(limit 400)" "$PYTHON" bench/midsize.py --out "$WORK/midsize" \
    $([ -n "$DRY_RUN" ] && echo --tiny || echo --budget-s 380) --json "$WORK/midsize_gpu.json"
  trainer_step teacher_memory "$(limit 100)" "$PYTHON" bench/teacher_memory.py --no-steps --out "$WORK/teachers" \
    $([ -n "$DRY_RUN" ] && echo --tiny --teachers 0,1 || echo --device cuda --teachers 0,1,4 --jobs 6) \
    --json "$WORK/teacher_memory_gpu.json"
  trainer_step multi_launch "$(limit 45)" "${INTERPRET[@]}" "$PYTHON" bench/multi_launch.py \
    ${DRY_RUN:+--tiny --rounds 2} --json "$WORK/multi_launch_gpu.json"
}

"$PYTHON" bench/gpu_summary.py about | tee -a "$LOG"
"$PART"
"$PYTHON" bench/gpu_summary.py outcome --part "$PART" ${DRY_RUN:+--dry-run} --steps "$STEPS" --work "$WORK" --out "$OUT"
