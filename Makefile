# The only verbs: demo, test, lint, check, bench, gpu-check, chaos, test-lmcache, clean.
# Everything they need is installed into .venv first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SUITE  ?= tiers

export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Waiting OpenMP threads that spin cost minutes on busy cores.
export OMP_WAIT_POLICY := passive

.PHONY: demo test lint check bench gpu-check chaos test-lmcache clean install
.DEFAULT_GOAL := check

install: $(STAMP)

# Editable, so that the source tree is what runs; constraints.txt pins every version (torch to its CPU build).
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kvstore/native/*.cpp kvstore/native/*.h codecs/native/*.cpp codecs/native/*.h)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create a virtual environment: install python3-venv, or set VENV to one" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,triton,dev]'
	@touch $@

# Real prompts through a real model: cold, warm from memory, warm from disk after kill -9 of the daemon.
demo: $(STAMP)
	$(BIN)/python -m kvstore.bench.demo

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# make bench SUITE=tiers|service|ttft
bench: $(STAMP)
	$(BIN)/kvstore bench $(SUITE) --json bench-$(SUITE).json

gpu-check: $(STAMP)
	$(BIN)/python -m kvstore.bench.gpu_check

# Two hundred rounds of kill -9 against the nvme tier and the daemon.
chaos: $(STAMP)
	$(BIN)/python tests/chaos/kill_nvme.py --rounds 200
	$(BIN)/python tests/chaos/kill_daemon.py --rounds 200

# With LMCache, in an environment of its own that is built once: kvstore's tests and LMCache's own on kvstore's adapters.
test-lmcache: $(STAMP)
	$(BIN)/python tests/lmcache/run.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-lmcache build dist *.egg-info kvstore/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
