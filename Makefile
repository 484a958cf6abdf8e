# Every target sets itself up in .venv; after the first time it starts at once.
#   make pretrain [ARGS="model=v4_micro train.steps=100"]     the main job
#   make test                                                 all tests but the slow ones
#   make quick                                                the most telling tests
#   make matrix                                               the numeric tests as other CPUs run them
#   make gpu                                                  on a machine with a GPU: its tests, then its benchmark
#   make check                                                lint, format, types
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
OFFLINE = HF_HUB_OFFLINE=1 WANDB_MODE=offline DS_ACCELERATOR=cpu
PYTEST = OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -q -n $(WORKERS)
LEVELS = $(OFFLINE) $(BIN)/python -m tests.cpu_levels
ARGS ?=
WORKERS ?= 2

.PHONY: pretrain test suite levels quick slow matrix gpu check format

pretrain: $(STAMP)
	$(BIN)/python train/pretrain.py $(ARGS)

test: suite $(if $(ARGS),,levels)

suite: $(STAMP_DEV)
	$(PYTEST) -m "not slow" $(ARGS)

levels: $(STAMP_DEV)
	$(LEVELS) --core --jobs $(WORKERS)

quick: $(STAMP_DEV)
	$(PYTEST) -m "core and not slow" $(ARGS)

slow: $(STAMP_DEV)
	$(PYTEST) -m slow $(ARGS)

matrix: $(STAMP_DEV)
	$(LEVELS) --jobs $(WORKERS) $(ARGS)

# Without a GPU one line says so. Kernels run on the device, not in Triton's interpreter.
gpu: $(STAMP_DEV)
	@$(BIN)/python scripts/bench.py gpu --check
	TRITON_INTERPRET=0 $(OFFLINE) $(BIN)/python -m pytest -q -n 0 -m "gpu or multigpu"
	$(BIN)/python scripts/bench.py gpu $(ARGS)

check: $(STAMP_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(STAMP_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pip runs only when pyproject.toml is newer than the stamp.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(STAMP_DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $(STAMP) $@
