# `make demo` and `make test` work on a machine with nothing but Python >= 3.10 and make: the first of them
# sets up .venv, the second finds it there. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The lock is a constraints file: it fixes the version of whatever gets installed and installs nothing itself.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $$([ -t 2 ] || echo -qq) -c requirements.lock
INPUTS := pyproject.toml requirements.lock

# One stamp for what demo and test need, one each for what contributors and the benchmarks need on top.
BASE  := $(VENV)/.installed
DEV   := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

TORCH := 2.13.0
ARGS   ?=
SCRIPT ?=
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all bench bench-lds docs lint types format lock clean

help:  ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12
	@echo "Another Python: make PYTHON=python3.12 TARGET. More arguments: make demo ARGS='--help'."

demo: $(BASE)  ## train a small network, trace its predictions, find its mislabeled images
	@$(BIN)/upweight demo $(ARGS)

test: $(BASE)  ## the tests that take seconds, and every example in the docstrings
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(BASE)  ## every test
	@$(PYTEST) $(ARGS)

bench: $(BENCH)  ## run every script in benchmarks/, or one: SCRIPT=solver_ladder
	@set -e; for script in $(or $(SCRIPT:%=benchmarks/%.py),$(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); done

bench-lds: $(BENCH)  ## run every LDS recipe, hours of retraining; UPWEIGHT_DATA names the data
	@set -e; for recipe in digits fashion "tabular concrete" "tabular parkinsons" "mnist mnist-lr" "mnist mnist-mlp" \
		"cifar thin" gpt; do set -- $$recipe; \
		echo "== $$recipe"; $(BIN)/python benchmarks/lds/$$1.py $$2 $(ARGS); done

docs: $(DEV)  ## build the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

lint: $(DEV)  ## style, names, docstrings, formatting
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: $(DEV)  ## check the types of src/
	@$(BIN)/python -m basedpyright

format: $(DEV)  ## repair what can be repaired of `make lint`
	@$(BIN)/python -m ruff check --fix-only .
	@$(BIN)/python -m ruff format .

# NVIDIA's libraries stay out of the lock: torch itself names the exact ones its CUDA build needs, and its CPU
# build needs none. Versions that still fit are kept; ARGS=--upgrade takes the newest of all but torch.
lock: $(BIN)/python  ## bring requirements.lock up to date with pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@cp requirements.lock $(VENV)/lock.txt
	@echo "torch==$(TORCH)" > $(VENV)/pins.txt
	@$(BIN)/python -m uv pip compile pyproject.toml --constraints $(VENV)/pins.txt \
		--all-extras --universal --python-version 3.10 --no-python-downloads \
		--no-annotate --no-header --quiet $(ARGS) --output-file $(VENV)/lock.txt
	@{ echo "# Tested versions, used as pip constraints. Written by make lock."; \
		grep -v -E '^(cuda|nvidia|triton)|^(upweight|-e) ' $(VENV)/lock.txt; } > requirements.lock

clean:  ## remove the environment and everything that was built; runs/ stays
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "upweight needs Python 3.10 or newer, and there is no $(PYTHON). Name one: make PYTHON=/path/to/python3"; \
		exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "upweight needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12"; \
		exit 1; } >&2
	@$(PYTHON) -m venv --clear $(VENV)

$(BASE): $(INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) (once; mostly the download of PyTorch)"
	@$(INSTALL) -e '.[test]'
	@touch $@

# Contains all of BASE, so a later `make test` or `make demo` installs nothing.
$(DEV): $(INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) with the tools for contributors (once; mostly the download of PyTorch)"
	@$(INSTALL) -e '.[dev]'
	@touch $(BASE) $@

$(BENCH): $(BASE)
	@echo "Installing what the benchmarks compare with (once)"
	@$(INSTALL) -e '.[bench]'
	@touch $@
