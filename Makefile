# Safelight's commands. `make` alone lists them. Everything happens in .venv, which the first of them makes.

PYTHON ?= python3.11 python3.12 python3.13 python3# names to try, in this order
DISK_MB ?= 4000# that the environment needs
PROMPT ?= a small yellow star at the top left on a black background
PORT ?=
MODEL ?=
JOBS ?= 2# files of tests that run at once
ARGS ?=

ENVIRONMENT := .venv/.installed
BIN := .venv/bin
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder
FAST := tests/protocol tests/formats tests/process tests/scheduler tests/server tests/client tests/rollout/test_transitions.py \
	$(addprefix tests/worker/test_,batcher.py recovery.py collate.py boundary.py prompt_cache.py costs.py) \
	--ignore=tests/server/test_processes.py --ignore=tests/client/test_live.py

export PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo test test-cuda test-fast test-nightly test-newest lint format serve clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(ENVIRONMENT) ## draw a picture: PROMPT="…" for another one, PORT=… for a port of your choice
	@$(BIN)/python examples/demo.py "$$PROMPT" $(if $(PORT),--port $(PORT))

# With a Chromium on the PATH (apt install chromium), web pages attack the server too; without one that is skipped.
test: $(ENVIRONMENT) ## run the tests: ARGS="tests/client -q" for some of them, JOBS=4 for more files at once
	$(PYTEST) $(ARGS)
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) test-cuda; fi

test-cuda: $(ENVIRONMENT) ## run the tests that compare with plain diffusers on a GPU
	TEST_DEVICE=cuda $(BIN)/python -m pytest tests/cuda

test-fast: $(ENVIRONMENT) ## run the tests that need few live servers and models, in two minutes
	$(PYTEST) $(FAST) $(ARGS)

test-nightly: $(ENVIRONMENT) ## run the tests with far more random examples, and those that take hours
	TEST_EFFORT=nightly $(PYTEST) $(ARGS)

NEWEST := build/newest
test-newest: $(ENVIRONMENT) ## look for the internals that are used in the newest diffusers and transformers
	$(BIN)/python -m pip install -q --upgrade --no-deps --target $(NEWEST) diffusers transformers
	PYTHONPATH=$(NEWEST) $(BIN)/python -m pytest -q tests/worker/test_internals.py -k "there"

lint: $(ENVIRONMENT) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/mypy && ln -sfn ../.. build/mypy/safelight
	MYPYPATH=build/mypy $(BIN)/mypy

format: $(ENVIRONMENT) ## put the code into the common format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(ENVIRONMENT) ## start a server: MODEL=…, PORT=…, ARGS="--replicas 2"
	@exec $(BIN)/safelight serve $(MODEL) $(if $(PORT),--port $(PORT)) $(ARGS)

clean: ## remove what was built and cached; .venv and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# mypy and pip see the repository's root as the package `safelight`: pip by pyproject.toml, mypy by a link in build/.
$(ENVIRONMENT): pyproject.toml constraints.txt
	@python=$$(for name in $(PYTHON); do "$$name" -c '$(SUITABLE)' 2>/dev/null && { echo "$$name"; break; }; done); \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer with its venv module is missing: install it (apt install python3-venv, brew install python@3.11) or name it with PYTHON=…."; exit 1; \
	fi; \
	free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1024)}'); \
	if [ ! -e .venv ] && [ "$$free" -lt $(DISK_MB) ]; then \
		echo "The disk has $$free MB left here and the environment needs $(DISK_MB): make room, or clone to another disk."; exit 1; \
	fi; \
	echo "Making .venv with $$("$$python" --version); this happens once and downloads what torch needs."; \
	"$$python" -m venv .venv && $(BIN)/python -m pip install -c constraints.txt -e '.[dev,train]' || { \
		echo "The packages could not be installed, for the reason that pip gives above: mend that and run make again."; exit 1; \
	}
	@touch $@
