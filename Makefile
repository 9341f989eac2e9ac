PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-oldest test-gpu lint figures clean

# A CPU build of torch is enough for everything but the GPU tests. Set TORCH to another requirement, or to "" to keep
# the torch that the interpreter already has (VENV_FLAGS=--system-site-packages).
TORCH ?= torch==2.13.0
VENV_FLAGS ?=
# The host library that the environment gets: the newest of the supported range.
HOST ?= transformers>=5.23,<5.24

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]" "$(HOST)"
	touch $@

# Swaps attention layers of a real pretrained model, heals it, saves, reloads, generates. Results in build/demo.
demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --work build/demo

# Fetches the host library's common tests first.
test: $(VENV)/.installed
	$(BIN)/python tests/hf_kalman/host/fetch.py
	$(BIN)/python -m pytest -n 2 -m "not gpu"

# The suite on the oldest transformers that is supported, in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest HOST="transformers==5.17.0"

# On a machine with a GPU and its own torch: make test-gpu PYTHON=python3 RUN="python3 -m pytest"
RUN ?= $(BIN)/python -m pytest
test-gpu:
	PYTHONPATH=src:kernels/torch-ext:conversion $(RUN) -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Every figure and docs/results.md again, from the JSON in benchmarks/results.
figures: $(VENV)/.installed
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) .venv-oldest build dist
