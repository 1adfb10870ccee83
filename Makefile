# The only verbs: demo, test, lint, check, bench, gpu-check, chaos, simulate, soak, test-vllm, test-lmcache, test-sglang, clean.
# Everything they need is installed into .venv first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SUITE  ?= tiers
N      ?= 100000
MINUTES ?= 30
VLLM_VENV ?= .venv-vllm

export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Waiting OpenMP threads that spin cost minutes on busy cores.
export OMP_WAIT_POLICY := passive

.PHONY: demo test lint check bench gpu-check chaos simulate soak test-vllm test-lmcache test-sglang clean install
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

# Two hundred rounds of kill -9 against the nvme tier, of one volume and of three, and the daemon, and the other events of docs/kill_matrix.md.
chaos: $(STAMP)
	$(BIN)/python tests/chaos/kill_nvme.py --rounds 200
	$(BIN)/python tests/chaos/kill_nvme.py --rounds 200 --volumes 3
	$(BIN)/python tests/chaos/kill_daemon.py --rounds 200
	$(BIN)/python -m pytest tests/test_chaos_events.py tests/test_limits_reached.py

# A hundred thousand random schedules of the store, in virtual time; a seed that fails is named and plays the same again.
simulate: $(STAMP)
	$(BIN)/python -m kvstore.testing.simulation --count $(N) --jobs $$(nproc)

# A daemon under full load; fails if its memory grows.
soak: $(STAMP)
	$(BIN)/python tests/chaos/soak.py --minutes $(MINUTES)

# With vLLM on the CPU, in an environment of its own that is built once (3.5 GB).
test-vllm: $(STAMP)
	$(BIN)/python tests/engines/run.py --venv $(VLLM_VENV) $(ARGS)

# With LMCache, in an environment of its own that is built once: kvstore's tests and LMCache's own on kvstore's adapters.
test-lmcache: $(STAMP)
	$(BIN)/python tests/lmcache/run.py $(ARGS)

# With the classes of SGLang that hold and move host memory, out of its wheel, which is fetched once (250 MB unpacked).
test-sglang: $(STAMP)
	$(BIN)/python tests/sglang/run.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-vllm .venv-lmcache .venv-sglang build dist *.egg-info kvstore/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
