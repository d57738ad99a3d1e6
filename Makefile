# Each target makes the virtual environment it needs in .venv; the second time it is there at once.
#   make demo     train a small model on eight simulated devices, then let it write (README)
#   make test     run the tests
#   make test-all run those too that compare every mesh and compile large programs for TPUs
#   make test-real    those with a published model's weights, downloaded (90 MB) into tests/.cache
#   make test-parity  those beside transformers and torch, in a virtual environment of their own
#   make check    what CI and pre-commit check: format, lint, types, layering
# Another Python: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
# Test files side by side; each compiles on one core and holds about 3 GB.
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
EXTRAS := dev

.PHONY: demo test test-all test-real test-parity check
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/jaxgen train configs/tiny.py --devices 8
	@echo "The checkpoint, restored by a new process, continues 'def main(':"
	$(BIN)/jaxgen generate runs/tiny --devices 8 --max-tokens 64 --temperature 0.7 --prompt "def main("

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not (full or real or parity)" $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not (real or parity)" $(PYTEST_ARGS)

test-real: $(VENV)/.dev
	$(BIN)/python -m pytest -m real $(PYTEST_ARGS)

test-parity:
	@$(MAKE) VENV=$(VENV)-parity EXTRAS=dev,parity PYTEST_ARGS="-m parity $(PYTEST_ARGS)" _parity

_parity: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest tests/test_layering.py

$(VENV)/.core: pyproject.toml | $(VENV)/.python
	@echo "Installing jaxgen into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.python
	@echo "Installing jaxgen and its tests' tools into $(VENV)"
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.core

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "jaxgen needs Python 3.11 to 3.13 and there is no $(PYTHON); try PYTHON=python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "jaxgen needs Python 3.11 to 3.13 and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "try PYTHON=python3.11" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
