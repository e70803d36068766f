# make train       train the quick main job; ARGS="model=transformer task=lds" passes anything else to train.py
# make test        run the tests; make test-fast leaves out the slow ones, make test-all has the thorough ones, too
# make check       lint, format, types, spelling
# make docs        the documentation, into site/
# The first of them creates .venv and installs what is needed; nothing else has to be done.

PYTHON ?= python3
ARGS ?= model=stu task=lra_listops experiment=quick
VENV = .venv
CONSTRAINTS = constraints.txt
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

.PHONY: help setup train test test-fast test-all test-lowest test-hydra14 check types format generate docs clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

setup: $(VENV)/installed  ## create .venv with everything, as pinned in constraints.txt

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(f"error: Python {sys.version.split()[0]}: must be 3.11 or newer; name one with make PYTHON=...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

train: setup  ## train; ARGS="..." are the arguments of train.py
	@$(BIN)/python train.py $(ARGS)

test: setup  ## run the tests but the thorough ones
	@$(PYTEST) -m "not thorough"

test-fast: setup  ## run the tests that are not marked slow
	@$(PYTEST) -m "not slow and not thorough"

test-all: setup  ## run every test
	@$(PYTEST)

# Not the golden trajectories: other releases of PyTorch draw other random numbers.
test-lowest: VENV = .venv-lowest
test-lowest:  ## lint, and the tests that are fast or run train.py, with the lowest versions of pyproject.toml
	@$(MAKE) --no-print-directory setup VENV=$(VENV) CONSTRAINTS=constraints-lowest.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	@$(PYTEST) -m "(not slow or e2e) and not thorough" --deselect tests/training/test_training.py::test_golden_trajectory

# Until Hydra 1.4 is out: what pyproject.toml allows besides the pinned 1.3.
.venv-hydra14/constraints.txt: constraints.txt
	@mkdir -p $(@D)
	@sed -E 's/^(hydra-core==).*/\11.4.0rc3/; s/^(omegaconf==).*/\12.4.1rc1/' $< > $@

test-hydra14: VENV = .venv-hydra14
test-hydra14: .venv-hydra14/constraints.txt  ## the tests of configurations and commands, and two runs, with Hydra 1.4
	@$(MAKE) --no-print-directory setup VENV=$(VENV) CONSTRAINTS=$<
	@$(PYTEST) -m "(not slow or e2e) and not thorough" -k "test_conf or test_cli or test_presets or test_sweep or (TestARun and lds)" \
		tests/conf tests/training/test_e2e.py

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

generate: setup  ## write what is generated for a new model or task: golden trajectory, row in README.md, sections of docs/
	@$(BIN)/python -m tests.generate

# An environment that has what is needed is left as it is: it may be another clone's (VENV=...).
docs:  ## build the documentation into site/
	@$(BIN)/python -c 'import latex2mathml, mkdocstrings_handlers.python, zensical' 2> /dev/null \
		|| $(MAKE) --no-print-directory setup
	$(BIN)/python -m zensical build --clean --strict

clean:  ## remove environments and caches; runs and data stay
	rm -rf .venv .venv-lowest .venv-hydra14 .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache site *.egg-info
