# SPDX-License-Identifier: Apache-2.0
# Two commands do everything: `make serve` and `make test`.

PYTHON ?= python3
PYTHON312 ?= python3.12
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CUDA build where an NVIDIA driver answers, the CPU build elsewhere.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK   := requirements/$(DEVICE).lock
STAMP  := $(VENV)/.installed-$(DEVICE)

# Tests that share an engine are in one file. Those of servers mind the time, and run alone.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
DEFAULT := -m "not slow and not gpu"

SERVE_ARGS ?= --host 127.0.0.1 --port 8000 --kv-cache-memory-bytes 1G

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-all test-unit lint format lock profile bench bench-kvpress bench-openvino plan gpu-bundle gpu-rehearsal gpu-test loadtest dashboard clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## Install into .venv, and convert the embedded model

$(STAMP): $(LOCK) pyproject.toml scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" DEVICE="$(DEVICE)" scripts/install.sh
	touch $@

serve: $(STAMP)  ## Serve the embedded model on http://127.0.0.1:8000
	$(BIN)/kvserve serve $(SERVE_ARGS)

test: $(STAMP)  ## Run the test suite
	$(BIN)/pytest $(WORKERS) $(DEFAULT) tests/engine tests/unit
	$(BIN)/pytest $(WORKERS) $(DEFAULT) tests/http tests/deploy
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/kernels

test-unit: $(STAMP)  ## Run the tests that need no model weights
	$(BIN)/pytest $(WORKERS) tests/unit

test-all: $(STAMP)  ## Run everything that this machine can run
	$(BIN)/pytest

lint: $(STAMP)  ## Check style, types and import boundaries
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_boundaries.py

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plan: $(STAMP)  ## Show what the default policy makes of a 512 MiB pool
	$(BIN)/kvserve plan --kv-memory 512MiB

profile: $(STAMP)  ## Measure the embedded model's retrieval heads anew
	$(BIN)/kvserve profile retrieval

bench: $(STAMP)  ## Measure speed and capacity side by side with stock vLLM
	for name in attention scheduler prefill decode_flat serving; do \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-openvino: $(STAMP)  ## The serving benchmark with OpenVINO GenAI beside it
	test -x .venv-openvino/bin/python || $(PYTHON) -m venv .venv-openvino
	$(BIN)/uv pip install -q -p .venv-openvino/bin/python -r requirements/openvino.txt
	$(BIN)/python -m benchmarks.serving --engines none openvino openvino:1536 \
	  retrieval:budget=0.25

bench-kvpress: $(STAMP)  ## Measure needles beside NVIDIA kvpress, in its own .venv-kvpress
	test -x .venv-kvpress/bin/python || $(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install -q --no-deps torch==2.13.0
	grep -v '^torch==' requirements/kvpress.txt | \
	  $(BIN)/uv pip install -q --no-deps -p .venv-kvpress/bin/python -r -
	$(BIN)/python -m benchmarks.quality_vs_kvpress

gpu-bundle: $(STAMP)  ## Pack what a bare GPU machine needs, into .gpu
	$(BIN)/python scripts/gpu/bundle.py --uv $(BIN)/uv

gpu-rehearsal: $(STAMP)  ## Prove the bundle without a GPU (3 GB of PyTorch, once)
	$(BIN)/python scripts/gpu/rehearse.py --uv $(BIN)/uv --python312 $(PYTHON312)

gpu-test: $(STAMP)  ## Test and measure kvserve on this machine's GPU
	$(BIN)/python scripts/gpu/run.py all

loadtest: $(STAMP)  ## Load a server (URL=..., or its own) with guidellm and agents: loadtest.html, -agents.png
	test -x .venv-load/bin/python || $(PYTHON) -m venv .venv-load
	.venv-load/bin/python -m pip install -q --no-deps torch==2.13.0+cpu 2>/dev/null || \
	  $(BIN)/uv pip install -q --no-deps -p .venv-load/bin/python --torch-backend cpu torch==2.13.0
	$(BIN)/uv pip install -q --no-deps -p .venv-load/bin/python -r requirements/load.txt
	$(BIN)/python scripts/loadtest.py $(if $(URL),--url $(URL)) $(LOADTEST_ARGS)

dashboard: $(STAMP)  ## Write the Grafana dashboard anew from its code
	$(BIN)/python deploy/grafana/dashboard.py

lock: $(STAMP)  ## Resolve requirements/*.lock anew
	for device in cpu gpu; do \
	  $(BIN)/uv pip compile -q pyproject.toml --extra $$device --extra dev --extra deploy \
	    --extra eval --extra model --extra scale --python-version 3.11 \
	    --no-annotate --no-header \
	    -o requirements/$$device.lock; done

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .venv-load .venv-openvino .venv-gpu-rehearsal .gpu .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
