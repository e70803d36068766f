# make train   train the quick main job; ARGS="model=transformer task=lds" passes anything else to train.py
# make test    run the tests
# make check   lint, format, types
# The first of them creates .venv and installs what is needed; nothing else has to be done.

PYTHON ?= python3
ARGS ?= model=stu task=lra_listops experiment=quick
BIN := .venv/bin

.PHONY: help setup train test check format clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

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
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy train.py

format: setup  ## mend what lint and format can mend themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; runs and data stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
