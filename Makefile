# make train       train the quick main job; ARGS="model=transformer task=lds" passes anything else to train.py
# make test        run the tests; make test-fast leaves out the slow ones
# make check       lint, format, types, spelling
# The first of them creates .venv and installs what is needed; nothing else has to be done.

PYTHON ?= python3
ARGS ?= model=stu task=lra_listops experiment=quick
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

.PHONY: help setup train test test-fast check types format generate clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

setup: .venv/installed  ## create .venv with everything, as pinned in constraints.txt

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"error: Python {sys.version.split()[0]}: must be 3.11 or newer; name one with make PYTHON=...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: setup  ## train; ARGS="..." are the arguments of train.py
	@$(BIN)/python train.py $(ARGS)

test: setup  ## run the tests
	@$(PYTEST)

test-fast: setup  ## run the tests that are not marked slow
	@$(PYTEST) -m "not slow"

check: setup types  ## lint, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup
	$(BIN)/mypy
	$(BIN)/mypy train.py

format: setup  ## fix what lint and format can fix themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: setup  ## write what is generated for a new model: its golden trajectory and its row in README.md
	@$(BIN)/python -m tests.generate

clean:  ## remove .venv and caches; runs and data stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
