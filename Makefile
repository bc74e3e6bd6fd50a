# `make demo` renders a 60 s video, `make test` runs every check. Both create .venv first if need be.
# Another interpreter: make demo PYTHON=python3.12. Another environment: make test VENV=/path/to/venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The thread count is part of what a video's bits depend on; more than one per process also fights over two cores.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test test-text types tests
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/pavdm sample configs/sample/demo.yaml --overwrite

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j 2 types tests

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

tests: $(VENV)/.dev
	$(BIN)/pytest -n 3 --no-loadscope-reorder

# What needs transformers: beside the environment, because with it every process that imports diffusers starts 1 s later.
test-text: $(VENV)/.text
	PYTHONPATH=$(VENV)/text $(BIN)/pytest -m "slow or not slow" \
	  tests/test_text_pretrained.py tests/test_train_umt5.py tests/test_skyreels_peer.py tests/test_wan_checkpoint.py \
	  tests/test_evaluate_pretrained.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch is named so that an installed one of another version is replaced by the tested one.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@ $(VENV)/.core

$(VENV)/.text: constraints.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target $(VENV)/text transformers tokenizers sentencepiece regex
	touch $@
