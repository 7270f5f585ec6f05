# The two commands of a fresh machine are `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export ORT_DISABLE_TELEMETRY := 1
# Two threads that spin while they wait are slower than two that sleep, on a small machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-trt test-gpu lint format bench clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed  ## Create .venv and install everything `make demo` and `make test` need.

# PyTorch first and alone: its version decides which build pip takes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (PyTorch is about 200 MB, the rest about as much) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[export,constrained,video,ros,metrics,dev]'
	@touch $@

demo: install  ## Build the bundled checkpoint and answer a question about a picture.
	@$(BIN)/python -m examples.demo

test: install  ## Run the tests that fit in a few minutes.
	$(BIN)/python -m pytest -m "not slow and not gpu and not trt and not llamacpp and not vllm"

test-slow: install  ## Run the tests at CLIP-L/14-336 size.
	$(BIN)/python -m pytest -m slow

test-trt: install  ## Build real plans with NVIDIA's parser and compiler; needs no GPU.
	@$(PIP) --editable '.[tensorrt]'
	@$(BIN)/python -m engines.ahead_of_time >&2
	$(BIN)/python -m pytest -m "trt and not slow"

test-gpu: install  ## Run the tests that need a CUDA GPU; they skip with a reason elsewhere.
	@$(PIP) --editable '.[tensorrt]'
	$(BIN)/python -m pytest -m gpu

lint: install  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the code in the house's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## Measure what the README claims.
	$(BIN)/python -m benchmarks.reduction_cost

clean:  ## Remove what was built, but not .venv.
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
