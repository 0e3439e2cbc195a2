# make train [ARGS="optimizer.lr=1e-4"]   make test [ARGS="-k packing"]   make test-faults   make check
PYTHON ?= python3.11
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-faults check format

train: $(VENV)/.installed
	$(BIN)/python -m xtuner_hydra model=qwen3_tiny data=openai_sft $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# Processes killed at random, full disks, hanging ranks.
test-faults: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m faults --timeout 3600 $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment that the tests ran with, built on first use and whenever the pins change.
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
