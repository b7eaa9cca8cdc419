# make test and make train work on a machine with Python >= 3.10 and a C++ compiler; they set up .venv first.
# ARGS is handed on:  make train ARGS="--rho 0.1 --seeds 5"   make test ARGS="-k schedule"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
SOURCES := $(shell find csrc -type f -not -path 'csrc/tests/*')

# The ninja that builds the extension is the one in .venv.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

DEPENDENCIES := $(BIN)/.dependencies
EDITABLE := $(BIN)/.editable
EXTENSION := $(BIN)/.extension

.PHONY: test train build packaging lint types sanitize bench clean

test: $(EXTENSION)
	$(BIN)/python -m pytest -m "not packaging" $(ARGS)

train: $(EXTENSION)
	$(BIN)/rst-fused train $(ARGS)

build: $(EXTENSION)

packaging: $(DEPENDENCIES)
	$(BIN)/python -m pytest -m packaging $(ARGS)

lint: $(DEPENDENCIES)
	$(BIN)/ruff check .

types: $(DEPENDENCIES)
	$(BIN)/mypy

sanitize: $(EXTENSION)
	csrc/tests/run_sanitizers.sh

bench: $(EXTENSION)
	$(BIN)/python -m benchmarks cpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info rst_fused/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEPENDENCIES): requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

# Two steps, since pip compiles in a temporary folder: only build_ext recompiles no more than what has changed.
$(EDITABLE): $(DEPENDENCIES) setup.py pyproject.toml
	RST_FUSED_BUILD_EXTENSION=0 $(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@

$(EXTENSION): $(EDITABLE) $(SOURCES)
	RST_FUSED_BUILD_EXTENSION=1 RST_FUSED_BUILD_CUDA=$(if $(shell command -v nvcc),1,0) $(BIN)/python setup.py build_ext --inplace
	touch $@
