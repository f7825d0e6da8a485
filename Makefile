# Safelight's commands. `make` alone lists them. All of them use the environment .venv, which the first command creates.

PYTHON ?= python3.11 python3.12 python3.13 python3# tried in this order
DISK_MB ?= $(if $(wildcard /dev/nvidiactl),9000,4000)# disk space for the environment; with CUDA's libraries on a GPU
PROMPT ?= a small yellow star at the top left on a black background
PORT ?=
MODEL ?=
JOBS ?= 2# test files that run at once
ARGS ?=
TEST_DEVICE ?= played# the device of test-played-cuda: played, or cpu
RECORD ?=# 1 writes the results of test-played-cuda into docs/hardware.md

ENVIRONMENT := .venv/.installed
BIN := .venv/bin
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder
FAST := tests/protocol tests/formats tests/process tests/scheduler tests/server tests/client tests/rollout/test_transitions.py \
	$(addprefix tests/worker/test_,batcher.py recovery.py collate.py boundary.py prompt_cache.py costs.py) \
	--ignore=tests/server/test_processes.py --ignore=tests/client/test_live.py

export PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-cuda test-played-cuda test-fast test-nightly test-newest lint format serve clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

demo: $(ENVIRONMENT) ## draw a picture: PROMPT="…" for another one, PORT=… for a port of your choice
	@$(BIN)/python examples/demo.py "$$PROMPT" $(if $(PORT),--port $(PORT))

# SGLANG_PATH names the folders of the peer's packages (benchmarks/peers.py says which); without it, its rows are missing.
BENCHMARKS ?= peers serving overhead compiling compiling_text caching memory parallel weights lora rollout start
bench: $(ENVIRONMENT) ## measure speed beside plain diffusers and peers, for hours: BENCHMARKS="peers lora" for some
	for name in $(BENCHMARKS); do $(BIN)/python -m safelight.benchmarks.$$name || exit; done
	if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/python -m safelight.benchmarks.gpu; fi
	$(BIN)/python docs/generate_performance.py

# The tests of attacks by web pages need a Chromium on the PATH (apt install chromium); without one they are skipped.
test: $(ENVIRONMENT) ## run the tests: ARGS="tests/client -q" for some of them, JOBS=4 for more files at once
	$(PYTEST) $(ARGS)
	@if [ -z "$(ARGS)" ]; then $(MAKE) test-played-cuda; fi
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) test-cuda; fi

test-cuda: $(ENVIRONMENT) ## run the tests of tests/cuda on a GPU, beside plain diffusers there
	TEST_DEVICE=cuda DEVICE_RESULTS=benchmarks/results/devices-cuda.json $(BIN)/python -m pytest tests/cuda $(ARGS)
	$(BIN)/python docs/generate_hardware.py

test-played-cuda: $(ENVIRONMENT) ## run the same tests on CUDA devices that are played on the CPU
	TEST_DEVICE=$(TEST_DEVICE) $(if $(RECORD),DEVICE_RESULTS=benchmarks/results/devices-$(TEST_DEVICE).json) $(PYTEST) tests/cuda $(ARGS)
	$(if $(RECORD),$(BIN)/python docs/generate_hardware.py)

test-fast: $(ENVIRONMENT) ## run the tests that need few live servers and models, in two minutes
	$(PYTEST) $(FAST) $(ARGS)

test-nightly: $(ENVIRONMENT) ## run the tests with far more random examples, and those that take hours
	TEST_EFFORT=nightly $(PYTEST) $(ARGS)
	TEST_EFFORT=nightly TEST_DEVICE=played $(PYTEST) tests/cuda

NEWEST := build/newest
test-newest: $(ENVIRONMENT) ## check that the newest diffusers and transformers have the undocumented names that workers use
	$(BIN)/python -m pip install -q --upgrade --no-deps --target $(NEWEST) diffusers transformers
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -q tests/worker/test_internals.py -k "there"

lint: $(ENVIRONMENT) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/mypy && ln -sfn ../.. build/mypy/safelight
	MYPYPATH=build/mypy $(BIN)/mypy

format: $(ENVIRONMENT) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(ENVIRONMENT) ## start a server: MODEL=…, PORT=…, ARGS="--replicas 2"
	@exec $(BIN)/safelight serve $(MODEL) $(if $(PORT),--port $(PORT)) $(ARGS)

clean: ## remove build results and caches; .venv and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The repository's root is the package `safelight`: for pip by pyproject.toml, for mypy by a link in build/.
$(ENVIRONMENT): pyproject.toml constraints.txt
	@python=$$(for name in $(PYTHON); do "$$name" -c '$(SUITABLE)' 2>/dev/null && { echo "$$name"; break; }; done); \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer with its venv module is missing: install it (apt install python3-venv, brew install python@3.11) or name it with PYTHON=…."; exit 1; \
	fi; \
	free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1024)}'); \
	if [ ! -e .venv ] && [ "$$free" -lt $(DISK_MB) ]; then \
		echo "The environment needs $(DISK_MB) MB and the disk has $$free MB left: free some space, or clone to another disk."; exit 1; \
	fi; \
	echo "Making .venv with $$("$$python" --version); this happens once and downloads torch."; \
	"$$python" -m venv .venv && $(BIN)/python -m pip install -c constraints.txt -e '.[dev,train]' || { \
		echo "The packages could not be installed. pip gives the reason above; fix it and run make again."; exit 1; \
	}
	@touch $@
