# make test and make train work on a machine with Python >= 3.11 and a C++ compiler; they set up .venv first.
# ARGS is handed on:  make train ARGS="--rho 0.1 --seeds 5"   make test ARGS="-k schedule"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
SOURCES := $(shell find csrc -type f -not -path 'csrc/tests/*')

# The ninja that builds the extension is the one in .venv.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

OLDEST := .venv-oldest-torch
OLDEST_TESTS := $(addprefix ops/test_,ops ops_properties simd_levels) \
	$(addprefix optim/test_,plan optimizer exceptions resume sam hyperparameter_changes peer_bugs compile \
	compile_idioms first_gradients memory_safety mixed_paths clipping) \
	distributed/test_sharded_cases

DEPENDENCIES := $(BIN)/.dependencies
EDITABLE := $(BIN)/.editable
EXTENSION := $(BIN)/.extension

.PHONY: test train build packaging oldest lint types sanitize bench clean

test: $(EXTENSION)
	$(BIN)/python -m pytest -m "not packaging" $(ARGS)

train: $(EXTENSION)
	$(BIN)/rst-fused train $(ARGS)

build: $(EXTENSION)

packaging: $(DEPENDENCIES)
	$(BIN)/python -m pytest -m packaging $(ARGS)

# The binary built against the torch of .venv, loaded by the oldest one that it is made for.
oldest: $(EXTENSION) $(OLDEST)/.dependencies
	PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest $(OLDEST_TESTS:%=tests/%.py) $(ARGS)

lint: $(DEPENDENCIES)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

types: $(DEPENDENCIES)
	$(BIN)/mypy

sanitize: $(EXTENSION)
	csrc/tests/run_sanitizers.sh

bench: $(EXTENSION)
	$(BIN)/python -m benchmarks cpu $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info rst_fused/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEPENDENCIES): requirements-dev.txt constraints-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

$(OLDEST)/.dependencies: constraints-dev.txt Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints-dev.txt torch==2.11.0 numpy==2.4.6 pytest==9.2.0 hypothesis==6.170.15
	touch $@

# Two steps, since pip compiles in a temporary folder: only build_ext recompiles no more than what has changed.
$(EDITABLE): $(DEPENDENCIES) setup.py pyproject.toml
	RST_FUSED_BUILD_EXTENSION=0 $(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@

$(EXTENSION): $(EDITABLE) $(SOURCES)
	RST_FUSED_BUILD_EXTENSION=1 RST_FUSED_BUILD_CUDA=$(if $(shell command -v nvcc),1,0) $(BIN)/python setup.py build_ext --inplace
	touch $@
