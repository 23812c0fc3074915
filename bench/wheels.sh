#!/usr/bin/env bash
# Collects what a bare CUDA machine with torch and transformers but no network still lacks for bench/gpu_suite.sh:
#     [PYTHON_VERSION=3.12] bash bench/wheels.sh [FOLDER]          (default .whl; Linux x86-64)
# Of verl only the kernels are used, which need torch alone.
# CUTLASS=1 also collects what QuACK and Liger's sm_90 path need, a further 100 MB. Wheels of more than PART_MIB are cut
# into NAME.part00, NAME.part01, …, for machines that take little at a time: gpu_suite.sh joins the parts that it finds
# in .whl/ and in /tmp/wheels/, where an earlier transfer may have left some.
# deepspeed is published as source only; with DS_BUILD_OPS=0 its wheel is pure Python and compiles nothing here.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
FOLDER=${1:-.whl}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
LIMIT_MIB=60
PART_MIB=52

PACKAGES=(
  deepspeed==0.19.8 hjson==3.1.0
  pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0
  omegaconf==2.4.0
  math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2
  datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
  rich==15.0.0
  liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 verl==0.9.1
)

[ -z "${CUTLASS:-}" ] || PACKAGES+=(
  quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1
  nvidia-cutlass-dsl-libs-cu13==4.8.1 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
)

mkdir -p "$FOLDER"
rm -f "$FOLDER"/*.whl "$FOLDER"/*.whl.part*
DS_BUILD_OPS=0 "$PYTHON" -m pip --disable-pip-version-check wheel -q --no-cache-dir --no-deps --no-build-isolation \
  -w "$FOLDER" "${PACKAGES[0]}"
"$PYTHON" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
  --python-version "$PYTHON_VERSION" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  -d "$FOLDER" "${PACKAGES[@]:1}"

count=$(find "$FOLDER" -type f -name '*.whl' | wc -l)
[ "$count" -eq "${#PACKAGES[@]}" ] || { echo "error: $count wheels for ${#PACKAGES[@]} packages in $FOLDER" >&2; exit 1; }
for wheel in "$FOLDER"/deepspeed-*.whl; do
  case $wheel in
    *-none-any.whl) ;;
    *) echo "error: $wheel holds compiled code; build it where DS_BUILD_OPS=0 is honoured" >&2; exit 1 ;;
  esac
done
find "$FOLDER" -type f -name '*.whl' -size +${PART_MIB}M | while read -r wheel; do
  split -b "${PART_MIB}M" -d "$wheel" "$wheel.part"
  rm "$wheel"
done
bytes=$(find "$FOLDER" -type f -name '*.whl*' -printf '%s\n' | awk '{ sum += $1 } END { print sum }')
echo "$count wheels, $((bytes >> 10)) KiB in $FOLDER"
[ -n "${CUTLASS:-}" ] || [ "$bytes" -le $((LIMIT_MIB << 20)) ] || { echo "error: more than $LIMIT_MIB MiB" >&2; exit 1; }
