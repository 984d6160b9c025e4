# Every target works from a bare clone: the first one to need it builds .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread: tests then measure our code, and decode does not collapse on a
# machine whose cores are shared.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

ENGINES := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvstore/engines

.PHONY: help venv demo test test-engines gpu-check check lint proto bench bench-peers soak clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

venv: $(STAMP) ## build .venv with kvstore, its engine and the tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "kvstore needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Building .venv (once; torch makes it a few minutes on a slow line)"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,daemon,events,dev]'
	@touch $@

demo: $(STAMP) ## a real model answers from a cold and a warm cache
	$(BIN)/kvstore demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kvstore tests benchmarks

test: lint ## lint, types and every test but the soak
	$(ONE_THREAD) $(BIN)/python -m pytest

test-engines: $(STAMP) ## the connectors with the real engines; installs them once, 4 GB
	PYTHON=$(PYTHON) tests/engines/install.sh "$(ENGINES)"
	$(ONE_THREAD) KVSTORE_ENGINES="$(ENGINES)" $(BIN)/python -m pytest -m engines tests/engines

# On a machine with a GPU there may be a Python with everything already, and no network.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-check: ## the kernels' tests on a CUDA device, under compute-sanitizer
	tests/kernels/gpu_check.sh "$(GPU_PYTHON)"

check: lint ## lint, types, and the tests of the rules and the pure core: under a minute
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_layers.py tests/test_tidy.py \
	  tests/test_public.py tests/test_identity.py tests/test_hashing.py tests/test_layout.py \
	  tests/test_codec.py tests/test_frame.py

proto: $(STAMP) ## make kvstore/proto/*_pb2* anew from the .proto files
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
	  kvstore/proto/*.proto

bench: $(STAMP) ## measure, beside the ceilings; writes benchmarks/results/latest.json
	$(ONE_THREAD) $(BIN)/python -m benchmarks

bench-peers: ## install LMCache, vLLM, NIXL, Redis's client and Mooncake, to be measured beside; 5 GB
	PYTHON=$(PYTHON) benchmarks/install_peers.sh .venv-peers

soak: $(STAMP) ## the long, random tests
	$(ONE_THREAD) $(BIN)/python -m pytest -m soak --hypothesis-profile=soak

clean: ## remove what the other targets made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
