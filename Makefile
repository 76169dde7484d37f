# Every target sets up what it needs in .venv; nothing else has to be installed but Python 3.11, git and make.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast aarch64 lint format type proto proto-check bench targets clean

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STORY  ?= news
WORKERS ?= 2
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT:
	@echo "error: there is no target '$@'; 'make help' lists them" >&2; exit 2

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed  ## Create .venv with the pinned versions.

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about three minutes the first time)"
	@# torch first: a wider range would pull gigabytes of CUDA packages
	@$(PIP) install --quiet 'torch==2.13.0' -c constraints.txt
	@$(PIP) install --quiet -e '.[demo,edge-onnxruntime,dev]' -c constraints.txt
	@touch $@

demo: setup  ## Run the whole story on real data; STORY=meter is the small one.
	@$(BIN)/python -m examples.quickstart --story $(STORY)

test: setup  ## Run all tests, in WORKERS=2 processes.
	@$(BIN)/python -m pytest -n $(WORKERS)

test-fast: setup  ## Run the tests that need no servers or compilers.
	@$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

aarch64: setup  ## Prepare an Arm device under emulation, for the tests that use one (Debian 12).
	@$(BIN)/python -m tests.aarch64.setup

lint: setup  ## Check style, import directions and Dockerfiles.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYTHONPATH=.:proto $(BIN)/lint-imports
	@$(BIN)/hadolint docker/*.Dockerfile

format: setup  ## Format the code.
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

type: setup  ## Check types.
	@$(BIN)/mypy

proto: setup  ## Generate the code for proto/isthmus/v1/*.proto.
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --grpc_python_out=proto \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto proto/isthmus/v1/*.proto

proto-check: proto  ## Check that the committed generated code is up to date.
	@git diff --exit-code --stat -- proto/isthmus/v1 || { echo "error: run 'make proto' and commit the result" >&2; exit 1; }

bench: setup  ## Run all benchmarks (hours; minutes with .venv/bin/python -m benchmarks --quick).
	@$(BIN)/python -m benchmarks

targets: setup  ## Try every target on every model of the zoo, and write docs/targets.md (hours).
	@$(BIN)/python -m benchmarks.support --markdown docs/targets.md

clean:  ## Remove everything that was built, the environment included.
	rm -rf $(VENV) build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
